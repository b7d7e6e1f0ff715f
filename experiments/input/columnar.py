"""Reads the rows of Parquet files, of Arrow files, and of data sets of the `datasets` library."""

import abc
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from experiments.errors import UserError, reading
from experiments.input.forms import COLUMNS
from experiments.input.opening import Content

_ROWS = 1024  # rows that are converted to Python objects at a time


class _FileRows(abc.ABC):
    """The rows of a columnar file. One block of rows at a time is converted to Python objects.

    Args:
      content: The file.

    Attributes:
      columns: All columns of the file. Rows have only the columns that a format reads.
    """

    format: ClassVar[str]

    def __init__(self, content: Content):
        self.name, self.digest = str(content.path), content.digest
        with reading(content.path, self.format):
            self.columns, self._length = self._open(content.data)
        self._columns_read = [name for name in self.columns if name in COLUMNS]
        self._rows: tuple[int, list[Any]] = (0, [])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        start, rows = self._rows
        if not self._columns_read:
            return {}
        if not start <= index < start + len(rows):
            with reading(self.location(index), self.format):
                start, table = self._block(index)
                rows = [_without_none(row) for row in table.to_pylist()]
            self._rows = start, rows
        return rows[index - start]

    def location(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"

    @abc.abstractmethod
    def _open(self, data: Any) -> tuple[tuple[str, ...], int]:
        """Returns the columns and the number of rows of the file."""

    @abc.abstractmethod
    def _block(self, index: int) -> tuple[int, Any]:
        """Returns the block that contains a row: its first row, and a table of the columns that are read."""


class ParquetRows(_FileRows):
    """The rows of a Parquet file, read by parts of row groups."""

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
            table = self._file.read_row_group(group, columns=self._columns_read)
            if table.num_rows != self._starts[group + 1] - self._starts[group]:
                raise ValueError(f"row group {group} has {table.num_rows} rows, unlike its metadata")
            self._group = group, table
        first = int(self._starts[group])
        offset = (index - first) // _ROWS * _ROWS
        return first + offset, table.slice(offset, _ROWS)


class ArrowRows(_FileRows):
    """The rows of a memory-mapped Arrow file or stream."""

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
        block = self._table.select(self._columns_read).slice(start, _ROWS)
        block.validate(full=True)  # offsets of a damaged file may be out of range
        return start, block


class TableRows:
    """The rows of a `datasets.Dataset`.

    Args:
      table: The data set.
      name: Its name, for error messages.
    """

    def __init__(self, table: Any, name: str):
        self._table, self.columns = table, tuple(table.column_names)
        self.name, self.digest = name, table_digest(table)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Any:
        with reading(self.location(index)):
            return _without_none(self._table[index])

    def location(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"


def table_digest(table: Any) -> str:
    """Returns a digest of a `datasets.Dataset`'s rows. Its fingerprint also depends on where it is stored."""
    digest = hashlib.sha256(repr(table.column_names).encode())
    for batch in table.with_format("arrow").iter(_ROWS):
        for column in batch.columns:
            digest.update(json.dumps(column.to_pylist(), default=repr).encode())
    return digest.hexdigest()


def saved_files(directory: Path) -> list[Path]:
    """Returns the Arrow files of a directory that `Dataset.save_to_disk` wrote, in the order of their rows.

    Raises:
      UserError: The directory's list of files is damaged.
    """
    state = directory / "state.json"
    with reading(state, "the state of a saved data set"):
        names = [str(file["filename"]) for file in json.loads(state.read_text("utf-8"))["_data_files"]]
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{state}: expected the names of Arrow files in the same directory")
    return [directory / name for name in names]


def saved_split(directory: Path) -> str | None:
    """Returns the name of the split in a directory that `Dataset.save_to_disk` wrote, or None.

    Raises:
      UserError: The directory's description is damaged.
    """
    state = directory / "state.json"
    with reading(state, "the state of a saved data set"):
        name = json.loads(state.read_text("utf-8")).get("_split")
    return name if isinstance(name, str) else None


def _without_none(value: Any) -> Any:
    """Removes nulls: within a column, every object has the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
