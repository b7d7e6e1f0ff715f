"""What the commands read: adapters of this library and of PEFT, checkpoints in Hugging Face layout."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_jax import checkpoint, peft
from lora_jax.adapters.protocol import Adapter
from lora_jax.commands import fitting_methods, layout
from lora_jax.peft.config import CONFIG
from lora_jax.peft.opening import find_adapter, single_file
from lora_jax.peft.tensors import (
    Tensors,
    absent,
    check_index,
    model_files,
    pickle_beside,
    read_json,
)

MODEL = "config.json"


def adapter_directory(directory: Path, console: Console) -> Path:
    """The directory of an adapter, which may be the only one inside of what is given; a line says so.

    Raises:
      ValueError: There are several inside.
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
    """The delta in a directory, of this library or of PEFT; PEFT's is given PyTorch's names and orientation.

    Args:
      directory: The adapter's.
      ignore: Tensors that are passed over.
      otherwise: What the user can do where an adapter alone does not tell the shapes of its weights.

    Raises:
      ValueError: It is neither, or is damaged.
    """
    if is_native(directory):
        return checkpoint.load(directory)
    check_shapes(directory, otherwise)
    return peft.load(directory, *layout.of_adapter(directory, ignore), ignore=ignore)


def check_shapes(directory: Path, otherwise: str = "give --base") -> None:
    """Raises `ValueError` for an adapter of a method of PEFT that does not tell the shapes of its weights."""
    if (kind := fitting_methods.method_in(directory)) is not None:
        raise ValueError(f"{directory}: an adapter of PEFT's {kind} does not tell its weights' shapes; {otherwise}.")


def fitted(
    directory: Path, base: Path, ignore: Sequence[str] = ()
) -> tuple[dict[str, Adapter], dict[str, tuple[str, str]]]:
    """The delta of a PEFT adapter on a checkpoint.

    Returns:
      The delta, and the heads that it unties: see :class:`lora_jax.commands.fitting.Fitting`.

    Raises:
      ValueError: It is no adapter of PEFT, is damaged, or does not fit.
    """
    check_peft(directory, "its fit")
    with opened(base) as tensors:
        fit = fitting_methods.of_checkpoint(tensors, directory, model_config(base), ignore)
        return peft.load(directory, fit.base, fit.names, ignore=ignore), fit.untied


def check_peft(directory: Path, task: str) -> None:
    """Raises `ValueError` unless an adapter is of PEFT."""
    if is_native(directory):
        raise ValueError(
            f"{directory}: {task} takes a PEFT adapter; this one of lora_jax has the paths of a JAX model, and "
            "lora_jax.peft.save(…, names) writes it for PyTorch."
        )


def is_native(directory: Path) -> bool:
    """Whether an adapter is of this library; otherwise it is of PEFT.

    Raises:
      ValueError: It is neither.
    """
    if single_file(directory) is None:
        check_directory(directory)
    if (directory / checkpoint.MANIFEST).is_file():
        return True
    if (directory / CONFIG).is_file() or single_file(directory) is not None:
        return False
    if (directory / CONFIG).is_symlink():
        raise ValueError(absent(directory / CONFIG))
    raise ValueError(
        f"{directory}: no adapter (it has neither {CONFIG} nor {checkpoint.MANIFEST}){pickle_beside(directory)}."
    )


@contextlib.contextmanager
def opened(base: Path) -> Iterator[Tensors]:
    """The tensors of a checkpoint in Hugging Face layout.

    Raises:
      ValueError: It is none, or its files are damaged or do not go together.
    """
    check_directory(base)
    with Tensors(model_files(base)) as tensors:
        check_index(tensors)
        yield tensors


def check_directory(path: Path) -> None:
    if not path.is_dir():
        if path.exists():
            raise ValueError(f"{path}: is a file, expected the directory that it is in.")
        if path.is_symlink():
            raise ValueError(absent(path))
        raise ValueError(f"{path}: no such directory (names on a hub are not looked up).")


def model_config(base: Path) -> dict[str, Any]:
    return read_json(base / MODEL) if (base / MODEL).is_file() else {}
