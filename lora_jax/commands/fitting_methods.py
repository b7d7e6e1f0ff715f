"""A checkpoint's tensors as leaves for an adapter of any method of PEFT."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.commands import fitting
from lora_jax.commands.fitting import CONV1D_MODELS, Fitting, prefix_of
from lora_jax.commands.layout import Kind, Stored, leaf_path, table_of
from lora_jax.peft import keys
from lora_jax.peft.config import CONFIG
from lora_jax.peft.loading import OTHER_METHODS
from lora_jax.peft.methods.loading import NORMS, modules_of
from lora_jax.peft.methods.table import METHODS
from lora_jax.peft.opening import adapter_tensors
from lora_jax.peft.tensors import Tensors, read_json


def of_checkpoint(
    checkpoint: Tensors, directory: Path, model: Mapping[str, Any] | None = None, ignore: Sequence[str] = ()
) -> Fitting:
    """What :func:`lora_jax.commands.fitting.of_checkpoint` does, of other methods than LoRA too."""
    kind = method_in(directory)
    if kind is None:
        return fitting.of_checkpoint(checkpoint, directory, model, ignore)
    with adapter_tensors(directory, ignore) as tensors:
        modules = {key.removeprefix(keys.PREFIX).rpartition(".")[0] for key in tensors if key.startswith(keys.PREFIX)}
        if kind in METHODS:
            adapted = set(modules_of(tensors, METHODS[kind].parts))
        else:
            adapted = {key.removeprefix(keys.PREFIX).partition(NORMS)[0] for key in tensors if NORMS in key}
    shapes = {name: checkpoint[name] for name in checkpoint}
    prefix = prefix_of({keys.split_name(name)[0] for name in shapes}, adapted | modules)
    matrix: Kind = "conv1d" if (model or {}).get("model_type") in CONV1D_MODELS else "linear"
    kinds: dict[str, Kind] = {}
    for module in adapted:
        name = next((n for n in (f"{module}.weight", f"{prefix}{module}.weight") if n in shapes), None)
        name = name or f"{module.removeprefix(prefix)}.weight"
        if name in shapes and len(shapes[name]) > 1:
            kinds[name] = matrix if len(shapes[name]) == 2 else "conv"
    base = {leaf_path(name): Stored(shape, lambda name=name: checkpoint.read(name)) for name, shape in shapes.items()}
    return Fitting(base, table_of(shapes, kinds, {}, prefix), {})


def method_in(directory: Path) -> str | None:
    """The `peft_type` of an adapter of another method than LoRA."""
    if not (directory / CONFIG).is_file():
        return None
    kind = str(read_json(directory / CONFIG).get("peft_type"))
    return kind if kind in OTHER_METHODS else None
