"""Tensors in safetensors files: read lazily, a slice at a time, and written in shards."""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_jax.io.read_errors import reading

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes, as safetensors spells them, whose numbers are the tensor's values; others are quantized or integers."""

WRITTEN_BY = {"written_by": "lora_jax"}
"""In the metadata of the files that this library writes; only these are replaced."""

_CHUNK = 16 * 2**20


class Tensors(Mapping[str, tuple[int, ...]]):
    """The names and shapes of the tensors in some safetensors files, whose values are read when asked for.

    A context manager: the files are open inside its `with` block.

    Args:
      files: One or more safetensors files with distinct names of tensors.
      ignore: Beginnings of names, or of parts of names between dots, of tensors that are passed over.

    Raises:
      ValueError: A file is missing, truncated or damaged, or two files hold the same name.

    Example:
      >>> import numpy as np, pathlib, tempfile
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> write(file, {"w": np.arange(6.0).reshape(2, 3)})
      >>> with Tensors([file]) as tensors:
      ...     tensors["w"], tensors.read("w", (slice(0, 1), slice(2, 3)))
      ((2, 3), array([[2.]]))
    """

    def __init__(self, files: Iterable[Path], ignore: Sequence[str] = ()):
        self.files = tuple(files)
        self._ignore = tuple(f".{beginning}" for beginning in ignore)
        self._opened = contextlib.ExitStack()
        self._where: dict[str, Any] = {}

    def __enter__(self) -> "Tensors":
        with contextlib.ExitStack() as opened:
            for path in self.files:
                file = opened.enter_context(_open(path))
                names = [name for name in list(file.keys()) if not self.ignores(name)]
                if twice := sorted(self._where.keys() & names):
                    raise ValueError(f"{path}: {twice[0]!r} is in another file of the same model too.")
                self._where |= dict.fromkeys(names, (path, file))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._where = {}
        self._opened.close()

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name is passed over."""
        return any(beginning in f".{name}" for beginning in self._ignore)

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or a part of it, as a NumPy array (bfloat16 through ml_dtypes).

        Raises:
          ValueError: Its dtype is none that NumPy and JAX have in common.
        """
        stored = self._slice(name)
        try:
            if part is None or 0 in stored.get_shape():  # what is empty cannot be sliced
                whole = self._where[name][1].get_tensor(name)
                return whole if part is None else whole[part]
            return stored[part]
        except (SafetensorError, AttributeError, TypeError) as error:
            why = "FP8 is not supported yet" if stored.get_dtype().startswith("F8") else error
            raise ValueError(
                f"{self._where[name][0]}: {name!r} of dtype {stored.get_dtype()} cannot be read: {why}."
            ) from error

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._where[name][0]

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors spells it ('F32', 'BF16')."""
        return self._slice(name).get_dtype()

    def bytes(self, name: str) -> int:
        """The size of a tensor in its file."""
        return math.prod(self[name]) * _bits(self.dtype(name)) // 8

    def _slice(self, name: str) -> Any:
        return self._where[name][1].get_slice(name)


def _bits(dtype: str) -> int:
    """The size of a number, from the dtype's name as safetensors spells it ('BF16', 'F8_E4M3')."""
    return 8 if dtype == "BOOL" else int(re.sub(r"_.*|[A-Z]", "", dtype))


def model_files(directory: str | os.PathLike) -> list[Path]:
    """The safetensors files of a model in Hugging Face layout: one, or the shards that its index lists.

    Raises:
      ValueError: There is neither, or a listed shard is missing or outside the directory.
    """
    directory = Path(directory)
    if (whole := directory / WEIGHTS).is_file():
        return [whole]
    index = directory / INDEX
    if circular := [file for file in (whole, index) if file.is_symlink() and not file.exists()]:
        raise ValueError(absent(circular[0]))
    if not index.is_file():
        raise ValueError(f"{directory}: no {WEIGHTS} and no {INDEX}{pickle_beside(directory)}.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: expected an object 'weight_map' from tensors to files.")
    names = sorted(set(weight_map.values()))
    if not names:
        raise ValueError(f"{index}: its 'weight_map' names no tensor.")
    if outside := [name for name in names if Path(name).name != name or name == ".."]:
        raise ValueError(f"{index}: {outside[0]!r} is no file of this directory.")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise ValueError(f"{directory}: {len(missing)} of {len(names)} shards missing: {', '.join(missing[:3])}.")
    return [directory / name for name in names]


def check_index(tensors: Tensors) -> None:
    """Raises `ValueError` unless the index beside some shards lists just what is in them."""
    index = tensors.files[0].with_name(INDEX)
    if tensors.files[0].name == WEIGHTS or not index.is_file():
        return
    listed = read_json(index)["weight_map"]
    wrong = [name for name in sorted({*listed, *tensors}) if listed.get(name) != _file_name(tensors, name)]
    if wrong:
        where = _file_name(tensors, wrong[0]) or "in no shard"
        raise ValueError(
            f"{index}: {wrong[0]!r} should be in {listed.get(wrong[0])}, and is {where} ({len(wrong)} such tensors)."
        )


def _file_name(tensors: Tensors, name: str) -> str | None:
    return tensors.file_of(name).name if name in tensors else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ValueError: There is no such file, or it is not a JSON object.
    """
    if not path.is_file():
        raise ValueError(absent(path))
    with reading(path, "JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, not {type(content).__name__}.")
    return content


def write(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file; `format: pt` is what PyTorch's readers want.

    Raises:
      OSError: It cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    try:
        save_file(contiguous, file, metadata={"format": "pt", **WRITTEN_BY, **(metadata or {})})
    except SafetensorError as error:  # the disk is full, for one
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(*((int(code[1]), os.strerror(int(code[1]))) if code else (str(error),))) from error
    _sort_metadata(file)


def _sort_metadata(file: Path) -> None:
    """Puts the metadata of a safetensors file in order: the library writes them in one that changes with the run."""
    begin = b'"__metadata__":'
    with open(file, "r+b") as opened:
        header = opened.read(int.from_bytes(opened.read(8), "little"))
        start = header.index(begin) + len(begin)
        rest = header[start:].decode()
        metadata, end = json.JSONDecoder().raw_decode(rest)
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) == len(rest[:end].encode()):
            opened.seek(8 + start)
            opened.write(text)


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[str], np.ndarray | None],
    advance: Callable[[int], None] = lambda size: None,
    added: Mapping[str, str] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Copies a safetensors file, tensor by tensor, with the values of some of them changed.

    What is not changed is copied as bytes, whatever its dtype, and no more than one tensor is in memory.

    Args:
      source: A file that :class:`Tensors` opens.
      target: The new file.
      change: The new value of a tensor, of its dtype; None to leave it.
      advance: Called with the number of bytes that have been written since the last call.
      added: New tensors behind the others, by name; each starts as a copy of the one that is named with it.
      metadata: Added to what the source has.
      shapes: Of tensors whose new values have others.

    Raises:
      OSError: A file cannot be read or written.
    """
    with open(source, "rb") as old, open(target, "wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        start = old.tell()
        everything = {"format": "pt", **header.pop("__metadata__", {}), **(metadata or {})}
        copies = sorted(((name, name, entry) for name, entry in header.items()), key=lambda x: x[2]["data_offsets"])
        copies += [(name, like, header[like]) for name, like in (added or {}).items()]
        written, end = {}, 0
        for name, _, entry in copies:
            first, last = entry["data_offsets"]
            shape, size = tuple(entry["shape"]), last - first
            if shapes is not None and name in shapes:
                shape, size = shapes[name], size * math.prod(shapes[name]) // math.prod(shape)
            written[name] = entry | {"shape": list(shape), "data_offsets": [end, end := end + size]}
        fields = {"__metadata__": everything, **written}
        content = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        content += b" " * (-len(content) % 8)
        new.write(len(content).to_bytes(8, "little") + content)
        for name, source_name, entry in copies:
            begin, end = entry["data_offsets"]
            value = change(name)
            if value is not None:
                data = np.ascontiguousarray(value).tobytes()
                first, last = written[name]["data_offsets"]
                if len(data) != last - first:
                    raise ValueError(f"{name!r}: {len(data)} bytes in the place of {last - first}.")
                new.write(data)
                advance(len(data))
                continue
            old.seek(start + begin)
            while begin < end:
                data = old.read(min(_CHUNK, end - begin))
                if not data:
                    raise OSError(f"{source}: ended while {source_name!r} was read.")
                new.write(data)
                advance(len(data))
                begin += len(data)


def write_model(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes a model's tensors in Hugging Face layout: one file, or shards and their index.

    Args:
      directory: An existing directory.
      tensors: Taken one at a time; no more than a shard is in memory.
      shard_bytes: The largest size of a file, unless one tensor alone is larger.

    Returns:
      The safetensors files.
    """
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        write(_shard(directory, len(shards) + 1, 0), shard)
        shards.append(list(shard))
        shard.clear()

    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = array
        size += array.nbytes
        total += array.nbytes
    flush()
    if len(shards) == 1:
        return [_shard(directory, 1, 0).rename(directory / WEIGHTS)]
    count = len(shards)
    files = [_shard(directory, i + 1, 0).rename(_shard(directory, i + 1, count)) for i in range(count)]
    weight_map = {name: file.name for file, names in zip(files, shards) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def written_here(names: Collection[str]) -> Callable[[Path], bool]:
    """Tells which files of a directory this library wrote: marked safetensors files, and these names beside them."""

    def owns(entry: Path) -> bool:
        if entry.suffix == ".safetensors":
            return _is_marked(entry)
        return entry.name in names and any(map(_is_marked, entry.parent.glob("*.safetensors")))

    return owns


def _is_marked(file: Path) -> bool:
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError):
        return False
    return metadata.items() >= WRITTEN_BY.items()


def _shard(directory: Path, number: int, count: int) -> Path:
    return directory / f"model-{number:05}-of-{count:05}.safetensors"


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(absent(path))
    with reading(path, "safetensors"):
        return safe_open(path, framework="numpy")


def absent(path: Path) -> str:
    """What to say of a file that is not there, or not a file."""
    if path.is_symlink() and not path.exists():
        return f"{path}: a link that leads nowhere, or in a circle."
    return f"{path}: is no file." if path.exists() else f"{path}: no such file."


def pickle_beside(directory: Path) -> str:
    """The end of an error message, where there are weights as pickles."""
    pickles = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt")) + sorted(directory.glob("*.pth"))
    return f"; {pickles[0].name} is a pickle, which can run code: convert it to safetensors first" if pickles else ""
