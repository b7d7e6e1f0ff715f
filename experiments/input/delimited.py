"""CSV and TSV files in the dialect of Python's csv module: quoted fields may contain delimiters and line breaks."""

import csv
import io
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from experiments.errors import UserError
from experiments.input.opening import Content

DELIMITERS = {".csv": ",", ".tsv": "\t"}


class DelimitedRows:
    """The rows of a table with a header. Only their positions are kept in memory. Blank lines are skipped.

    Args:
      content: The file, in UTF-8.
      delimiter: The separator of fields.

    Attributes:
      columns: The names in the header.

    Raises:
      UserError: The header is malformed or has a column twice.
    """

    def __init__(self, content: Content, delimiter: str):
        csv.field_size_limit(sys.maxsize)  # the default is 131,072 characters
        self.name, self.digest = str(content.path), content.digest
        self._data, self._delimiter = content.data, delimiter
        spans = np.fromiter(self._spans(content.text_start()), np.dtype((np.int64, 3)))
        self._begins, self._ends, self._lines = spans.T
        self.columns = tuple(self._fields(0)) if len(spans) else ()
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if twice:
            raise UserError(f"{self._location_of(0)}: the header has the column {twice[0]!r} twice")

    def __len__(self) -> int:
        return max(len(self._begins) - 1, 0)

    def __getitem__(self, index: int) -> dict[str, str]:
        fields = self._fields(index + 1)
        if len(fields) != len(self.columns):
            raise UserError(
                f"{self.location(index)}: {len(fields)} columns, expected {len(self.columns)} as in the header; fields "
                "that contain a delimiter, a quote or a line break must be quoted"
            )
        return dict(zip(self.columns, fields))

    def location(self, index: int) -> str:
        return self._location_of(index + 1)

    def _location_of(self, record: int) -> str:
        return f"{self.name}, line {self._lines[record]}"

    def _fields(self, record: int) -> list[str]:
        location = self._location_of(record)
        try:
            text = self._data[int(self._begins[record]) : int(self._ends[record])].decode("utf-8")
            return next(self._reader(io.StringIO(text, newline="\n")))
        except UnicodeDecodeError as error:
            raise UserError(f"{location}: not UTF-8 ({error.reason})") from None
        except (csv.Error, StopIteration) as error:
            raise UserError(f"{location}: not a valid CSV row ({error})") from None

    def _spans(self, begin: int) -> Iterator[tuple[int, int, int]]:
        """Yields (begin, end, first line) of the header and of each row."""
        consumed = lines = 0

        def texts() -> Iterator[str]:
            nonlocal consumed, lines
            position = begin
            while position < len(self._data):
                end = self._data.find(b"\n", position) + 1 or len(self._data)
                consumed, lines = end, lines + 1
                yield self._data[position:end].decode("utf-8", "surrogateescape")
                position = end

        reader = self._reader(texts())
        while True:
            start, line = consumed or begin, lines + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error:  # _fields raises it again when the row is read
                fields = [""]
            if fields:
                yield start, consumed, line

    def _reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self._delimiter, strict=True)
