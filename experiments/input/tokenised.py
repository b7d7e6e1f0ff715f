"""Examples as tokens on disk: written once, mapped into memory from then on."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

from experiments.errors import UserError
from experiments.input.encoding import Encoded, Encoder
from experiments.input.sources import Records

_CHUNK = 1024  # records that are tokenised at a time
_FORM = 2
_META = "meta.json"


@dataclass(frozen=True)
class Tokenised:
    """Examples, one behind the other; a record can have several of them, or none.

    Attributes:
      tokens: `uint16[all]` or `uint32[all]`, the tokens of all examples.
      targets: `bool[all]`: which of them are to be learnt.
      lengths: `int32[examples]`: how many tokens an example has.
      firsts: `int32[examples]`: which token of an example is the first to be learnt, after the very first one, which
        nothing predicts; its length where there is none.
      digest: Of what decides them.
      notes: What a user should know about the records, each with the number of records it concerns.
    """

    tokens: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    firsts: np.ndarray
    digest: str
    notes: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)


def tokenise(
    records: Records,
    encoder: Encoder,
    directory: Path,
    *,
    process_index: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Tokenised:
    """The tokens of records, from the directory where they are there already.

    Every process may call it for one directory at the same time; the first that is ready gives the files to all.

    Args:
      records: What is tokenised.
      encoder: With what.
      directory: Where the files go, in a directory named by a digest of all that decides them.
      process_index: Of this process among those that share the directory.
      report: Called with a line on what is being done, where that takes its time.

    Raises:
      UserError: A record is malformed, or the files cannot be written.
    """
    versions = {name: metadata.version(name) for name in ("tokenizers", "jinja2")}
    everything = json.dumps([_FORM, records.digest, encoder.digest, versions], sort_keys=True)
    digest = hashlib.sha256(everything.encode()).hexdigest()
    place = directory / digest[:16]
    dtypes = _dtypes(encoder.largest)
    if not _whole(place, dtypes):
        report(f"tokenising {len(records):,} records into {place}")
        unfinished = directory / f".{digest[:16]}-{process_index}"
        try:
            encoder.notes.clear()
            _write(unfinished, dtypes, _encoded(records, encoder), encoder.notes)
            _move(unfinished, place, dtypes)
        except OSError as error:
            raise UserError(f"{directory}: tokens cannot be written there ({error.strerror or error})") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # what an error left: it is no use to anyone
    # As plain arrays: every slice of an np.memmap pays for being one.
    arrays = {name: np.asarray(np.memmap(place / f"{name}.bin", dtype, "r")) for name, dtype in dtypes.items()}
    notes = json.loads((place / _META).read_text())["notes"]
    return Tokenised(**arrays, digest=digest, notes=notes)


def _dtypes(largest: int) -> dict[str, np.dtype]:
    tokens = np.uint16 if largest < 1 << 16 else np.uint32
    kinds = {"tokens": tokens, "targets": np.bool_, "lengths": np.int32, "firsts": np.int32}
    return {name: np.dtype(kind) for name, kind in kinds.items()}


def _encoded(records: Records, encoder: Encoder) -> Iterator[list[Encoded]]:
    for start in range(0, len(records), _CHUNK):
        numbers = range(start, min(start + _CHUNK, len(records)))
        yield encoder.encode([records[i] for i in numbers], [records.place(i) for i in numbers])


def _write(place: Path, dtypes: dict[str, np.dtype], chunks: Iterator[list[Encoded]], notes: Mapping[str, int]) -> None:
    shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
    place.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((place / f"{name}.bin").open("wb")) for name in dtypes}
        for chunk in chunks:
            arrays = {
                "tokens": np.concatenate([np.zeros(0, np.int32), *(example.tokens for example in chunk)]),
                "targets": np.concatenate([np.zeros(0, bool), *(example.targets for example in chunk)]),
                "lengths": [len(example.tokens) for example in chunk],
                "firsts": [_first(example.targets) for example in chunk],
            }
            for name, dtype in dtypes.items():
                files[name].write(np.asarray(arrays[name], dtype).tobytes())
    sizes = {name: (place / f"{name}.bin").stat().st_size for name in dtypes}
    (place / _META).write_text(json.dumps({"sizes": sizes, "notes": notes}))


def _first(targets: np.ndarray) -> int:
    later = targets[1:]
    return 1 + int(np.argmax(later)) if later.any() else len(targets)


def _move(unfinished: Path, place: Path, dtypes: dict[str, np.dtype]) -> None:
    if place.exists() and not _whole(place, dtypes):
        shutil.rmtree(place)
    try:
        os.rename(unfinished, place)
    except OSError:
        if not _whole(place, dtypes):  # else another process was faster
            raise


def _whole(place: Path, dtypes: dict[str, np.dtype]) -> bool:
    """Whether the files are all there: they appear together, but a disk can lose the end of one."""
    try:
        sizes = json.loads((place / _META).read_text())["sizes"]
        return all((place / f"{name}.bin").stat().st_size == sizes[name] for name in dtypes)
    except (OSError, ValueError, KeyError, TypeError):
        return False
