"""Saves deltas as adapters for PEFT and for other readers of its format."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax import checks
from lora_jax.adapters.consistency import check_adapters
from lora_jax.adapters.fingerprints import needs_moved_base
from lora_jax.adapters.protocol import Adapter
from lora_jax.io.read_errors import list_problems
from lora_jax.peft import experts
from lora_jax.peft.arrays import replace_tensors
from lora_jax.peft.export import export
from lora_jax.peft.methods import method_of, save_method
from lora_jax.peft.modules_to_save import complete
from lora_jax.peft.names import Names, check_names
from lora_jax.peft.targets import TARGETS
from lora_jax.peft.torch_adapter import TorchAdapter


def save(
    directory: str | os.PathLike,
    delta: Mapping[str, Adapter],
    names: Names,
    *,
    target: str = "peft",
    base: Any = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Saves a delta as an adapter for PyTorch.

    Args:
      directory: The output. An existing adapter is replaced when the new one is complete.
      delta: Adapters that are all of one method of PEFT, and leaves trained in full (`Full`). LoRA, DoRA, Offset and
        Rows are PEFT's LoRA. AdaLoRA, VeRA, LoHa, LoKr, IA3, HiRA, MiSS and OFT, Rows alone and trained norms alone are
        its methods of these names (target 'peft' only). Low-rank adapters of several methods, for other targets, or
        that their method cannot represent (VeRA whose pairs differ by the weight's size), are saved as the LoRA that
        they equal.
      names: The names of the leaves in PyTorch.
      target: The reader: 'peft'; 'vllm' and 'gguf' (llama.cpp's converter), which support PEFT's format in part, so
        that uneven scales are folded into B; or 'mlx' (mlx-lm), with its own files.
      base: The parameters. PEFT saves some modules in full (a norm's scale with its bias, the biases of all layers, the
        classification head of a `task_type`). If the delta trains them in part, the rest is taken from the base.
      base_model: The name or path of the base, for the reader's information.
      task_type: PEFT's name of the kind of model ('CAUSAL_LM', 'SEQ_CLS'), by which its Auto classes choose.

    Raises:
      ValueError: The target cannot represent the delta: the message lists everything, and nothing is written. Or the
        delta comes from :func:`lora_jax.prepare`, which changed the base: :func:`lora_jax.to_plain_lora` converts it to
        one for the original base.
      FileExistsError: The directory exists and is not an adapter.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, tempfile
      >>> base = {"up": {"kernel": jnp.ones((4, 6))}}
      >>> delta = lora.init(jax.random.key(0), base, {"up": lora.LoRA(2, alpha=4, axes=("in", "out"))})
      >>> names = lora.peft.Names((lora.peft.Weight("up/kernel", "mlp.up_proj.weight", lora.peft.LINEAR),))
      >>> lora.peft.save(tempfile.mkdtemp(), delta, names, target="vllm")
      vLLM needs max_lora_rank of at least 8 for this adapter of rank 2.
    """
    if target not in TARGETS:
        more = " lora-jax convert --target gguf-file makes the file of a directory." if target == "gguf-file" else ""
        raise ValueError(f"target={target!r}; expected one of {', '.join(map(repr, TARGETS))}.{more}")
    check_adapters(delta)
    checks.path("lora.peft.save(directory, delta, names)", directory)
    check_names("lora.peft.save(directory, delta, names)", names)
    if not delta:
        raise ValueError("There is nothing to save: the delta is empty.")
    write_adapter(Path(directory), delta, names, target, base=base, base_model=base_model, task_type=task_type)


def write_adapter(
    directory: Path,
    delta: Mapping[str, Adapter],
    names: Names,
    target: str,
    *,
    base: Any = None,
    base_model: str | None = None,
    task_type: str | None = None,
    modules_to_save: Sequence[str] = (),
) -> None:
    """Implements :func:`save`, for an adapter whose config may name `modules_to_save`."""
    if prepared := [path for path, node in delta.items() if needs_moved_base(node)]:
        raise ValueError(
            f"{prepared[0]!r} ({len(prepared)} such paths): the adapter needs the base that lora_jax.prepare changed, "
            "and no reader of this file has it. lora_jax.to_plain_lora(delta, start) makes an adapter for the original "
            "weights, which can be saved."
        )
    if target == "peft" and (kind := method_of(delta, names)) is not None:
        save_method(directory, kind, delta, names, base=base, base_model=base_model, task_type=task_type)
        return
    if target != "peft":  # the other readers have the names of checkpoint files, PEFT those of the running model
        names = names.with_file_names()
    adapter = export(delta, names)
    experts.fuse(adapter, names)
    complete(adapter, names, base, task_type if target == "peft" else None, modules_to_save)
    write_torch_adapter(directory, adapter, target, base_model=base_model, task_type=task_type)


def write_torch_adapter(
    directory: Path,
    adapter: TorchAdapter,
    target: str,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes an adapter in PyTorch's terms; raises `ValueError` for everything that the reader does not support."""
    if target != "peft":
        drop_zero_biases(adapter)
    problems = [*adapter.problems, *TARGETS[target].refuse(adapter)]
    if problems:
        raise ValueError(f"The delta cannot be written for {TARGETS[target].reader} {list_problems(problems)}")
    TARGETS[target].write(directory, adapter, base_model, task_type)


def drop_zero_biases(adapter: TorchAdapter) -> None:
    """Removes the biases on B if all of them are zero: PEFT has them on all modules or on none."""
    if not any("b_bias" in module.tensors and module.tensors["b_bias"].any() for module in adapter.modules):
        adapter.modules = [replace_tensors(module, b_bias=None) for module in adapter.modules]
