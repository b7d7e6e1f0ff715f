"""Opens GGUF files, and lists everything that is wrong with one before its tensors are read."""

import functools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from experiments.errors import UserError
from lora_jax.io import shorten

_MAGIC, _HEADER = b"GGUF", 24  # the header: magic, version, number of tensors, number of fields
_FLOATS: dict[gguf.GGMLQuantizationType, np.dtype] = {
    gguf.GGMLQuantizationType.F64: np.dtype(np.float64),
    gguf.GGMLQuantizationType.F32: np.dtype(np.float32),
    gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
    gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_LISTED = 12  # the maximum number of problems in an error


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a GGUF file.

    Attributes:
      name: Its name.
      file: The file that holds it.
      kind: The type of its numbers or codes.
      shape: Its shape, the slowest axis first.
      data: The stored numbers, with this shape; or `uint8[*shape[:-1], bytes]`, the blocks of codes of each row.
    """

    name: str
    file: Path
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray

    def dequantize(self, rows: np.ndarray) -> np.ndarray:
        """Returns the numbers that some of the rows of `data` hold: stored floats as they are, others in float32."""
        if self.kind in _FLOATS:
            return rows
        if not rows.size:
            return np.zeros((*rows.shape[:-1], self.shape[-1]), np.float32)
        return gguf.quants.dequantize(rows, self.kind)


@dataclass(frozen=True)
class Content:
    """The fields and tensors of a GGUF file, or of the parts into which a model is split.

    Attributes:
      path: The first file, for error messages.
      files: All files.
      fields: The values of the fields by name.
      tensors: The tensors by name.
    """

    path: Path
    files: tuple[Path, ...]
    fields: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


class _Reader(gguf.GGUFReader):
    """A reader that never reads beyond the file's end, and collects what is wrong with the tensors."""

    def __init__(self, path: Path):
        self.path, self.problems, self.stored = path, [], {}
        super().__init__(path)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"the file ends at byte {len(self.data):,}, within its header")
        return super()._get(offset, dtype, count, override_order)

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        for field in fields:
            _, name_bytes, _, dimensions, code, offset = field.parts
            name = str(bytes(name_bytes), encoding="utf-8")
            try:
                kind = gguf.GGMLQuantizationType(int(code[0]))
            except ValueError:
                self.problems.append(f"{name}: unknown type {int(code[0])}")
                continue
            shape = tuple(int(size) for size in reversed(dimensions))
            block, size = gguf.GGML_QUANT_SIZES[kind]
            count, start = math.prod(shape), int(start_offs) + int(offset[0])
            stored_bytes = count // block * size
            if name in self.stored:
                self.problems.append(f"{name}: stored twice")
            elif not shape or shape[-1] % block:
                self.problems.append(f"{name}: shape {shape}, expected rows of whole blocks of {block} for {kind.name}")
            elif not _is_readable(kind):
                self.problems.append(f"{name}: type {kind.name} cannot be dequantized")
            elif start + stored_bytes > len(self.data):
                missing = start + stored_bytes - len(self.data)
                self.problems.append(
                    f"{name}: {min(missing, stored_bytes):,} of its {stored_bytes:,} bytes are missing"
                )
            else:
                data = np.asarray(self.data[start : start + stored_bytes])
                dtype, row = _FLOATS.get(kind, np.dtype(np.uint8)), shape[-1] // block * size
                data = data.view(dtype).reshape(*shape[:-1], row // dtype.itemsize)
                self.stored[name] = StoredTensor(name, self.path, kind, shape, data)


@functools.cache
def _is_readable(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether tensors of a type are floats, or the `gguf` package dequantizes them."""
    if kind in _FLOATS:
        return True
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def read(path: Path) -> Content:
    """Reads the fields of a GGUF file and where its tensors are. Tensors are mapped into memory, and read on use.

    Raises:
      UserError: The file is not GGUF, is truncated, or has another version or byte order, or its tensors have unknown
        types; the error lists everything wrong.
    """
    _check_header(path)
    try:
        reader = _Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: truncated or damaged ({shorten(str(error))})") from None
    raise_problems(path, reader.problems)
    return Content(path, (path,), fields, reader.stored)


def raise_problems(path: Path, problems: list[str]) -> None:
    """Raises a UserError that lists problems of a file, if there are any."""
    if problems:
        more = [f"… and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        listed = "\n  ".join([*problems[:_LISTED], *more])
        raise UserError(f"{path}: cannot be used ({len(problems)} problems):\n  {listed}")


def _check_header(path: Path) -> None:
    """Raises a UserError unless a file begins like a GGUF file of a known version in this machine's byte order."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if header[:4] != _MAGIC:
        raise UserError(f"{path}: not a GGUF file, which begins with the bytes {_MAGIC.decode()}")
    if len(header) < _HEADER:
        raise UserError(f"{path}: truncated, it has only {len(header)} bytes")
    supported = gguf.gguf_reader.READER_SUPPORTED_VERSIONS
    version = int.from_bytes(header[4:8], sys.byteorder)
    if version in supported:
        return
    other = int.from_bytes(header[4:8], "big" if sys.byteorder == "little" else "little")
    if other in supported:
        order = "big" if sys.byteorder == "little" else "little"
        raise UserError(f"{path}: {order}-endian, convert it with gguf-convert-endian {path} {sys.byteorder}")
    raise UserError(f"{path}: GGUF version {version}, supported is {' or '.join(map(str, supported))}")
