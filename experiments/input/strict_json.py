"""A strict JSON reader: it also rejects what Python's reader accepts, and raises one type of error."""

import json
import math
import re
from typing import Any

from experiments.errors import UserError

_MAX_DEPTH = 200
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def loads(text: str, where: str) -> Any:
    """Parses a JSON text.

    Args:
      text: The text of one value.
      where: The location of the text, for error messages.

    Raises:
      UserError: The text is not valid JSON; or an object has a key twice, a number is NaN, infinite or thousands of
        digits long, values are nested too deeply, or a string is not valid Unicode.

    Example:
      >>> loads('{"a": 1, "a": 2}', "x.jsonl, line 3")
      Traceback (most recent call last):
        ...
      experiments.errors.UserError: x.jsonl, line 3: the key "a" appears twice in an object
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg.removesuffix(' at')} at column {error.colno})") from None
    except _Invalid as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: arrays or objects are nested more than {_MAX_DEPTH} deep") from None
    except ValueError:
        raise UserError(f"{where}: a number has too many digits") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise UserError(
                f"{where}: invalid Unicode, a lone surrogate ({half}); probably a text was cut within an emoji"
            ) from None
    level, depth = [value], 0
    while level := [child for parent in level if isinstance(parent, dict | list) for child in _children(parent)]:
        depth += 1
        if depth > _MAX_DEPTH:
            raise UserError(f"{where}: arrays or objects are nested more than {_MAX_DEPTH} deep")
    return value


def kind(value: Any) -> str:
    """Returns the JSON type of a value, with an article.

    Example:
      >>> kind([]), kind(None), kind(1.5)
      ('an empty list', 'null', 'a number')
    """
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if isinstance(value, list | str) and not value:
        return f"an empty {names[type(value)].split()[-1]}"
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


class _Invalid(Exception):
    """A well-formed but ambiguous value. Not a ValueError, to differ from decoding errors."""


def _children(parent: dict[str, Any] | list[Any]) -> Any:
    return parent.values() if isinstance(parent, dict) else parent


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Invalid(f"the key {json.dumps(twice)} appears twice in an object")
    return value


def _constant(name: str) -> None:
    raise _Invalid(f"the number {name}, which is not valid JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Invalid(f"the number {digits[:20]}, which exceeds the range of floating point")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
