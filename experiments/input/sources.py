"""Records by number: from lines of a file, a Parquet file, a data set on the hub, or the shipped data."""

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.errors import UserError
from experiments.input.forms import FORMS, parse
from experiments.input.records import Completion, Record
from experiments.tasks import examples

_CHUNK = 1 << 24
_ROWS = 1024  # of a Parquet file that are Python objects at a time
_SUFFIXES = (".jsonl", ".tsv", ".parquet")


class Records(Protocol):
    """Records by number.

    Attributes:
      digest: Of what they hold: other records, another digest.
    """

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record:
        """The record of a number; a UserError where it is malformed."""
        ...

    def place(self, index: int) -> str:
        """Where a record stands, for errors."""
        ...


def splits(data: str, validation: str | None = None) -> tuple[Records, Records | None]:
    """Records to train on and to validate with.

    Args:
      data: A `.jsonl`, `.tsv` or `.parquet` file; a directory with `train` and `validation` in one of these forms, or
        in that of :func:`experiments.tasks.examples.load`; `debian_sections`; or `ORGANISATION/DATASET` or
        `ORGANISATION/DATASET:SPLIT` on the hub.
      validation: Another one of these; None takes what `data` has for it: nothing where it is one file or one split.

    Raises:
      UserError: One of them is not there, not to be had, or empty.
    """
    train = read(data, "train")
    if validation is not None:
        return train, read(validation, "validation")
    alone = Path(data).is_file() or (not Path(data).is_dir() and ":" in data)
    return train, None if alone else read(data, "validation")


def read(data: str, split: str) -> Records:
    """The records of a split; a file, or a split that is named with a data set, is one by itself.

    Args:
      data: As for :func:`splits`.
      split: `train`, `validation` or `test`.

    Raises:
      UserError: It is not there, not to be had, or empty.
    """
    path = Path(data)
    if data in examples.SHIPPED or (path / "labels.txt").exists():
        return Labelled(data, split)
    if path.is_dir():
        found = [file for suffix in _SUFFIXES if (file := path / f"{split}{suffix}").exists()]
        if len(found) != 1:
            named = " and ".join(file.name for file in found) or "none"
            raise UserError(f"{path}: expected one of {', '.join(split + s for s in _SUFFIXES)}, found {named}")
        path = found[0]
    if path.is_file():
        return _file(path)
    if data.startswith((".", "/", "~")) or data.count("/") != 1 or path.suffix in _SUFFIXES:
        shipped = ", ".join(examples.SHIPPED)
        raise UserError(
            f"{data}: no such file or directory, and neither {shipped} nor a data set's name (ORGANISATION/DATASET)"
        )
    return hub(data, split)


def _file(path: Path) -> Records:
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: expected a name that ends in {', '.join(_SUFFIXES)}; found {path.suffix or 'none'}")
    try:
        records = {".jsonl": JsonLines, ".tsv": TabSeparated, ".parquet": Parquet}[path.suffix](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not len(records):
        raise UserError(f"{path}: the file has no records")
    return records


def first(records: Records, count: int | None) -> Records:
    """The first `count` of records; None keeps all.

    Raises:
      UserError: There are fewer.
    """
    if count is None:
        return records
    if not 0 < count <= len(records):
        place = records.place(0).rsplit(",", 1)[0]
        raise UserError(f"{place}: {count:,} records asked for, there are {len(records):,}")
    return _First(records, count)


def split(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    """Records to train on and a share of them, chosen at random, to validate with.

    Args:
      records: At least two.
      share: Above 0 and below 1; at least one record is held out.
      seed: Of the choice.

    Raises:
      UserError: The share leaves nothing to train on.
    """
    count = max(round(share * len(records)), 1)
    if count >= len(records):
        raise UserError(f"validation_share {share}: nothing is left of {len(records):,} records to train on")
    order = np.random.default_rng(seed).permutation(len(records))
    return _Chosen(records, np.sort(order[count:])), _Chosen(records, np.sort(order[:count]))


class _Chosen:
    """Some of the records, by their numbers."""

    def __init__(self, records: Records, numbers: np.ndarray):
        self._records, self._numbers = records, numbers
        self.digest = hashlib.sha256(records.digest.encode() + numbers.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        return self._records[int(self._numbers[index])]

    def place(self, index: int) -> str:
        return self._records.place(int(self._numbers[index]))


class _First:
    def __init__(self, records: Records, count: int):
        self._records, self._count = records, count
        self.digest = hashlib.sha256(f"{records.digest} {count}".encode()).hexdigest()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def place(self, index: int) -> str:
        return self._records.place(index)


class _Lines:
    """Lines of a file by number, of which only where they begin is held in memory."""

    def __init__(self, path: Path):
        self._path = path
        size, breaks, digest = path.stat().st_size, [], hashlib.sha256()
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            for start in range(0, size, _CHUNK):
                chunk = self._bytes[start : start + _CHUNK]
                digest.update(chunk)
                breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + start)
        ends = np.concatenate(breaks) if breaks else np.zeros(0, int)
        if size and (not len(ends) or ends[-1] != size - 1):
            ends = np.append(ends, size)
        self._ends, self.digest = ends, digest.hexdigest()

    def line(self, index: int) -> str:
        start = int(self._ends[index - 1]) + 1 if index else 0
        try:
            return self._bytes[start : int(self._ends[index])].decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(f"{self._path}, line {index + 1}: not UTF-8 ({error.reason})") from None


class JsonLines(_Lines):
    """A JSON object a line."""

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        place, line = self.place(index), self.line(index)
        try:
            found = json.loads(line)
        except ValueError as error:
            what = f"not JSON ({error})" if line.strip() else "an empty line"
            raise UserError(f"{place}: {what}, expected {FORMS} on each line") from None
        return parse(found, place)

    def place(self, index: int) -> str:
        return f"{self._path}, line {index + 1}"


class TabSeparated(_Lines):
    """Columns that a header names, `prompt` and `completion` among them."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._columns = self.line(0).split("\t") if len(self._ends) else []
        if self._columns and not {"prompt", "completion"} <= set(self._columns):
            found = ", ".join(self._columns)
            raise UserError(f"{path}, line 1: expected a header with prompt and completion between tabs, found {found}")

    def __len__(self) -> int:
        return max(len(self._ends) - 1, 0)

    def __getitem__(self, index: int) -> Record:
        place, fields = self.place(index), self.line(index + 1).split("\t")
        if len(fields) != len(self._columns):
            raise UserError(f"{place}: {len(fields)} columns between tabs, expected {len(self._columns)}")
        return parse(dict(zip(self._columns, fields)), place)

    def place(self, index: int) -> str:
        return f"{self._path}, line {index + 2}"


class Parquet:
    """Rows of a Parquet file; some of a row group are Python objects at a time."""

    def __init__(self, path: Path):
        import pyarrow
        import pyarrow.parquet

        self._path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None
        known = ("messages", "prompt", "completion", "tools")
        self._columns = [name for name in self._file.schema_arrow.names if name in known]
        groups = range(self._file.num_row_groups)
        sizes = [self._file.metadata.row_group(group).num_rows for group in groups]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self._group: tuple[int, Any] = (-1, None)
        self._rows: tuple[int, list[Any]] = (0, [])
        with path.open("rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        start, rows = self._rows
        if not start <= index < start + len(rows):
            start, rows = self._rows = self._read(index)
        return parse(rows[index - start], self.place(index))

    def place(self, index: int) -> str:
        return f"{self._path}, row {index + 1}"

    def _read(self, index: int) -> tuple[int, list[Any]]:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        held, table = self._group
        if group != held:
            table = self._file.read_row_group(group, columns=self._columns)
            self._group = group, table
        first = int(self._starts[group])
        offset = (index - first) // _ROWS * _ROWS
        return first + offset, table.slice(offset, _ROWS).to_pylist()


class Labelled:
    """Labelled texts of :mod:`experiments.tasks.examples`: a text is asked for by the name of its label."""

    def __init__(self, data: str, split: str):
        found = examples.load(data, split)
        self._place = f"{data}, {split} example"
        self._names, self._labels, self._texts = found.names, found.labels, found.texts
        digest = hashlib.sha256(repr((found.names, found.texts)).encode())
        digest.update(found.labels.tobytes())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Record:
        return Completion(f"{self._names[self._labels[index]]}:", f" {self._texts[index]}")

    def place(self, index: int) -> str:
        return f"{self._place} {index + 1}"


class Table:
    """A data set of the `datasets` library, or any other sequence of rows.

    Args:
      rows: Mappings from columns to values, by number.
      name: What errors call it.
      digest: Of what the rows hold.
    """

    def __init__(self, rows: Any, name: str, digest: str):
        self._rows, self._name, self.digest = rows, name, digest

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return parse(self._rows[index], self.place(index))

    def place(self, index: int) -> str:
        return f"{self._name}, row {index + 1}"


def hub(name: str, split: str) -> Records:
    """A split of a data set on the Hugging Face hub.

    Args:
      name: `ORGANISATION/DATASET`; or `ORGANISATION/DATASET:SPLIT`, whose split is taken in place of the other.
      split: What it is called there.

    Raises:
      UserError: There is no network, no such data set, or no such split.
    """
    name, _, named = name.partition(":")
    split = named or split
    import datasets  # takes seconds, and only this needs it

    try:
        found = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name}:{split}: no such file, and not to be had from the hub as ORGANISATION/DATASET:SPLIT ({reason})"
        ) from None
    return Table(found, f"{name}:{split}", table_digest(found))


def table_digest(found: Any) -> str:
    """Of a `datasets.Dataset`'s rows. Its own fingerprint is of where it lies as well."""
    digest = hashlib.sha256(repr(found.column_names).encode())
    for batch in found.with_format("arrow").iter(_ROWS):
        for column in batch.columns:
            digest.update(json.dumps(column.to_pylist(), default=repr).encode())
    return digest.hexdigest()
