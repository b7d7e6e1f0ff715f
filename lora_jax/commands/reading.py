"""Reads the commands' inputs: adapters of this library and of PEFT, checkpoints in Hugging Face layout."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_jax import checkpoint, peft
from lora_jax.adapters.protocol import Adapter
from lora_jax.commands.fitting import fit_checkpoint
from lora_jax.commands.layout import infer_base
from lora_jax.peft import gguf
from lora_jax.peft.config import CONFIG
from lora_jax.peft.methods import method_in
from lora_jax.peft.opening import find_adapter, single_file
from lora_jax.peft.saving import write_adapter
from lora_jax.peft.tensors import (
    INDEX,
    WEIGHTS,
    Tensors,
    check_index,
    describe_missing,
    model_files,
    pickle_hint,
    read_json,
)

MODEL = "config.json"
NATIVE, PEFT, GGUF = "lora_jax", "PEFT", "GGUF"
"""The kinds of adapters."""


def adapter_directory(directory: Path, console: Console) -> Path:
    """Returns the directory of an adapter: this one, or the only one inside it, which is then printed.

    Raises:
      ValueError: There are several inside it.
    """
    if single_file(directory) is None:
        check_directory(directory)
    if (directory / checkpoint.MANIFEST).is_file():
        return directory
    adapter = find_adapter(directory)
    if adapter != directory:
        console.print(f"{directory}: the adapter in {adapter.relative_to(directory)} is read")
    return adapter


def read(directory: Path, ignore: Sequence[str] = (), otherwise: str = "give --base") -> dict[str, Adapter]:
    """Reads an adapter of this library, of PEFT or of llama.cpp; the others' have their own names and orientation.

    Args:
      directory: The adapter's directory, or a GGUF file.
      ignore: Tensors to ignore.
      otherwise: What the user can do if the adapter does not define the shapes of its weights.

    Raises:
      ValueError: The directory has no adapter, or a damaged one.
    """
    if gguf.is_gguf(directory):
        return dict(gguf.read_delta(directory))
    if is_native(directory):
        return checkpoint.load(directory)
    check_shapes(directory, otherwise)
    return peft.load(directory, *infer_base(directory, ignore), ignore=ignore)


def check_shapes(directory: Path, otherwise: str = "give --base") -> None:
    """Raises `ValueError` for an adapter of a method of PEFT that does not define the shapes of its weights."""
    if (kind := method_in(directory)) is not None:
        raise ValueError(f"{directory}: an adapter of PEFT's {kind} does not define its weights' shapes; {otherwise}.")


def load_on_checkpoint(
    directory: Path, base: Path, ignore: Sequence[str] = ()
) -> tuple[dict[str, Adapter], dict[str, tuple[str, str]]]:
    """Loads a PEFT adapter on a checkpoint.

    Returns:
      The delta, and the heads that it unties: see :class:`lora_jax.commands.fitting.Fitting`.

    Raises:
      ValueError: It is not an adapter of PEFT, is damaged, or does not fit.
    """
    with open_peft(directory, "its fit") as source, open_checkpoint(base) as tensors:
        fit = fit_checkpoint(tensors, source, model_config(base), ignore)
        return peft.load(source, fit.base, fit.names, ignore=ignore), fit.untied


@contextlib.contextmanager
def open_peft(directory: Path, task: str) -> Iterator[Path]:
    """Yields an adapter as a directory of PEFT: this one, or a temporary one for an adapter of this library.

    Args:
      directory: The adapter's directory.
      task: What needs PyTorch's names, for messages.

    Raises:
      ValueError: The adapter is of this library, and was saved without the names of its weights in PyTorch, or PEFT
        cannot represent it.
    """
    if not is_native(directory):
        yield directory
        return
    names = checkpoint.read_names(directory)
    if names is None:
        raise ValueError(
            f"{directory}: {task} needs PyTorch's names of the weights, and this adapter of lora_jax was saved without "
            "them: save it by lora_jax.save(…, names=names), or for PyTorch by lora_jax.peft.save(…, names)."
        )
    delta = checkpoint.load(directory)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / directory.name
        try:
            write_adapter(path, delta, names, "peft")
            yield path
        except ValueError as error:  # the path in messages is the user's
            raise ValueError(str(error).replace(str(path), str(directory))) from None


def has_weights(base: Path) -> bool:
    """Whether a directory has the weights of a checkpoint."""
    return (base / WEIGHTS).exists() or (base / INDEX).exists()


def is_native(directory: Path) -> bool:
    """Whether an adapter is of this library; otherwise it is of PEFT.

    Raises:
      ValueError: The directory has no adapter.
    """
    if single_file(directory) is None:
        check_directory(directory)
    if (directory / checkpoint.MANIFEST).is_file():
        return True
    if (directory / CONFIG).is_file() or single_file(directory) is not None:
        return False
    if (directory / CONFIG).is_symlink():
        raise ValueError(describe_missing(directory / CONFIG))
    raise ValueError(
        f"{directory}: not an adapter (it has neither {CONFIG} nor {checkpoint.MANIFEST}){pickle_hint(directory)}."
    )


def describe_kind(directory: Path) -> str:
    """Returns the kind of an adapter.

    Raises:
      ValueError: The path has no adapter.
    """
    return GGUF if gguf.is_gguf(directory) else NATIVE if is_native(directory) else PEFT


@contextlib.contextmanager
def open_checkpoint(base: Path) -> Iterator[Tensors]:
    """Opens the tensors of a checkpoint in Hugging Face layout.

    Raises:
      ValueError: It is not a checkpoint, or its files are damaged or inconsistent.
    """
    check_directory(base)
    with Tensors(model_files(base)) as tensors:
        check_index(tensors)
        yield tensors


def check_directory(path: Path) -> None:
    """Raises `ValueError` unless a path is a directory."""
    if not path.is_dir():
        if path.exists():
            raise ValueError(f"{path}: is a file, expected the directory that contains it.")
        if path.is_symlink():
            raise ValueError(describe_missing(path))
        raise ValueError(f"{path}: no such directory (names on a hub are not looked up).")


def model_config(base: Path) -> dict[str, Any]:
    """Reads a checkpoint's `config.json`; empty if there is none."""
    return read_json(base / MODEL) if (base / MODEL).is_file() else {}
