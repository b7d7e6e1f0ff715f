"""A model's shape from Hugging Face's `config.json`: whatever a model does not compute is refused by name."""

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
    """The dataclass `shape` from the fields of a `config.json` that have its names; null is as good as absent.

    Args:
      shape: A dataclass of whole numbers, numbers, booleans and strings.
      config: The content of the file.
      supported: The values of other fields that the model computes; the first is what an absent field means.

    Raises:
      UserError: A field is missing, of another type, or asks for what the model does not compute.
    """
    for name, values in supported.items():
        if config.get(name) is not None and config[name] not in values:
            wanted = " or ".join(map(repr, values))
            raise UserError(f"config.json: {name} is {reprlib.repr(config[name])}, supported is {wanted}")
    given: dict[str, Any] = {}
    for field in dataclasses.fields(shape):  # pyrefly: ignore[bad-argument-type]
        value = config.get(field.name)
        least = 1 if field.default is dataclasses.MISSING else 0  # of what may be left out there may be none
        if value is None:
            if field.default is dataclasses.MISSING:
                raise UserError(f"config.json: {field.name} is missing")
        elif field.name in _LAYERS and _fits(value, int, least) and value > _MOST_LAYERS:
            raise UserError(f"config.json: {field.name} is {value:,}, expected {_MOST_LAYERS:,} at most")
        elif not _fits(value, field.type, least):
            kind = _KINDS[field.type].format(least=least)
            raise UserError(f"config.json: {field.name} is {reprlib.repr(value)}, expected {kind}")
        else:
            given[field.name] = value
    return shape(**given)


def parsing(parse: Callable[..., R]) -> Callable[..., R]:
    """Makes a function that reads a `config.json`'s fields raise a UserError for whatever it meets there."""

    @functools.wraps(parse)
    def parsed(*args: Any) -> R:
        with reading("config.json"):
            return parse(*args)

    return parsed


def check_heads(config: Any) -> None:
    """Raises a UserError where the width is not a multiple of the number of heads."""
    if config.num_attention_heads < 1 or config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"config.json: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )


@parsing
def count_classes(config: Mapping[str, Any]) -> int:
    """How many outputs the head of a checkpoint has: `id2label` says it; 2 where it is left out."""
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
