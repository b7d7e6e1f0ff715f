"""The package `gguf`, which is optional, and files that it opens."""

from pathlib import Path
from types import ModuleType
from typing import Any


def import_gguf() -> ModuleType:
    """Returns the package `gguf`.

    Raises:
      ValueError: It is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need the package gguf: pip install 'lora-jax[gguf]'.") from None
    return gguf


def open_gguf(file: Path) -> Any:
    """Opens a GGUF file with `gguf.GGUFReader`.

    Raises:
      ValueError: It is not a GGUF file, or is damaged.
      OSError: It cannot be read.
    """
    reader = import_gguf().GGUFReader
    try:
        return reader(file)
    except (ValueError, LookupError, OverflowError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a GGUF file, or damaged ({error}).") from None


def load_metadata(directory: Path | None, parameters: int) -> Any:
    """Returns the `gguf.Metadata` that the name of a directory, its model card and its config define.

    Args:
      directory: The directory; None for empty metadata.
      parameters: The number of parameters, negative for an adapter.

    Raises:
      ValueError: The model card is damaged.
    """
    gguf = import_gguf()
    import yaml  # a dependency of gguf

    try:
        return gguf.Metadata.load(None, directory, None, parameters)
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{directory}: the metadata in README.md is not YAML ({reason}).") from None


def field(reader: Any, key: str, default: Any = None) -> Any:
    """Returns the value of a field of an open file, or the default if it has none."""
    entry = reader.get_field(key)
    return default if entry is None else entry.contents()


def is_adapter(file: Path) -> bool:
    """Whether a file is a GGUF file of an adapter."""
    try:
        return field(open_gguf(file), "general.type") == "adapter"
    except ValueError:
        return False
