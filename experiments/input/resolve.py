"""Resolves the name of data: files, directories, and data sets that are saved, shipped or on the Hugging Face Hub."""

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from experiments.errors import UserError
from experiments.input import layout
from experiments.input.columnar import ArrowRows, ParquetRows, saved_files, saved_split
from experiments.input.delimited import DELIMITERS, DelimitedRows
from experiments.input.forms import FormName, parse
from experiments.input.hub import open_table
from experiments.input.json_rows import JsonRows
from experiments.input.official import catalog
from experiments.input.official.layout import Example
from experiments.input.opening import COMPRESSED, data_suffix, open_content
from experiments.input.records import Completion, Record
from experiments.tasks import examples


class Rows(Protocol):
    """The indexed rows of a file, before they are parsed as records.

    Attributes:
      name: The file's name.
      digest: A digest of its content.
      columns: The columns of a table; None if each row has its own.
    """

    name: str
    digest: str

    @property
    def columns(self) -> tuple[str, ...] | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def location(self, index: int, /) -> str:
        """Returns the file and the line, row or item, for error messages."""
        ...


class Source(Protocol):
    """The indexed records of one file or data set.

    Attributes:
      name: The name of the file or data set.
      digest: A digest of the records.
    """

    name: str
    digest: str

    def __len__(self) -> int: ...

    def read(self, index: int, /) -> tuple[str, Record]:
        """Reads the format and the content of a record; raises a UserError if it is malformed."""
        ...

    def location(self, index: int, /) -> str:
        """Returns a record's location, for error messages."""
        ...


def resolve(data: str, split: str, form: FormName | None = None, *, separate: bool = False) -> list[Source]:
    """Opens the files or data sets of a split.

    Args:
      data: A name as for :func:`experiments.input.sources.splits`, without a weight.
      split: `train`, `validation` or `test`.
      form: The format; None detects it.
      separate: Whether to return only data other than the training data that `data` names. A single file and
        `DATASET:SPLIT` have none.

    Returns:
      A source for each file; none if a directory or data set does not have the split.

    Raises:
      UserError: The data is missing, cannot be read, or has no records.
    """
    path = Path(data)
    if data not in examples.SHIPPED and form is None and (selection := catalog.find(data)) is not None:
        return _official(selection, split, separate=separate)
    if _is_directory(data):
        return _directory(data, split, form, separate=separate)
    directory, _, name = data.rpartition(":")
    if directory and _is_directory(directory) and not path.exists():
        return [] if separate else _directory(directory, name, form, named=True)
    if path.is_file():
        return [] if separate else _files([path], split, form)
    if path.exists():
        raise UserError(f"{data}: expected a file or a directory, got a pipe or a device; write it to a file first")
    if Path(directory).is_file() or (glob.has_magic(directory) and data_suffix(Path(directory)) in layout.SUFFIXES):
        raise UserError(f"{data}: invalid weight {name}; expected a positive number, as in {directory}:2")
    if glob.has_magic(data):
        return [] if separate else _files(layout.find_matching(data), split, form)
    dataset = data.partition(":")[0]
    if data.startswith((".", "/", "~")) or dataset.count("/") != 1 or data_suffix(path) in layout.SUFFIXES:
        shipped = ", ".join(examples.SHIPPED)
        raise UserError(
            f"{data}: no such file or directory; data sets are {shipped} or named ORGANIZATION/DATASET (on the Hub)"
            + catalog.nearest(data)
        )
    if separate and ":" in data:
        return []
    table = open_table(data, split, optional=separate)
    return [] if table is None else [File(table, form)]


def _is_directory(data: str) -> bool:
    return data in examples.SHIPPED or Path(data).is_dir()


def _directory(
    data: str, split: str, form: FormName | None, *, separate: bool = False, named: bool = False
) -> list[Source]:
    path = examples.SHIPPED.get(data, Path(data))
    if (path / "labels.txt").exists():
        return [] if separate and not list(path.glob(f"{split}.tsv*")) else [Labeled(data, split)]
    if (path / "state.json").is_file():  # a single split that the datasets library saved
        if named:
            layout.choose([saved_split(path) or "train"], split, data, named=True)
        return [] if separate else _files(saved_files(path), split, form)
    if (path / "dataset_dict.json").is_file():
        names = [folder.parent.name for folder in path.glob("*/state.json")]
        name = layout.choose(names, split, data, named=named, optional=separate)
        return [] if name is None else _files(saved_files(path / name), split, form)
    return _files(layout.in_directory(path, split, separate=separate, named=named), split, form)


def _official(selection: catalog.Selection, split: str, *, separate: bool) -> list[Source]:
    if selection.split is not None and separate:
        return []
    name = selection.split or selection.choose(split, optional=separate)
    if name is None:
        return []
    source = Official(selection, name)
    if not len(source):
        raise UserError(f"{source.name}: no records")
    return [source]


def _files(paths: Sequence[Path], split: str, form: FormName | None) -> list[Source]:
    sources: list[Source] = [File(_rows(path, split), form) for path in paths]
    if sources and not any(map(len, sources)):
        raise UserError(f"{' and '.join(map(str, paths[:3]))}: the file has no records")
    return sources


def _rows(path: Path, split: str) -> Rows:
    suffix = data_suffix(path)
    if suffix not in layout.SUFFIXES:
        raise UserError(
            f"{path}: expected a name that ends in {', '.join(layout.SUFFIXES)}, optionally followed by "
            f"{', '.join(COMPRESSED)}; got {path.suffix or 'no suffix'}"
        )
    content = open_content(path)
    if not content.data:
        raise UserError(f"{path}: the file has no records")
    if suffix in DELIMITERS:
        return DelimitedRows(content, DELIMITERS[suffix])
    if suffix in (".parquet", ".arrow"):
        return ParquetRows(content) if suffix == ".parquet" else ArrowRows(content)
    return JsonRows(content, split)


class File:
    """The rows of a file or data set as records.

    Args:
      rows: The rows.
      form: The format; None detects the format of each row.
    """

    def __init__(self, rows: Rows, form: FormName | None):
        self._rows, self._form = rows, form
        self.name = rows.name
        self.digest = hashlib.sha256(f"{rows.digest} {form}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> tuple[str, Record]:
        return parse(self._rows[index], self.location(index), self._form, self._rows.columns)

    def location(self, index: int) -> str:
        return self._rows.location(index)


class Labeled:
    """The labeled texts of :mod:`experiments.tasks.examples`, each a completion of its label's name."""

    def __init__(self, data: str, split: str):
        loaded = examples.load(data, split)
        self.name = f"{data}, {split}"
        self._names, self._labels, self._texts = loaded.names, loaded.labels, loaded.texts
        digest = hashlib.sha256(repr((loaded.names, loaded.texts)).encode())
        digest.update(loaded.labels.tobytes())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._texts)

    def read(self, index: int) -> tuple[str, Record]:
        return "labels", Completion(f"{self._names[self._labels[index]]}:", f" {self._texts[index]}")

    def location(self, index: int) -> str:
        return f"{self.name} example {index + 1}"


class Official:
    """The examples of an official data set.

    Attributes:
      selection: The data set.
    """

    def __init__(self, selection: catalog.Selection, split: str):
        self.selection, self.name = selection, f"{selection}, {split}"
        self._rows, self.digest = selection.rows(split)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> tuple[str, Record]:
        return self.selection.layout.name, self.example(index).record

    def example(self, index: int) -> Example:
        """Returns an example with what the metrics of the task compare an answer with."""
        where, row = self._rows[index]
        return self.selection.layout.example(row, where)

    def location(self, index: int) -> str:
        return self._rows[index][0]
