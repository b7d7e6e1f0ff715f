"""Tokenized examples on disk, written once and memory-mapped."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np

from experiments.errors import UserError
from experiments.input.checking import OnBad
from experiments.input.encoding import Encoded
from experiments.input.records import Record
from experiments.input.sources import Records
from experiments.user_cache import VARIABLE

_CHUNK = 1024  # records to tokenize at a time
_FORMAT = 4  # version of the files
_META = "meta.json"
_STALE = 86_400  # seconds after which the files of a process that was killed are removed
_REASONS = 3  # error messages of skipped records to keep


@dataclass(frozen=True)
class Tokenized:
    """Concatenated examples. A record may have any number of examples.

    Attributes:
      tokens: `uint16[all]` or `uint32[all]`, the tokens of all examples.
      targets: `bool[all]`, whether the loss covers a token.
      lengths: `int32[examples]`, the number of tokens of each example.
      firsts: `int32[examples]`, the index of each example's first target, except its first token, which is never
        predicted; the example's length if there is none.
      owners: `int32[examples]`, the index of each example's record.
      digest: A digest of everything that determines the examples.
      notes: Notes about the records for the user, with the number of records that each concerns.
      skipped: The indices of records that cannot be encoded, with the error messages of the first ones.
    """

    tokens: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    firsts: np.ndarray
    owners: np.ndarray
    digest: str
    notes: dict[str, int] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    def of_first(self, records: int) -> "Tokenized":
        """Returns the examples of the first records."""
        count = int(np.searchsorted(self.owners, records))
        skipped = {number: reason for number, reason in self.skipped.items() if number < records}
        return replace(
            self,
            lengths=self.lengths[:count],
            firsts=self.firsts[:count],
            owners=self.owners[:count],
            skipped=skipped,
        )


class RecordEncoder(Protocol):
    """Converts records to examples, such as :class:`experiments.input.encoding.Encoder`."""

    @property
    def notes(self) -> Counter[str]:
        """Notes for the user about the records encoded so far, with the number of records that each concerns."""
        ...

    @property
    def digest(self) -> str:
        """A digest of everything that determines the tokens."""
        ...

    @property
    def largest(self) -> int:
        """The largest token id that may occur."""
        ...

    def encode_each(self, records: Sequence[Record], locations: Sequence[str], /) -> list[list[Encoded]]:
        """Returns the examples of each record; raises a UserError for a record that cannot be encoded."""
        ...


def tokenize(
    records: Records,
    encoder: RecordEncoder,
    directory: Path,
    *,
    on_bad: OnBad = "error",
    report: Callable[[str], None] = lambda line: None,
) -> Tokenized:
    """Tokenizes records, or reads the tokens that the directory already holds.

    Any number of processes and runs may call it for one directory at the same time. The first to finish provides the
    files for all.

    Args:
      records: The records.
      encoder: The encoder.
      directory: The parent of the files' directory, which is named by a digest of everything that determines them.
      on_bad: Whether to raise an error or to skip records that cannot be encoded.
      report: Called with a line about progress if there is work to do.

    Raises:
      UserError: A record is malformed, or the files cannot be written.
    """
    versions = {name: metadata.version(name) for name in ("tokenizers", "jinja2")}
    inputs = json.dumps([_FORMAT, records.digest, encoder.digest, on_bad, versions], sort_keys=True)
    digest = hashlib.sha256(inputs.encode()).hexdigest()
    location = directory / digest[:16]
    dtypes = _dtypes(encoder.largest)
    if not _is_complete(location, dtypes):
        report(f"tokenizing {len(records):,} records into {location}")
        try:
            with _unfinished(directory, digest[:16]) as unfinished:
                encoder.notes.clear()
                skipped = {}
                chunks = _encode(records, encoder, None if on_bad == "error" else skipped)
                _write(unfinished, dtypes, chunks, encoder.notes, skipped)
                _publish(unfinished, location, dtypes)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{directory}: cannot write tokens ({reason}); {VARIABLE} sets another directory") from None
    arrays = {name: _memory_map(location / f"{name}.bin", dtype) for name, dtype in dtypes.items()}
    meta = json.loads((location / _META).read_text())
    skipped = {int(number): reason for number, reason in meta["skipped"].items()}
    if len(skipped) == len(records):
        raise UserError(f"none of {len(records):,} records can be encoded; the first: {skipped[0]}")
    return Tokenized(**arrays, digest=digest, notes=meta["notes"], skipped=skipped)


@contextlib.contextmanager
def _unfinished(directory: Path, name: str) -> Iterator[Path]:
    """A directory for the files until they are complete. Those of processes that were killed long ago are removed."""
    directory.mkdir(parents=True, exist_ok=True)
    for other in directory.glob(f".{name}-*"):
        with contextlib.suppress(FileNotFoundError):  # another process has finished, or has removed it
            if time.time() - other.stat().st_mtime > _STALE:
                shutil.rmtree(other)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=directory))
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # incomplete files after an error


def _memory_map(path: Path, dtype: np.dtype) -> np.ndarray:
    """Maps a file as a plain array, which is faster to slice than an np.memmap. An empty file cannot be mapped."""
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype)


def _dtypes(largest: int) -> dict[str, np.dtype]:
    tokens = np.uint16 if largest < 1 << 16 else np.uint32
    kinds = {"tokens": tokens, "targets": np.bool_, "lengths": np.int32, "firsts": np.int32, "owners": np.int32}
    return {name: np.dtype(kind) for name, kind in kinds.items()}


def _encode(
    records: Records, encoder: RecordEncoder, skipped: dict[int, str] | None
) -> Iterator[dict[int, list[Encoded]]]:
    """Yields the examples of records by index. Records that cannot be encoded are added to `skipped`, or are errors."""
    for start in range(0, len(records), _CHUNK):
        numbers = range(start, min(start + _CHUNK, len(records)))
        before = Counter(encoder.notes)
        try:
            yield dict(
                zip(numbers, encoder.encode_each([records[i] for i in numbers], list(map(records.location, numbers))))
            )
        except UserError:
            if skipped is None:
                raise
            encoder.notes.clear()
            encoder.notes.update(before)
            yield _encode_singly(records, numbers, encoder, skipped)


def _encode_singly(
    records: Records, numbers: range, encoder: RecordEncoder, skipped: dict[int, str]
) -> dict[int, list[Encoded]]:
    encoded = {}
    for number in numbers:
        try:
            (encoded[number],) = encoder.encode_each([records[number]], [records.location(number)])
        except UserError as error:
            skipped[number] = str(error) if len(skipped) < _REASONS else ""
    return encoded


def _write(
    location: Path,
    dtypes: dict[str, np.dtype],
    chunks: Iterator[dict[int, list[Encoded]]],
    notes: Mapping[str, int],
    skipped: Mapping[int, str],
) -> None:
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((location / f"{name}.bin").open("wb")) for name in dtypes}
        for by_record in chunks:
            chunk = [example for examples in by_record.values() for example in examples]
            arrays = {
                "tokens": np.concatenate([np.zeros(0, np.int32), *(example.tokens for example in chunk)]),
                "targets": np.concatenate([np.zeros(0, bool), *(example.targets for example in chunk)]),
                "lengths": [len(example.tokens) for example in chunk],
                "firsts": [_first_target(example.targets) for example in chunk],
                "owners": [number for number, examples in by_record.items() for _ in examples],
            }
            for name, dtype in dtypes.items():
                files[name].write(np.asarray(arrays[name], dtype).tobytes())
    sizes = {name: (location / f"{name}.bin").stat().st_size for name in dtypes}
    meta = {"sizes": sizes, "notes": notes, "skipped": skipped}
    (location / _META).write_text(json.dumps(meta))


def _first_target(targets: np.ndarray) -> int:
    predicted = targets[1:]
    return 1 + int(np.argmax(predicted)) if predicted.any() else len(targets)


def _publish(unfinished: Path, location: Path, dtypes: dict[str, np.dtype]) -> None:
    if location.exists() and not _is_complete(location, dtypes):
        shutil.rmtree(location)
    try:
        os.rename(unfinished, location)
    except OSError:
        if not _is_complete(location, dtypes):  # otherwise another process was faster
            raise


def _is_complete(location: Path, dtypes: dict[str, np.dtype]) -> bool:
    """Whether all files exist with their full sizes. They are created atomically, but may be truncated later."""
    try:
        sizes = json.loads((location / _META).read_text())["sizes"]
        return all((location / f"{name}.bin").stat().st_size == sizes[name] for name in dtypes)
    except (OSError, ValueError, KeyError, TypeError):
        return False
