"""Columnar files row by row: Parquet, Arrow as the `datasets` library saves it, and its tables in memory."""

import abc
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from experiments.errors import UserError, reading
from experiments.input.forms import COLUMNS
from experiments.input.opening import Content

_ROWS = 1024  # that are Python objects at a time


class _FileRows(abc.ABC):
    """Rows of a columnar file; the rows of one block are Python objects at a time.

    Args:
      content: Of the file.

    Attributes:
      columns: All columns of the file. Rows have those that a format reads.
    """

    format: ClassVar[str]

    def __init__(self, content: Content):
        self.name, self.digest = str(content.path), content.digest
        with reading(content.path, self.format):
            self.columns, self._length = self._open(content.data)
        self._read = [name for name in self.columns if name in COLUMNS]
        self._rows: tuple[int, list[Any]] = (0, [])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        start, rows = self._rows
        if not self._read:
            return {}
        if not start <= index < start + len(rows):
            with reading(self.place(index), self.format):
                start, table = self._block(index)
                rows = [_without_none(row) for row in table.to_pylist()]
            self._rows = start, rows
        return rows[index - start]

    def place(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"

    @abc.abstractmethod
    def _open(self, data: Any) -> tuple[tuple[str, ...], int]:
        """The file's columns and its number of rows."""

    @abc.abstractmethod
    def _block(self, index: int) -> tuple[int, Any]:
        """The first row of the block that holds a row, and the block as a table of the columns that are read."""


class ParquetRows(_FileRows):
    """Rows of a Parquet file, a part of one row group at a time."""

    format = "Parquet"

    def _open(self, data: Any) -> tuple[tuple[str, ...], int]:
        import pyarrow
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(pyarrow.py_buffer(data)))
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        if sum(sizes) != metadata.num_rows or min(sizes, default=0) < 0:
            raise ValueError("the sizes of row groups do not add up to the number of rows")
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self._group: tuple[int, Any] = (-1, None)
        return tuple(self._file.schema_arrow.names), metadata.num_rows

    def _block(self, index: int) -> tuple[int, Any]:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        number, table = self._group
        if group != number:
            table = self._file.read_row_group(group, columns=self._read)
            if table.num_rows != self._starts[group + 1] - self._starts[group]:
                raise ValueError(f"row group {group} holds {table.num_rows} rows, and its metadata says another number")
            self._group = group, table
        first = int(self._starts[group])
        offset = (index - first) // _ROWS * _ROWS
        return first + offset, table.slice(offset, _ROWS)


class ArrowRows(_FileRows):
    """Rows of an Arrow file or stream, mapped into memory."""

    format = "Arrow"

    def _open(self, data: Any) -> tuple[tuple[str, ...], int]:
        import pyarrow

        is_file = data[:6] == b"ARROW1"
        self._table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(
            pyarrow.py_buffer(data)
        ).read_all()
        self._table.validate()
        return tuple(self._table.column_names), self._table.num_rows

    def _block(self, index: int) -> tuple[int, Any]:
        start = index // _ROWS * _ROWS
        block = self._table.select(self._read).slice(start, _ROWS)
        block.validate(full=True)  # offsets of a damaged file point anywhere
        return start, block


class TableRows:
    """Rows of a `datasets.Dataset`.

    Args:
      table: The data set.
      name: What errors call it.
    """

    def __init__(self, table: Any, name: str):
        self._table, self.columns = table, tuple(table.column_names)
        self.name, self.digest = name, table_digest(table)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Any:
        with reading(self.place(index)):
            return _without_none(self._table[index])

    def place(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"


def table_digest(table: Any) -> str:
    """Of a `datasets.Dataset`'s rows. Its own fingerprint depends on where it is stored as well."""
    digest = hashlib.sha256(repr(table.column_names).encode())
    for batch in table.with_format("arrow").iter(_ROWS):
        for column in batch.columns:
            digest.update(json.dumps(column.to_pylist(), default=repr).encode())
    return digest.hexdigest()


def saved_files(directory: Path) -> list[Path]:
    """The Arrow files of a directory that `Dataset.save_to_disk` wrote, in the order of their rows.

    Raises:
      UserError: The directory's own list of them cannot be read.
    """
    state = directory / "state.json"
    with reading(state, "the state of a saved data set"):
        names = [str(file["filename"]) for file in json.loads(state.read_text("utf-8"))["_data_files"]]
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{state}: expected the names of Arrow files in the same directory")
    return [directory / name for name in names]


def saved_split(directory: Path) -> str | None:
    """The name of the split that a directory of :func:`saved_files` was, if it was one of a data set.

    Raises:
      UserError: The directory's own description cannot be read.
    """
    state = directory / "state.json"
    with reading(state, "the state of a saved data set"):
        name = json.loads(state.read_text("utf-8")).get("_split")
    return name if isinstance(name, str) else None


def _without_none(value: Any) -> Any:
    """Without what is missing: in a column every object has the keys of all others, as null."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
