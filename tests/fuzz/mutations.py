"""Changes to valid files, by a seeded generator: bytes, JSON values and structure, safetensors headers, templates."""

import json
import random
from collections.abc import Callable
from typing import Any

DEEP = 100_000
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "\ud800", "\ufdd0", [], {}, [[]], [None], {"": None}),
    *(0, 1, -1, 2**31 - 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf")),
    *("float32", "int4", "../x", "/etc/passwd", "a" * 5000, ["in", "out"], [1, 2], {"type": "x"}),
)
TEMPLATES = (
    "{% for i in range(10**10) %}{% endfor %}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x' * 10**10 }}",
    "{% generation %}{% break %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception('no') }}",
    "{{ messages[10**9] }}",
    "{{ undefined.attribute }}",
    "{% set ns = namespace(x=messages) %}{{ ns.x | tojson | length // 0 }}",
    "{{",
    "{% if %}",
)


def mutated(name: str, content: bytes, rng: random.Random) -> bytes:
    """A file's content with one to three changes of its kind, or of its bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(_kinds(name))(content, rng)
    return content


def _kinds(name: str) -> list[Callable[[bytes, random.Random], bytes]]:
    if name.endswith((".json", ".jsonl")) or name in ("_METADATA", "_CHECKPOINT_METADATA"):
        return [_bytes, _json, _json, _json, _nested, _doubled]
    if name.endswith(".safetensors"):
        return [_bytes, _bytes, _header]
    if name.endswith(".jinja"):
        return [_bytes, _template, _template]
    return [_bytes]


def _bytes(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    at = rng.randrange(len(data)) if data else 0
    end = min(len(data), at + rng.choice((1, 2, 8, 64, 1024)))
    match rng.randrange(7):
        case 0 if data:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            del data[at:]
        case 2:
            del data[at:end]
        case 3:
            data[at:at] = data[at:end]
        case 4:
            data[at:end] = b"\xff" * (end - at)
        case 5:
            data[at:at] = rng.choice((b"\x00" * 8, b"\xef\xbb\xbf", b"\r\n", b"\xed\xa0\x80", b'"', b"{", b"9" * 5000))
        case 6:
            data.clear()
    return bytes(data)


def _lines(content: bytes, rng: random.Random, change: Callable[[Any], str]) -> bytes:
    """Changes a JSON document, or one line of several."""
    text = content.decode("utf-8", "replace")
    try:
        return change(json.loads(text)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        lines = text.splitlines()
    if not lines:
        return content
    number = rng.randrange(len(lines))
    try:
        lines[number] = change(json.loads(lines[number]))
    except (ValueError, RecursionError):
        return _bytes(content, rng)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _json(content: bytes, rng: random.Random) -> bytes:
    return _lines(content, rng, lambda value: json.dumps(_changed(value, rng), ensure_ascii=rng.random() < 0.5))


def _entry(value: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """A container and a key in it: near the top as often as deep inside, however large a part is."""
    entry = None
    while isinstance(value, dict | list) and value:
        entry = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.35:
            break
        value = value[entry[1]]
    return entry


def _changed(value: Any, rng: random.Random) -> Any:
    entry = _entry(value, rng)
    if entry is None or rng.random() < 0.03:
        return rng.choice(VALUES)
    parent, key = entry
    match rng.randrange(5):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[rng.choice(("x", "", "\ud800", f"{key} "))] = parent.pop(key)
        case 2 if isinstance(parent, dict):
            parent[f"{key}_"] = rng.choice(VALUES)
        case 3 if isinstance(parent, list):
            parent += parent[:1] * rng.choice((1, 500))
        case _:
            parent[key] = rng.choice(VALUES)
    return value


def _marked(content: bytes, rng: random.Random, text: str) -> bytes:
    """Puts a text that `json` would not write in the place of a value."""

    def change(value: Any) -> str:
        entry = _entry(value, rng)
        if entry is None:
            return text
        parent, key = entry
        parent[key] = "\x00 here"
        return json.dumps(value).replace(json.dumps("\x00 here"), text)

    return _lines(content, rng, change)


def _nested(content: bytes, rng: random.Random) -> bytes:
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    text = opening * DEEP + "1" + closing * DEEP
    return _marked(content, rng, rng.choice((text, "1" * 5000, "1e999", "NaN", "-Infinity", '"\\ud800"')))


def _doubled(content: bytes, rng: random.Random) -> bytes:
    """A key twice in one object."""

    def change(value: Any) -> str:
        if not isinstance(value, dict) or not value:
            return json.dumps(value)
        key = rng.choice(list(value))
        return json.dumps(value)[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice(VALUES))}}}"

    return _lines(content, rng, change)


def _header(content: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    if size > len(content):
        return _bytes(content, rng)
    header = rng.choice((_json, _json, _nested, _bytes, _more_tensors))(content[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _more_tensors(content: bytes, rng: random.Random) -> bytes:
    """A header with 500 empty tensors that nobody expects."""

    def change(value: Any) -> str:
        entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        tensors = value if isinstance(value, dict) else {}  # an earlier mutation may have left another value
        return json.dumps({**{f"extra.{number}.weight": entry for number in range(500)}, **tensors})

    return _lines(content, rng, change)


def _template(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(TEMPLATES).encode() + content[at:]
