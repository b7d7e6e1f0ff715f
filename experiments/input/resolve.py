"""What a name stands for: files, directories, data sets that are saved, shipped or on the hub."""

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from experiments.errors import UserError
from experiments.input import layout
from experiments.input.columnar import ArrowRows, ParquetRows, TableRows, saved_files, saved_split
from experiments.input.delimited import DELIMITERS, DelimitedRows
from experiments.input.forms import FormName, parse
from experiments.input.json_rows import JsonRows
from experiments.input.opening import COMPRESSED, data_suffix, open_content
from experiments.input.records import Completion, Record
from experiments.tasks import examples
from lora_jax.reading import reason


class Rows(Protocol):
    """Rows of a file by number, before they are records.

    Attributes:
      name: Of the file.
      digest: Of its content.
      columns: Of the whole table; None where each row has its own.
    """

    name: str
    digest: str

    @property
    def columns(self) -> tuple[str, ...] | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def place(self, index: int, /) -> str:
        """The file, and the line, row or item."""
        ...


class Source(Protocol):
    """All records of one file or data set.

    Attributes:
      name: Of the file or data set.
      digest: Of what the records hold.
    """

    name: str
    digest: str

    def __len__(self) -> int: ...

    def read(self, index: int, /) -> tuple[str, Record]:
        """The format and the record of a number; a UserError where it is malformed."""
        ...

    def place(self, index: int, /) -> str:
        """Where a record is, for errors."""
        ...


def resolve(data: str, split: str, form: FormName | None = None, *, beside: bool = False) -> list[Source]:
    """The files or data sets of a split.

    Args:
      data: A name, as for :func:`experiments.input.sources.splits`, without a weight.
      split: `train`, `validation` or `test`.
      form: The format; None detects it.
      beside: Only those beside what `data` itself names: a single file has none, nor has `DATASET:SPLIT`.

    Returns:
      One for each file; none where a directory or a data set has no such split.

    Raises:
      UserError: There is nothing of that name, it cannot be read, or it has no records.
    """
    path = Path(data)
    if _is_directory(data):
        return _directory(data, split, form, beside=beside)
    directory, _, name = data.rpartition(":")
    if directory and _is_directory(directory) and not path.exists():
        return [] if beside else _directory(directory, name, form, named=True)
    if path.is_file():
        return [] if beside else _files([path], split, form)
    if path.exists():
        raise UserError(f"{data}: neither a file nor a directory, but a pipe or a device; write it to a file first")
    if Path(directory).is_file() or (glob.has_magic(directory) and data_suffix(Path(directory)) in layout.SUFFIXES):
        raise UserError(f"{data}: {name} is no weight; expected a positive number, as in {directory}:2")
    if glob.has_magic(data):
        return [] if beside else _files(layout.matching(data), split, form)
    dataset = data.partition(":")[0]
    if data.startswith((".", "/", "~")) or dataset.count("/") != 1 or data_suffix(path) in layout.SUFFIXES:
        shipped = ", ".join(examples.SHIPPED)
        raise UserError(
            f"{data}: no such file or directory, and neither {shipped} nor a data set's name (ORGANIZATION/DATASET)"
        )
    return [] if beside and ":" in data else hub(data, split, form)


def _is_directory(data: str) -> bool:
    return data in examples.SHIPPED or Path(data).is_dir()


def _directory(
    data: str, split: str, form: FormName | None, *, beside: bool = False, named: bool = False
) -> list[Source]:
    path = examples.SHIPPED.get(data, Path(data))
    if (path / "labels.txt").exists():
        return [] if beside and not list(path.glob(f"{split}.tsv*")) else [Labeled(data, split)]
    if (path / "state.json").is_file():  # of one split, saved by the datasets library
        if named:
            layout.chosen([saved_split(path) or "train"], split, data, named=True)
        return [] if beside else _files(saved_files(path), split, form)
    if (path / "dataset_dict.json").is_file():
        names = [folder.parent.name for folder in path.glob("*/state.json")]
        name = layout.chosen(names, split, data, named=named)
        return [] if name is None else _files(saved_files(path / name), split, form)
    return _files(layout.in_directory(path, split, beside=beside, named=named), split, form)


def _files(paths: Sequence[Path], split: str, form: FormName | None) -> list[Source]:
    sources: list[Source] = [File(_rows(path, split), form) for path in paths]
    if sources and not any(map(len, sources)):
        raise UserError(f"{' and '.join(map(str, paths[:3]))}: the file has no records")
    return sources


def _rows(path: Path, split: str) -> Rows:
    suffix = data_suffix(path)
    if suffix not in layout.SUFFIXES:
        raise UserError(
            f"{path}: expected a name that ends in {', '.join(layout.SUFFIXES)}, and then perhaps in "
            f"{', '.join(COMPRESSED)}; found {path.suffix or 'none'}"
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
    """The rows of a file or of a data set, as records.

    Args:
      rows: From a file.
      form: The format; None detects that of each row.
    """

    def __init__(self, rows: Rows, form: FormName | None):
        self._rows, self._form = rows, form
        self.name = rows.name
        self.digest = hashlib.sha256(f"{rows.digest} {form}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> tuple[str, Record]:
        where = self.place(index)
        return parse(self._rows[index], where, self._form, self._rows.columns)

    def place(self, index: int) -> str:
        return self._rows.place(index)


class Labeled:
    """Labeled texts of :mod:`experiments.tasks.examples`: a text is asked for by the name of its label."""

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

    def place(self, index: int) -> str:
        return f"{self.name} example {index + 1}"


def hub(name: str, split: str, form: FormName | None = None) -> list[Source]:
    """A split of a data set on the Hugging Face hub; nothing if it has none for validation.

    Args:
      name: `ORG/NAME`, `ORG/NAME:SPLIT` or `ORG/NAME:CONFIG:SPLIT`.
      split: `train`, `validation` or `test`; the name's own has precedence.
      form: The format; None detects it.

    Raises:
      UserError: There is no network, no such data set, or no such split.
    """
    dataset, *rest = name.split(":")
    config = rest[0] if len(rest) > 1 else None
    split = rest[-1] if rest else split
    import datasets  # takes seconds, and only this needs it

    try:
        tables = datasets.load_dataset(dataset, config)
    except Exception as error:  # whatever the library, the network and a data set's own files raise
        raise UserError(
            f"{':'.join([dataset, *rest[:-1], split])}: no such file, and not to be had from the hub as "
            f"ORGANIZATION/DATASET:SPLIT or ORGANIZATION/DATASET:CONFIG:SPLIT ({reason(error)})"
        ) from None
    names = [str(name) for name in tables]
    chosen = layout.chosen(names, split, ":".join([dataset, *rest[:-1]]), named=bool(rest))
    if chosen is None:
        return []
    return [File(TableRows(tables[chosen], ":".join([dataset, *rest[:-1], chosen])), form)]
