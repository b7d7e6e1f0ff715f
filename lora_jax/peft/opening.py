"""Opens adapters of PEFT, kohya's scripts, diffusers and mlx-lm: their config and tensors in PEFT's terms."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora_jax.peft import foreign
from lora_jax.peft.adapter_tensors import AdapterTensors
from lora_jax.peft.config import CONFIG, Config
from lora_jax.peft.keys import ADAPTER
from lora_jax.peft.tensors import Tensors, describe_missing, pickle_hint, read_json

SUFFIX = ".safetensors"
_LISTED = 8


def find_adapter(directory: Path) -> Path:
    """Returns the directory of an adapter: this one, or the only one inside it (`default/`, `checkpoint-500/`).

    Raises:
      ValueError: There are several inside it.
    """
    if (directory / CONFIG).exists() or (directory / CONFIG).is_symlink() or single_file(directory):
        return directory
    inside = sorted(path.parent for path in directory.glob(f"*/{CONFIG}"))
    inside = inside or sorted(path.parent for path in directory.glob(f"*/*/{CONFIG}"))
    if len(inside) > 1:
        listed = ", ".join(str(path.relative_to(directory)) for path in inside[:_LISTED])
        more = f" and {len(inside) - _LISTED} more" if len(inside) > _LISTED else ""
        raise ValueError(f"{directory}: holds {len(inside)} adapters ({listed}{more}); name one of them.")
    return inside[0] if inside else directory


@contextlib.contextmanager
def open_adapter(
    path: Path, ignore: Sequence[str] = (), base_modules: Iterable[str] = ()
) -> Iterator[tuple[Config, AdapterTensors]]:
    """Opens the config and the tensors of an adapter of LoRA.

    Args:
      path: A directory that PEFT or mlx-lm wrote; or a safetensors file of kohya's scripts or diffusers, or a directory
        with a single one.
      ignore: Tensors to ignore; see :class:`Tensors`.
      base_modules: The names of the base's modules, which resolve underscores in kohya's names and the names of
        mlx-lm's experts.

    Raises:
      ValueError: The path has another content, or is damaged.
    """
    if (file := single_file(path)) is not None:
        with Tensors([file], ignore) as tensors:
            adapter = foreign.convert_file(tensors, _metadata(file), base_modules)
            if adapter is None and (file.parent / CONFIG).is_file():
                raise ValueError(f"{file}: is one file of the adapter in {file.parent}; pass that directory.")
            if adapter is None:
                raise ValueError(
                    f"{file}: not a LoRA of kohya's scripts or diffusers, and its directory has no {CONFIG}."
                )
            yield adapter
        return
    if is_mlx(path):
        if not (path / foreign.MLX).is_file():
            raise ValueError(f"{describe_missing(path / foreign.MLX)}")
        with Tensors([path / foreign.MLX], ignore) as tensors:
            yield foreign.convert_mlx(tensors, read_json(path / CONFIG), base_modules)
        return
    config = Config.read(path)
    with adapter_files(path, ignore) as tensors:
        yield config, AdapterTensors(tensors)


def read_config(path: Path) -> Config:
    """The config of an adapter of LoRA, as :func:`open_adapter` gives it."""
    with open_adapter(path) as (config, _):
        return config


def adapter_files(directory: Path, ignore: Sequence[str] = ()) -> Tensors:
    """Returns the tensors in the files of a PEFT adapter, to be opened.

    Args:
      directory: The adapter's directory.
      ignore: Tensors to ignore; see :class:`Tensors`.

    Raises:
      ValueError: It has no safetensors file.
    """
    if not (directory / ADAPTER).is_file():
        raise ValueError(f"{describe_missing(directory / ADAPTER).removesuffix('.')}{pickle_hint(directory)}.")
    return Tensors([directory / ADAPTER], ignore)


def single_file(path: Path) -> Path | None:
    """Returns the file that is a complete adapter: this one, or the only one of a directory without config."""
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    if not path.is_dir() or (path / CONFIG).exists() or (path / CONFIG).is_symlink():
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    return files[0] if len(files) == 1 and files[0].name != ADAPTER else None


def is_mlx(path: Path) -> bool:
    """Whether a directory is an adapter of mlx-lm, whose config has PEFT's file name and other fields."""
    if not (path / CONFIG).is_file():
        return False
    content = read_json(path / CONFIG)
    return "peft_type" not in content and ("lora_parameters" in content or "fine_tune_type" in content)


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "np") as reader:
            return reader.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged ({error}).") from None
