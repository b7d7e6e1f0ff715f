"""Reads the rows of JSON files: one object per line, an array of objects, or an object that contains such an array."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.errors import UserError
from experiments.input.forms import COLUMNS
from experiments.input.opening import Content, data_suffix
from experiments.input.strict_json import loads

_CHUNK = 1 << 24
_SPACE = re.compile(r"[ \t\r\n]*")
_SPAN = np.dtype((np.int64, 3))
_SLACK = 16  # an error within this many characters of a window's end may be caused by the end


class JsonRows:
    """The indexed rows of a JSON file. Only their positions are in memory.

    Lines are separated by `\\n` or `\\r\\n`; blank lines and a byte order mark are skipped.

    Args:
      content: A `.jsonl` or `.ndjson` file (one object per line), or a `.json` file (any form).
      split: The array to read if an object contains several.

    Raises:
      UserError: The rows cannot be located.
    """

    columns: tuple[str, ...] | None = None
    """None: each row has its own columns."""

    def __init__(self, content: Content, split: str):
        self.name, self.digest, self._data = str(content.path), content.digest, content.data
        begin = content.text_start()
        self._begins, self._ends, self._lines = _lines(content.data, begin)
        self._unit = "line"
        if self._is_one_value(content):
            self._begins, self._ends, self._lines = np.fromiter(_Scanner(content, begin).rows(split), _SPAN).T
            self._unit = "item"
            self.digest = hashlib.sha256(content.digest.encode() + self._begins.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Any:
        where = self.location(index)
        return loads(_decode(self._data[int(self._begins[index]) : int(self._ends[index])], where), where)

    def location(self, index: int) -> str:
        line = f"line {index + 1 if self._lines is None else self._lines[index]}"
        return f"{self.name}, {line}" if self._unit == "line" else f"{self.name}, item {index + 1} ({line})"

    def _is_one_value(self, content: Content) -> bool:
        """Whether the file is one JSON value: an array, or in a `.json` file an object over several lines."""
        if not len(self):
            return False
        if self._data[int(self._begins[0]) : int(self._begins[0]) + _SLACK].lstrip()[:1] == b"[":
            return True
        if data_suffix(content.path) != ".json":
            return False
        if len(self) == 1:
            return True
        try:
            json.loads(self._data[int(self._begins[0]) : int(self._ends[0])])
        except (ValueError, RecursionError):
            return True
        return False


def _lines(data: Any, begin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns the begins, ends and numbers of lines; None for the numbers 1, 2, …"""
    if len(data) <= begin:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), None
    view = np.frombuffer(data, np.uint8)
    breaks = [
        np.flatnonzero(view[start : start + _CHUNK] == ord("\n")) + start for start in range(0, len(view), _CHUNK)
    ]
    ends = np.concatenate([*breaks, [len(view)]]).astype(np.int64)
    begins = np.concatenate([[begin], ends[:-1] + 1])
    firsts = view[np.minimum(begins, len(view) - 1)]
    blank = np.array([i for i in np.flatnonzero(firsts <= 32) if not data[begins[i] : ends[i]].strip()], np.int64)
    if begins[-1] == len(view) and (not len(blank) or blank[-1] != len(begins) - 1):
        blank = np.append(blank, len(begins) - 1)
    if not len(blank):
        return begins, ends, None
    filled = np.delete(np.arange(len(begins)), blank)
    return begins[filled], ends[filled], None if len(filled) and filled[-1] == len(filled) - 1 else filled + 1


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason})") from None


class _Scanner:
    """Locates the rows of one large JSON value, with a part of it in memory at a time."""

    def __init__(self, content: Content, begin: int):
        self._path, self._data = content.path, content.data
        self._text, self._index = "", 0  # a window of the text, and the position in it
        self._window_end = begin  # in bytes
        self._offset, self._line = begin, 1  # of the position
        self._raw_decode = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode

    def rows(self, split: str) -> Iterator[tuple[int, int, int]]:
        """Yields (begin, end, line) of each row: offsets in bytes, and its first line."""
        if self._peek() == "[":
            yield from self._items()
        else:
            yield from self._nested(split)
        if self._peek():
            raise self._error("more text after the end of the value; for one object per line, name the file .jsonl")

    def _items(self) -> Iterator[tuple[int, int, int]]:
        self._advance(1)
        while self._peek() != "]":
            begin, line = self._offset, self._line
            self._value()
            yield begin, self._offset, line
            if self._peek() == ",":
                self._advance(1)
            elif self._peek() != "]":
                raise self._error("expected , or ] after an item")
        self._advance(1)

    def _nested(self, split: str) -> Iterator[tuple[int, int, int]]:
        """Yields the rows of an object's only array of objects, or of the array with the split's name."""
        begin, line = self._offset, self._line
        arrays, keys = {}, []
        if self._peek() != "{":
            raise self._error("expected an array of objects, or an object")
        self._advance(1)
        while self._peek() != "}":
            key = self._value() if self._peek() == '"' else None
            if key is None or self._peek() != ":":
                raise self._error("expected a key and :")
            self._advance(1)
            keys.append(key)
            if self._peek() == "[":
                arrays[key] = np.fromiter(self._items(), _SPAN)
            else:
                self._value()
            if self._peek() == ",":
                self._advance(1)
            elif self._peek() != "}":
                raise self._error("expected , or } after a value")
        self._advance(1)
        if COLUMNS & set(keys):  # the object is a record
            return iter([(begin, self._offset, line)])
        of_objects = {key: rows for key, rows in arrays.items() if len(rows) and self._data[rows[0, 0]] == ord("{")}
        if split not in of_objects and len(of_objects) != 1:
            what = ", ".join(map(str, keys[:10])) + (" and more" if len(keys) > 10 else "") or "nothing"
            raise UserError(
                f"{self._path}: got an object with {what}, expected an array of records or an object with one"
            )
        return map(tuple, of_objects[split] if split in of_objects else next(iter(of_objects.values())))

    def _peek(self) -> str:
        """Skips white space and returns the next character; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._index)
            self._advance(match.end() - self._index if match else 0)
            if self._index < len(self._text):
                return self._text[self._index]
            if not self._more():
                return ""

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._raw_decode(self._text, self._index)
            except json.JSONDecodeError as error:
                at_end = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _SLACK
                if at_end and self._more():
                    continue
                line = self._line + self._text.count("\n", self._index, error.pos)
                raise UserError(f"{self._path}, line {line}: not JSON ({error.msg.removesuffix(' at')})") from None
            except RecursionError:
                raise self._error("arrays or objects are nested too deeply") from None
            if end < len(self._text) or not self._more():  # at the end of the window a number may continue
                self._advance(end - self._index)
                return value

    def _advance(self, count: int) -> None:
        text = self._text[self._index : self._index + count]
        self._index += count
        self._offset += len(text.encode())
        self._line += text.count("\n")

    def _more(self) -> bool:
        """Doubles the window; returns False at the end of the file."""
        end = min(self._window_end + max(_CHUNK, self._window_end - self._offset), len(self._data))
        while end < len(self._data) and self._data[end] & 0xC0 == 0x80 and end > self._window_end:
            end -= 1  # not within a character
        if end == self._window_end:
            return False
        chunk = _decode(self._data[self._window_end : end], f"{self._path}, line {self._line} or after")
        self._text, self._index, self._window_end = self._text[self._index :] + chunk, 0, end
        return True

    def _error(self, what: str) -> UserError:
        return UserError(f"{self._path}, line {self._line}: not JSON ({what}), got {self._next_text()}")

    def _next_text(self) -> str:
        return repr(self._text[self._index : self._index + 20]) if self._peek() else "the end of the file"
