"""Reads a model's shape from Hugging Face's `config.json`; unsupported fields are errors that name them."""

import dataclasses
import functools
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from experiments.errors import UserError, reading

C = TypeVar("C")
R = TypeVar("R")
_LAYERS, _MOST_LAYERS = ("n_layer", "num_hidden_layers"), 10_000
_KINDS: dict[Any, str] = {
    int: "a whole number from {least} to 2,147,483,647",
    float: "a number",
    bool: "true or false",
    str: "a string",
}


def read(shape: type[C], config: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> C:
    """Returns an instance of `shape` from the fields of a `config.json` with its names; null is the same as absent.

    Args:
      shape: A dataclass with fields of type int, float, bool and str.
      config: The content of the file.
      supported: The supported values of other fields; the first is the value of an absent field.

    Raises:
      UserError: A field is missing, has another type, or has an unsupported value.
    """
    for name, values in supported.items():
        if config.get(name) is not None and config[name] not in values:
            expected = " or ".join(map(repr, values))
            raise UserError(f"config.json: {name} is {reprlib.repr(config[name])}, supported is {expected}")
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(shape):  # pyrefly: ignore[bad-argument-type]
        value = config.get(field.name)
        least = 1 if field.default is dataclasses.MISSING else 0  # optional fields may be zero
        if value is None:
            if field.default is dataclasses.MISSING:
                raise UserError(f"config.json: {field.name} is missing")
        elif field.name in _LAYERS and _fits(value, int, least) and value > _MOST_LAYERS:
            raise UserError(f"config.json: {field.name} is {value:,}, expected at most {_MOST_LAYERS:,}")
        elif not _fits(value, field.type, least):
            kind = _KINDS[field.type].format(least=least)
            raise UserError(f"config.json: {field.name} is {reprlib.repr(value)}, expected {kind}")
        else:
            fields[field.name] = value
    return shape(**fields)


def parsing(parse: Callable[..., R]) -> Callable[..., R]:
    """Decorates a function that reads the fields of a `config.json` so that every error in them is a UserError."""

    @functools.wraps(parse)
    def parsed(*args: Any) -> R:
        with reading("config.json"):
            return parse(*args)

    return parsed


def check_heads(config: Any) -> None:
    """Raises a UserError if the width is not a multiple of the number of heads."""
    if config.num_attention_heads < 1 or config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"config.json: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )


@parsing
def count_classes(config: Mapping[str, Any]) -> int:
    """Returns the number of outputs of a checkpoint's head, from `id2label`; 2 by default."""
    labels = config.get("id2label")
    return len(labels) if labels is not None else int(config.get("num_labels", 2))


def _fits(value: Any, kind: Any, least: int) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is int:
        return isinstance(value, int) and least <= value < 2**31
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 1e38
    return kind not in _KINDS or isinstance(value, kind)
