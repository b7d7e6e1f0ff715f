"""Opens GGUF files, and collects what is wrong with their headers and tensors without reading tensors."""

import functools
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import ml_dtypes
import numpy as np

from experiments.errors import UserError
from lora_jax.io import shorten

_MAGIC, _HEADER = b"GGUF", 24  # bytes: magic, version, number of tensors, number of fields
_FLOATS: dict[gguf.GGMLQuantizationType, np.dtype] = {
    gguf.GGMLQuantizationType.F64: np.dtype(np.float64),
    gguf.GGMLQuantizationType.F32: np.dtype(np.float32),
    gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
    gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_OTHER_ORDER: Literal["little", "big"] = "big" if sys.byteorder == "little" else "little"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_LISTED = 12  # the maximum number of problems of a kind in an error


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

    @property
    def is_float(self) -> bool:
        """Whether the file stores numbers instead of codes."""
        return self.kind in _FLOATS

    def dequantize(self, rows: np.ndarray) -> np.ndarray:
        """Returns the numbers that some of the rows of `data` hold: stored floats as they are, others in float32."""
        if self.is_float:
            return rows
        if not rows.size:
            return np.zeros((*rows.shape[:-1], self.shape[-1]), np.float32)
        return gguf.quants.dequantize(rows, self.kind)


@dataclass(frozen=True)
class Content:
    """The fields and tensors of a GGUF file, or of all parts of a model.

    Attributes:
      path: The first file, for error messages.
      files: All files.
      fields: The values of the fields by name.
      tensors: The tensors by name.
      problems: What is wrong with other tensors, by name.
      file_problems: What is wrong with files.
      is_complete: Whether the headers of all files are known.
    """

    path: Path
    files: tuple[Path, ...]
    fields: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    problems: Mapping[str, str]
    file_problems: tuple[str, ...] = ()
    is_complete: bool = True


def read(path: Path) -> Content:
    """Reads the fields of a GGUF file and where its tensors are. Tensors are mapped into memory, and read on use.

    Args:
      path: The file; for a model in parts (`NAME-00001-of-00003.gguf`), any of them.
    """
    files = parts(path)
    readers, unreadable = [], []
    for file in files:
        try:
            readers.append(_open(file))
        except ValueError as error:
            unreadable.append(str(error))
    tensors = {name: tensor for reader in readers for name, tensor in reader.stored.items()}
    problems = {name: problem for reader in readers for name, problem in reader.problems.items()}
    fields = {name: reader.value(name) for reader in reversed(readers) for name in reader.fields}
    file_problems = (*unreadable, *(problem for reader in readers for problem in reader.file_problems))
    return Content(files[0], files, _usable(fields), tensors, problems, file_problems, not unreadable)


def parts(path: Path) -> tuple[Path, ...]:
    """Returns all files of the model to which a file belongs."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return (path,)
    return tuple(path.parent / f"{match[1]}-{number + 1:05}-of-{match[3]}.gguf" for number in range(int(match[3])))


def raise_problems(path: Path, problems: Iterable[str]) -> None:
    """Raises a UserError that lists problems of a file, if there are any.

    Args:
      path: The file.
      problems: Texts that begin with their kind and a colon. Of a kind that occurs often, the first ones are listed.
    """
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.partition(":")[0], []).append(problem)
    if kinds:
        count = sum(map(len, kinds.values()))
        lines = [line for kind, listed in kinds.items() for line in _shortened(kind, listed)]
        total = "1 problem" if count == 1 else f"{count} problems"
        raise UserError("\n  ".join([f"{path}: cannot be used ({total}):", *lines]))


def _shortened(kind: str, problems: list[str]) -> list[str]:
    more = len(problems) - _LISTED
    return problems if more <= 0 else [*problems[:_LISTED], f"{kind}: … and {more} more"]


def _usable(fields: dict[str, Any]) -> dict[str, Any]:
    """Leaves out the ids of special tokens that the vocabulary does not have, as llama.cpp does."""
    count = len(fields.get("tokenizer.ggml.tokens", ()))
    return {
        name: value
        for name, value in fields.items()
        if not (count and re.fullmatch(r"tokenizer\.ggml\.\w+_token_id", name)) or value in range(count)
    }


class _Reader(gguf.GGUFReader):
    """A reader that stays within the file, reads arrays at once, and collects what is wrong with tensors."""

    def __init__(self, path: Path):
        self.path = path
        self.stored: dict[str, StoredTensor] = {}
        self.problems: dict[str, str] = {}
        self.file_problems: list[str] = []
        super().__init__(path)
        if self.byte_order == "S":
            hint = f"convert it with gguf-convert-endian {path} {sys.byteorder}"
            self.file_problems.append(f"{_OTHER_ORDER}-endian: {path.name}; {hint}")

    def value(self, name: str) -> Any:
        """Returns the value of a field."""
        field = self.fields[name]
        is_array = field.types[:1] == [gguf.GGUFValueType.ARRAY]
        return field.parts[field.data[0]] if is_array else field.contents()

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data):,}, within its header")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        # The package reads arrays item by item, which takes seconds for a vocabulary.
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if kind == gguf.GGUFValueType.STRING:
            values, end = self._strings(start, count)
        elif kind in self.gguf_scalar_to_np:
            numbers = self._get(start, self.gguf_scalar_to_np[kind], count)
            values, end = numbers.tolist(), start + numbers.nbytes
        else:
            raise ValueError(f"a field is an array of the type {kind.name}")
        return end - orig_offs, [values], [0], [gguf.GGUFValueType.ARRAY, kind]

    def _strings(self, start: int, count: int) -> tuple[list[str], int]:
        view, strings, end = self.data.data, [], start
        order = sys.byteorder if self.byte_order == "I" else _OTHER_ORDER
        for _ in range(count):
            if end + 8 > len(view):
                raise ValueError(f"it ends at byte {len(view):,}, within its header")
            length = int.from_bytes(view[end : end + 8], order)
            self._get(end + 8, np.uint8, length)
            strings.append(str(view[end + 8 : end + 8 + length], "utf-8"))
            end += 8 + length
        return strings, end

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        end = 0
        for field in fields:
            _, name_bytes, _, dimensions, code, offset = field.parts
            name, shape = str(bytes(name_bytes), encoding="utf-8"), tuple(map(int, reversed(dimensions)))
            try:
                kind = gguf.GGMLQuantizationType(int(code[0]))
            except ValueError:
                self.problems[name] = f"unknown type: {name} has the type {int(code[0])}"
                continue
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            start, size = int(start_offs) + int(offset[0]), math.prod(shape) // block * block_bytes
            end = max(end, start + size)
            if name in self.stored:
                self.problems[name] = f"twice: {name}"
            elif not _is_readable(kind):
                self.problems[name] = f"type: {name} has the type {kind.name}, which cannot be dequantized"
            elif len(shape) < 2 and kind not in _FLOATS:
                self.problems[name] = f"type: {name} is a vector of the type {kind.name}, expected numbers"
            elif not shape or shape[-1] % block:
                self.problems[name] = f"shape: {name} is {shape}, {kind.name} has rows of whole blocks of {block}"
            elif start + size > len(self.data):
                self.problems[name] = f"truncated: {name}"
            else:
                dtype = _FLOATS.get(kind, np.dtype(np.uint8)).newbyteorder(self.byte_order)
                row = shape[-1] if kind in _FLOATS else shape[-1] // block * block_bytes
                data = np.asarray(self.data[start : start + size]).view(dtype).reshape(*shape[:-1], row)
                self.stored[name] = StoredTensor(name, self.path, kind, shape, data)
        if end > len(self.data):
            sizes = f"{self.path.name} has {len(self.data):,} bytes, its tensors need {end:,}"
            self.file_problems.append(f"truncated: {sizes}")


@functools.cache
def _is_readable(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether tensors of a type are floats, or the `gguf` package dequantizes them."""
    if kind in _FLOATS:
        return True
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:  # so the package says that it does not dequantize a type
        return False
    return True


def _open(path: Path) -> _Reader:
    """Reads the header of a file; raises a ValueError if that is impossible."""
    _check_beginning(path)
    try:
        return _Reader(path)
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise ValueError(f"truncated or damaged: {path.name} ({shorten(str(error))})") from None


def _check_beginning(path: Path) -> None:
    """Raises a ValueError unless a file begins like a GGUF file of a supported version."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER)
    except FileNotFoundError:
        raise ValueError(f"missing: the part {path.name}") from None
    except OSError as error:
        raise ValueError(f"unreadable: {path.name} ({error.strerror})") from None
    if header[:4] != _MAGIC:
        raise ValueError(f"not GGUF: {path.name} does not begin with the bytes {_MAGIC.decode()}")
    if len(header) < _HEADER:
        raise ValueError(f"truncated or damaged: {path.name} (it has only {len(header)} bytes)")
    supported = gguf.gguf_reader.READER_SUPPORTED_VERSIONS
    versions = [int.from_bytes(header[4:8], order) for order in (sys.byteorder, _OTHER_ORDER)]
    if not set(versions) & set(supported):
        raise ValueError(
            f"version: {path.name} has GGUF version {versions[0]}, supported is {' or '.join(map(str, supported))}; "
            "the rest of it is not checked"
        )
