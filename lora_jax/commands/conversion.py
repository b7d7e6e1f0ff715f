"""`convert`: converts an adapter for another reader."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from lora_jax import peft
from lora_jax.adapters.protocol import Adapter
from lora_jax.commands.fitting import fit_checkpoint
from lora_jax.commands.formatting import abbreviate, format_count, summarize_kinds
from lora_jax.commands.layout import find_copies, infer_base
from lora_jax.commands.outputs import check_new, check_new_file
from lora_jax.commands.reading import (
    adapter_directory,
    check_directory,
    check_shapes,
    has_weights,
    model_config,
    open_checkpoint,
    open_peft,
)
from lora_jax.io.files import replace_directory
from lora_jax.io.read_errors import list_problems
from lora_jax.peft import gguf
from lora_jax.peft.config import CONFIG, Config
from lora_jax.peft.export import export
from lora_jax.peft.names import Names
from lora_jax.peft.opening import read_config
from lora_jax.peft.saving import drop_zero_biases, write_adapter, write_torch_adapter
from lora_jax.peft.targets import TARGETS
from lora_jax.peft.tensor_files import ownership_test

GGUF_FILE = "gguf-file"
_ONE_WEIGHT = ("gguf", GGUF_FILE, "mlx")
"""Readers that also apply the factors of an embedding to a head that is tied to it."""


def convert(
    adapter: Path,
    out: Path,
    *,
    target: str,
    base: Path | None = None,
    dtype: str | None = None,
    force: bool,
    ignore: Sequence[str] = (),
    console: Console,
    progress: Console,
) -> None:
    """Converts an adapter for another reader."""
    if dtype is not None and target != GGUF_FILE:
        raise ValueError(f"--dtype is for --target {GGUF_FILE}; the factors of other targets retain their dtypes.")
    if gguf.is_gguf(adapter):
        _convert_gguf(adapter, out, target, base, force, console)
        return
    directory = adapter_directory(adapter, progress)
    if base:
        check_base(base, target)
    with open_peft(directory, "a conversion") as source:
        config = read_config(source)
        model = _base_model(directory, config, base) if target == GGUF_FILE else None
        inputs = (directory, *([base] if base else []))
        if model is None:
            check_new(out, CONFIG, "adapter", ownership_test({CONFIG}), force, inputs=inputs)
        else:
            check_new_file(out, gguf.SUFFIX, gguf.is_adapter, "GGUF adapter", force, inputs=inputs)
        with contextlib.ExitStack() as stack:
            delta, names = _load(source, directory, base, target, ignore, stack)
            if model is None:
                _write_directory(out, delta, names, target, config)
            else:
                _write_file(out, delta, names, model, dtype or "f32", directory)
    reader = TARGETS[target].reader if model is None else "llama.cpp"
    console.print(f"{out}: {summarize_kinds(delta)}, written for {reader}")


def check_base(base: Path, target: str) -> None:
    """Raises `ValueError` unless a base may be one of a conversion."""
    if gguf.is_gguf(base):
        if target != GGUF_FILE:
            raise ValueError(
                f"{base}: expected the directory of a checkpoint; a GGUF file is for --target {GGUF_FILE}."
            )
        return
    check_directory(base)


def _base_model(directory: Path, config: Config, base: Path | None) -> gguf.GgufModel:
    """The facts of the base of a GGUF file: that of the option, or the directory that the adapter names."""
    named = config.base_model_name_or_path
    path = base or (Path(named) if named else None)
    if path is None or not path.exists():
        because = f"the adapter's base {named} is not a path here" if named else "the adapter does not name its base"
        raise ValueError(
            f"{directory}: a GGUF file depends on the base's family and heads, and {because}: give --base, a directory "
            "with its config.json, or its GGUF file."
        )
    return gguf.read_model(path)


def _load(
    source: Path,
    directory: Path,
    base: Path | None,
    target: str,
    ignore: Sequence[str],
    stack: contextlib.ExitStack,
) -> tuple[dict[str, Adapter], Names]:
    """Loads an adapter of PEFT on the base's weights, or on weights that its files define.

    Args:
      source: The directory with PEFT's files.
      directory: The directory of the argument, for messages.
      base: The base.
      target: The reader.
      ignore: Tensors to ignore.
      stack: Closes the base's files.
    """
    if base is None or gguf.is_gguf(base) or (target == GGUF_FILE and not has_weights(base)):
        check_shapes(source)
        if names := find_copies(source, ignore):
            raise ValueError(
                f"{directory}: stores {abbreviate(names)} in full, as PEFT does for embeddings; only the base shows "
                "whether it was trained: give --base, a directory with the checkpoint's weights."
            )
        weights, names = infer_base(source, ignore)
        return peft.load(source, weights, names, ignore=ignore), names
    fit = fit_checkpoint(stack.enter_context(open_checkpoint(base)), source, model_config(base), ignore)
    for head, (table, why) in fit.untied.items() if target in _ONE_WEIGHT else ():
        reader = TARGETS[target].reader if target in TARGETS else "llama.cpp"
        raise ValueError(
            f"{directory}: {why}, and {reader} has one weight for {table} and {head}; merge it into the checkpoint "
            "instead (lora-jax merge)."
        )
    return peft.load(source, fit.base, fit.names, ignore=ignore), fit.names


def _write_directory(out: Path, delta: Mapping[str, Adapter], names: Names, target: str, config: Config) -> None:
    owns = ownership_test({CONFIG})
    with replace_directory(out, CONFIG, what="adapter", owns=owns) as fresh:
        write_adapter(
            fresh,
            delta,
            names,
            target,
            base_model=config.base_model_name_or_path,
            task_type=config.task_type,
            modules_to_save=config.modules_to_save,
        )


def _write_file(
    out: Path, delta: Mapping[str, Adapter], names: Names, model: gguf.GgufModel, dtype: str, source: Path
) -> None:
    adapter = export(delta, names.with_file_names())
    drop_zero_biases(adapter)
    if problems := gguf.describe_unsupported(adapter, model):
        raise ValueError(f"The adapter cannot be written for llama.cpp {list_problems(problems)}")
    gguf.write_file(out, adapter, model, dtype=dtype, source=source if source.is_dir() else source.parent)


def _convert_gguf(file: Path, out: Path, target: str, base: Path | None, force: bool, console: Console) -> None:
    """Converts the adapter in a GGUF file."""
    if target == GGUF_FILE:
        raise ValueError(f"{file}: is a GGUF file already.")
    if base is None:
        raise ValueError(
            f"{file}: a GGUF file does not have the base's heads, by which llama.cpp permutes queries and keys: give "
            "--base, a directory with its config.json, or its GGUF file."
        )
    model = gguf.read_model(base)
    adapter = gguf.read_torch_adapter(file, model)
    owns = ownership_test({CONFIG})
    check_new(out, CONFIG, "adapter", owns, force, inputs=(file, base))
    with replace_directory(out, CONFIG, what="adapter", owns=owns) as fresh:
        write_torch_adapter(fresh, adapter, target, task_type="CAUSAL_LM")
    console.print(f"{out}: {format_count(len(adapter.modules), 'LoRA module')}, written for {TARGETS[target].reader}")
