"""`convert`: an adapter written again for another reader."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lora_jax import peft
from lora_jax.commands import fitting_methods, layout
from lora_jax.commands.outputs import check_new
from lora_jax.commands.reading import adapter_directory, check_directory, check_peft, check_shapes, model_config, opened
from lora_jax.commands.wording import few, kinds_of
from lora_jax.io.files import replace_directory
from lora_jax.peft.config import CONFIG
from lora_jax.peft.opening import config_of
from lora_jax.peft.saving import write
from lora_jax.peft.targets import TARGETS
from lora_jax.peft.tensors import written_here

_ONE_WEIGHT = ("gguf", "mlx")
"""Readers that apply the factors of an embedding to a head that is tied to it, too."""


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
    """Writes a PEFT adapter again for another reader."""
    directory = adapter_directory(directory, progress)
    check_peft(directory, "a conversion")
    config = config_of(directory)
    if base is None:
        check_shapes(directory)
    if base is None and (names := layout.copies(directory, ignore)):
        raise ValueError(
            f"{directory}: holds {few(names)} whole, as PEFT does for embeddings; only the base tells whether it "
            "was trained: give --base."
        )
    if base:
        check_directory(base)
    owns = written_here({CONFIG})
    check_new(out, CONFIG, "adapter", owns, force, apart_from=(directory, *([base] if base else [])))
    with contextlib.ExitStack() as stack:
        if base is None:
            weights, names = layout.of_adapter(directory, ignore)
        else:
            fit = fitting_methods.of_checkpoint(
                stack.enter_context(opened(base)), directory, model_config(base), ignore
            )
            weights, names = fit.base, fit.names
            for head, (table, why) in fit.untied.items() if target in _ONE_WEIGHT else ():
                raise ValueError(
                    f"{directory}: {why}, and {TARGETS[target].reader} has one weight for {table} and {head}; merge it "
                    "into the checkpoint instead (lora-jax merge)."
                )
        delta = peft.load(directory, weights, names, ignore=ignore)
        with replace_directory(out, CONFIG, what="adapter", owns=owns) as fresh:
            write(
                fresh,
                delta,
                names,
                target,
                base_model=config.base_model_name_or_path,
                task_type=config.task_type,
                modules_to_save=config.modules_to_save,
            )
    console.print(f"{out}: {kinds_of(delta)}, written for {TARGETS[target].reader}")
