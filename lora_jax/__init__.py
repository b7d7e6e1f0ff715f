"""LoRA for JAX as a pure parameter-tree transform.

Frozen base parameters and trainable low-rank deltas sit in separate pytrees; a function of parameters
becomes a function of (base, delta) without touching the model's code. See :func:`adapt`.
"""

from typing import TYPE_CHECKING

from lora_jax import adapters, initializers, io, merging, nnx, optim, paths, quantization
from lora_jax.adapters.adalora import AdaLoRA
from lora_jax.adapters.bottleneck import Bottleneck
from lora_jax.adapters.dora import DoRA
from lora_jax.adapters.factored import Factored
from lora_jax.adapters.fingerprints import WrongBaseWarning
from lora_jax.adapters.full import Full, Rows
from lora_jax.adapters.hira import HiRA
from lora_jax.adapters.ia3 import IA3
from lora_jax.adapters.loha import LoHa
from lora_jax.adapters.lokr import LoKr
from lora_jax.adapters.lora_fa import LoRAFA
from lora_jax.adapters.lora_xs import LoRAXS
from lora_jax.adapters.lowrank import LoRA
from lora_jax.adapters.miss import MiSS
from lora_jax.adapters.offset import Offset
from lora_jax.adapters.oft import OFT
from lora_jax.adapters.protocol import Adapter, Recipe, adapter
from lora_jax.adapters.vera import DVoRA, VeRA
from lora_jax.base_identity import BasePrecisionWarning
from lora_jax.batching import TrainStates, route, stack, swap, train_many, unstack
from lora_jax.checkpoint import load, save
from lora_jax.conversion import to_plain_lora
from lora_jax.finite import check_finite
from lora_jax.linear import all_linear
from lora_jax.merging import combine, merge, switch_task, truncate, unmerge
from lora_jax.optim import join, optimizer, partition, trainable_mask
from lora_jax.quantization import (
    FP4,
    NF4,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    Int4,
    Int8,
    dequantize,
    quantize,
)
from lora_jax.renamed import module_getattr
from lora_jax.report import explain, summary
from lora_jax.resume import restore_state, save_state
from lora_jax.sharding import delta_shardings, state_shardings
from lora_jax.spec import init, prepare
from lora_jax.training import TrainState, train_step
from lora_jax.transform.adapt import adapt

__version__ = "0.2.0"

__all__ = [
    "FP4",
    "IA3",
    "NF4",
    "OFT",
    "Q4_0",
    "Q4_1",
    "Q4_K",
    "Q5_0",
    "Q5_1",
    "Q5_K",
    "Q6_K",
    "Q8_0",
    "AdaLoRA",
    "Adapter",
    "BasePrecisionWarning",
    "Bottleneck",
    "DVoRA",
    "DoRA",
    "Factored",
    "Full",
    "HiRA",
    "Int4",
    "Int8",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRAXS",
    "MiSS",
    "Offset",
    "Recipe",
    "Rows",
    "TrainState",
    "TrainStates",
    "VeRA",
    "WrongBaseWarning",
    "adapt",
    "adapter",
    "adapters",
    "all_linear",
    "analysis",
    "check_finite",
    "combine",
    "delta_shardings",
    "dequantize",
    "explain",
    "init",
    "initializers",
    "io",
    "join",
    "load",
    "merge",
    "merging",
    "nnx",
    "optim",
    "optimizer",
    "partition",
    "paths",
    "peft",
    "prepare",
    "quantization",
    "quantize",
    "restore_state",
    "route",
    "save",
    "save_state",
    "stack",
    "state_shardings",
    "summary",
    "swap",
    "switch_task",
    "testing",
    "to_plain_lora",
    "train_many",
    "train_step",
    "trainable_mask",
    "truncate",
    "unmerge",
    "unstack",
]

if TYPE_CHECKING:
    from lora_jax import analysis, peft, testing
else:  # a type checker accepts any name of a module that has it
    __getattr__ = module_getattr(__name__, ("analysis", "peft", "testing"))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
