"""Reads the adapter in a GGUF file."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import BATCH, IN, OUT
from lora_jax.io.read_errors import list_problems
from lora_jax.peft import experts
from lora_jax.peft.gguf.files import field, import_gguf, open_gguf
from lora_jax.peft.gguf.model import EXPERT_MATRICES, GgufModel
from lora_jax.peft.module import Module
from lora_jax.peft.names import Fused, Names
from lora_jax.peft.torch_adapter import TorchAdapter

_PARTS = (".lora_a", ".lora_b")
_TABLE = "token_embd.weight"


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of one weight, in float32.

    Attributes:
      a: `[rank, in]`, of experts `[experts, rank, in]`; of the embedding `[vocabulary, rank]`.
      b: `[out, rank]`, of experts `[experts, out, rank]`.
      scale: The factor of the product.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """The rank of the product."""
        return self.b.shape[-1]


def read_delta(file: Path) -> dict[str, LoRAAdapter]:
    """Reads an adapter with llama.cpp's names of weights, joined by '/', and their orientation, `[out, in]`.

    Raises:
      ValueError: The file has no adapter, or a damaged one.
    """
    delta = {}
    for name, factors in _read(file)[1].items():
        a = factors.a.T if name == _TABLE else factors.a
        axes = (IN, OUT) if name == _TABLE else (BATCH, OUT, IN) if a.ndim == 3 else (OUT, IN)
        delta[name.replace(".", "/")] = LoRAAdapter(
            a=jnp.asarray(a),
            b=jnp.asarray(factors.b.swapaxes(-1, -2)),
            scale=jnp.float32(factors.scale),
            dropout=jnp.float32(0.0),
            axes=axes,
            blocks=(True,),
        )
    return delta


def read_torch_adapter(file: Path, model: GgufModel) -> TorchAdapter:
    """Reads an adapter in PyTorch's terms, with the names of the running model.

    Args:
      file: The file.
      model: Its base, which defines the names and how queries and keys are permuted.

    Raises:
      ValueError: The file has no adapter, a damaged one, or one of another architecture.
    """
    architecture, by_name = _read(file)
    if architecture != model.architecture:
        raise ValueError(
            f"{file}: an adapter of the architecture {architecture!r}; the base has {model.architecture!r}."
        )
    adapter = TorchAdapter()
    unknown = []
    for name, factors in by_name.items():
        weight = name.removesuffix(".weight")
        if weight.endswith("_exps") and factors.a.ndim == 3 and model.experts == len(factors.a):
            adapter.modules += _split_experts(weight, factors)
        elif weight in model.modules and factors.a.ndim == 2:
            adapter.modules.append(_to_module(weight, factors, model))
        else:
            unknown.append(f"unexpected: {name}, of factors {factors.a.shape} and {factors.b.shape}")
    if unknown:
        raise ValueError(f"{file} does not fit {model.name} {list_problems(unknown)}")
    adapter.tensors = [module.name for module in adapter.modules]
    experts.fuse(adapter, Names((), fused=_FUSED))
    return adapter


_EXPERTS = "model.layers.{layer}.block_sparse_moe.experts.{expert}"
_FUSED = tuple(
    Fused(f"model.layers.{{layer}}.mlp.experts.{parameter}", tuple(f"{_EXPERTS}.{part}.weight" for part in parts[0]))
    for parameter, parts in experts.FUSED_PARTS.items()
)


def _to_module(weight: str, factors: Factors, model: GgufModel) -> Module[np.ndarray]:
    name = f"{model.modules[weight]}.weight"
    is_table = f"{weight}.weight" == _TABLE
    kind = "embedding" if is_table else "conv1d" if model.model_type == "gpt2" and weight != "output" else "linear"
    a, b = (factors.a.T, factors.b) if is_table else (factors.a, model.to_torch_rows(weight, factors.b))
    return Module(name, kind, {"a": a, "b": b}, rank=factors.rank, scale=factors.scale)


def _split_experts(weight: str, factors: Factors) -> list[Module[np.ndarray]]:
    _, layer, stacked = weight.split(".")
    matrices = {name: matrix for matrix, name in EXPERT_MATRICES.items()}
    names = [f"{_EXPERTS.format(layer=layer, expert=i)}.{matrices[stacked]}.weight" for i in range(len(factors.a))]
    return [
        Module(name, "linear", {"a": a, "b": b}, rank=factors.rank, scale=factors.scale)
        for name, a, b in zip(names, factors.a, factors.b)
    ]


def _read(file: Path) -> tuple[str, dict[str, Factors]]:
    """Reads the architecture and the factors by weight."""
    reader = open_gguf(file)
    kinds = field(reader, "general.type", "model"), field(reader, "adapter.type")
    if kinds != ("adapter", "lora"):
        raise ValueError(
            f"{file}: a GGUF file of general.type {kinds[0]!r}, adapter.type {kinds[1]!r}; expected a LoRA adapter."
        )
    alpha = float(field(reader, "adapter.lora.alpha", 0.0))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = dict.fromkeys(name.removesuffix(part) for name in tensors for part in _PARTS if name.endswith(part))
    problems = [f"unexpected: {name}" for name in tensors if not name.endswith(_PARTS)]
    problems += [f"missing: {name}{part}" for name in names for part in _PARTS if name + part not in tensors]
    if problems or not names:
        raise ValueError(f"{file} is not a LoRA of llama.cpp {list_problems(problems or ['missing: all factors'])}")
    result = {}
    for name in names:
        a, b = (_value(file, tensors[name + part]) for part in _PARTS)
        rank = b.shape[-1]
        if a.ndim != b.ndim or a.ndim not in (2, 3) or a.shape[-1 if name == _TABLE else -2] != rank:
            problems.append(f"shape: {name} has the factors {a.shape} and {b.shape}")
        result[name] = Factors(a, b, alpha / rank if alpha else 1.0)
    if problems:
        raise ValueError(f"{file} is damaged {list_problems(problems)}")
    return str(field(reader, "general.architecture")), result


def _value(file: Path, tensor: Any) -> np.ndarray:
    value = import_gguf().quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"{file}: not finite: {tensor.name}")
    return value
