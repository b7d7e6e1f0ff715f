"""`convert`: converts an adapter for another reader."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lora_jax import peft
from lora_jax.commands.fitting import fit_checkpoint
from lora_jax.commands.formatting import abbreviate, summarize_kinds
from lora_jax.commands.layout import find_copies, infer_base
from lora_jax.commands.outputs import check_new
from lora_jax.commands.reading import (
    adapter_directory,
    check_directory,
    check_peft,
    check_shapes,
    model_config,
    open_checkpoint,
)
from lora_jax.io.files import replace_directory
from lora_jax.peft.config import CONFIG
from lora_jax.peft.opening import read_config
from lora_jax.peft.saving import write_adapter
from lora_jax.peft.targets import TARGETS
from lora_jax.peft.tensor_files import ownership_test

_ONE_WEIGHT = ("gguf", "mlx")
"""Readers that also apply the factors of an embedding to a head that is tied to it."""


def convert(
    directory: Path,
    out: Path,
    *,
    target: str,
    base: Path | None = None,
    force: bool,
    ignore: Sequence[str] = (),
    console: Console,
    progress: Console,
) -> None:
    """Converts a PEFT adapter for another reader."""
    directory = adapter_directory(directory, progress)
    check_peft(directory, "a conversion")
    config = read_config(directory)
    if base is None:
        check_shapes(directory)
    if base is None and (names := find_copies(directory, ignore)):
        raise ValueError(
            f"{directory}: stores {abbreviate(names)} in full, as PEFT does for embeddings; only the base shows "
            "whether it was trained: give --base."
        )
    if base:
        check_directory(base)
    owns = ownership_test({CONFIG})
    check_new(out, CONFIG, "adapter", owns, force, inputs=(directory, *([base] if base else [])))
    with contextlib.ExitStack() as stack:
        if base is None:
            weights, names = infer_base(directory, ignore)
        else:
            fit = fit_checkpoint(stack.enter_context(open_checkpoint(base)), directory, model_config(base), ignore)
            weights, names = fit.base, fit.names
            for head, (table, why) in fit.untied.items() if target in _ONE_WEIGHT else ():
                raise ValueError(
                    f"{directory}: {why}, and {TARGETS[target].reader} has one weight for {table} and {head}; merge it "
                    "into the checkpoint instead (lora-jax merge)."
                )
        delta = peft.load(directory, weights, names, ignore=ignore)
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
    console.print(f"{out}: {summarize_kinds(delta)}, written for {TARGETS[target].reader}")
