"""Examples as tokens on disk: written once, mapped into memory from then on."""

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

from experiments.errors import UserError
from experiments.input.checking import OnBad
from experiments.input.encoding import Encoded, Encoder
from experiments.input.sources import Records

_CHUNK = 1024  # records that are tokenized at a time
_FORM = 3
_META = "meta.json"
_REASONS = 3  # of skipped records that are kept


@dataclass(frozen=True)
class Tokenized:
    """Examples, one behind the other; a record can have several of them, or none.

    Attributes:
      tokens: `uint16[all]` or `uint32[all]`, the tokens of all examples.
      targets: `bool[all]`: which of them are to be learned.
      lengths: `int32[examples]`: how many tokens an example has.
      firsts: `int32[examples]`: which token of an example is the first to be learned, after the very first one, which
        nothing predicts; its length where there is none.
      owners: `int32[examples]`: the number of the record that an example is of.
      digest: Of what decides them.
      notes: What a user should know about the records, each with the number of records it concerns.
      skipped: The numbers of the records that cannot be encoded, the first of them with the reason.
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


def tokenize(
    records: Records,
    encoder: Encoder,
    directory: Path,
    *,
    on_bad: OnBad = "error",
    process_index: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Tokenized:
    """The tokens of records, from the directory where they are there already.

    Every process may call it for one directory at the same time; the first that is ready gives the files to all.

    Args:
      records: What is tokenized.
      encoder: With what.
      directory: Where the files go, in a directory named by a digest of all that decides them.
      on_bad: What to do about a record that cannot be encoded: raise an error, or skip it.
      process_index: Of this process among those that share the directory.
      report: Called with a line on what is being done, where that takes its time.

    Raises:
      UserError: A record is malformed, or the files cannot be written.
    """
    versions = {name: metadata.version(name) for name in ("tokenizers", "jinja2")}
    everything = json.dumps([_FORM, records.digest, encoder.digest, on_bad, versions], sort_keys=True)
    digest = hashlib.sha256(everything.encode()).hexdigest()
    location = directory / digest[:16]
    dtypes = _dtypes(encoder.largest)
    if not _whole(location, dtypes):
        report(f"tokenizing {len(records):,} records into {location}")
        unfinished = directory / f".{digest[:16]}-{process_index}"
        try:
            encoder.notes.clear()
            skipped = {}
            chunks = _encoded(records, encoder, None if on_bad == "error" else skipped)
            _write(unfinished, dtypes, chunks, encoder.notes, skipped)
            _move(unfinished, location, dtypes)
        except OSError as error:
            raise UserError(f"{directory}: tokens cannot be written there ({error.strerror or error})") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # what an error left: it is no use to anyone
    arrays = {name: _mapped(location / f"{name}.bin", dtype) for name, dtype in dtypes.items()}
    meta = json.loads((location / _META).read_text())
    skipped = {int(number): reason for number, reason in meta["skipped"].items()}
    if len(skipped) == len(records):
        raise UserError(f"none of {len(records):,} records can be used; the first: {skipped[0]}")
    return Tokenized(**arrays, digest=digest, notes=meta["notes"], skipped=skipped)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """As a plain array: every slice of an np.memmap pays for being one. An empty file cannot be mapped."""
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype)


def _dtypes(largest: int) -> dict[str, np.dtype]:
    tokens = np.uint16 if largest < 1 << 16 else np.uint32
    kinds = {"tokens": tokens, "targets": np.bool_, "lengths": np.int32, "firsts": np.int32, "owners": np.int32}
    return {name: np.dtype(kind) for name, kind in kinds.items()}


def _encoded(records: Records, encoder: Encoder, skipped: dict[int, str] | None) -> Iterator[dict[int, list[Encoded]]]:
    """The examples of records by their numbers; what cannot be encoded goes to `skipped`, or is an error."""
    for start in range(0, len(records), _CHUNK):
        numbers = range(start, min(start + _CHUNK, len(records)))
        before = Counter(encoder.notes)
        try:
            yield dict(
                zip(numbers, encoder.encode_each([records[i] for i in numbers], list(map(records.place, numbers))))
            )
        except UserError:
            if skipped is None:
                raise
            encoder.notes.clear()
            encoder.notes.update(before)
            yield _encoded_singly(records, numbers, encoder, skipped)


def _encoded_singly(
    records: Records, numbers: range, encoder: Encoder, skipped: dict[int, str]
) -> dict[int, list[Encoded]]:
    encoded = {}
    for number in numbers:
        try:
            (encoded[number],) = encoder.encode_each([records[number]], [records.place(number)])
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
    shutil.rmtree(location, ignore_errors=True)  # of a process that was killed
    location.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((location / f"{name}.bin").open("wb")) for name in dtypes}
        for by_record in chunks:
            chunk = [example for examples in by_record.values() for example in examples]
            arrays = {
                "tokens": np.concatenate([np.zeros(0, np.int32), *(example.tokens for example in chunk)]),
                "targets": np.concatenate([np.zeros(0, bool), *(example.targets for example in chunk)]),
                "lengths": [len(example.tokens) for example in chunk],
                "firsts": [_first(example.targets) for example in chunk],
                "owners": [number for number, examples in by_record.items() for _ in examples],
            }
            for name, dtype in dtypes.items():
                files[name].write(np.asarray(arrays[name], dtype).tobytes())
    sizes = {name: (location / f"{name}.bin").stat().st_size for name in dtypes}
    meta = {"sizes": sizes, "notes": notes, "skipped": skipped}
    (location / _META).write_text(json.dumps(meta))


def _first(targets: np.ndarray) -> int:
    later = targets[1:]
    return 1 + int(np.argmax(later)) if later.any() else len(targets)


def _move(unfinished: Path, location: Path, dtypes: dict[str, np.dtype]) -> None:
    if location.exists() and not _whole(location, dtypes):
        shutil.rmtree(location)
    try:
        os.rename(unfinished, location)
    except OSError:
        if not _whole(location, dtypes):  # else another process was faster
            raise


def _whole(location: Path, dtypes: dict[str, np.dtype]) -> bool:
    """Whether the files are all there: they appear together, but a disk can lose the end of one."""
    try:
        sizes = json.loads((location / _META).read_text())["sizes"]
        return all((location / f"{name}.bin").stat().st_size == sizes[name] for name in dtypes)
    except (OSError, ValueError, KeyError, TypeError):
        return False
