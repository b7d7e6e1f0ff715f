"""A table of names as JSON, which `adapter.json` may have."""

import dataclasses
from typing import Any

from lora_jax.peft.names import Fused, Names
from lora_jax.peft.weights import Weight


def describe_names(names: Names) -> dict[str, Any]:
    """Returns a table as JSON's objects and lists, without empty fields.

    Example:
      >>> names = Names((Weight("up/kernel", "up.weight", "in out -> out in"),))
      >>> describe_names(names)
      {'weights': [{'path': 'up/kernel', 'name': 'up.weight', 'layout': 'in out -> out in'}]}
      >>> parse_names("adapter.json", describe_names(names)) == names
      True
    """
    content = dataclasses.asdict(names)
    rows = {key: [_filled(row) for row in content[key]] for key in ("weights", "fused")}
    return _filled(content | rows)


def _filled(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items() if value}


def _parse_row(row: dict[str, Any]) -> Weight:
    fields: dict[str, Any] = {**row, "tied": tuple(row.get("tied", ()))}
    return Weight(**fields)


def parse_names(where: str, content: Any) -> Names:
    """Returns the table that :func:`describe_names` described.

    Args:
      where: The file, for messages.
      content: The description.

    Raises:
      ValueError: It is not a description of a table.
    """
    try:
        weights = tuple(_parse_row(row) for row in content["weights"])
        fused = tuple(Fused(row["parameter"], tuple(row["parts"])) for row in content.get("fused", ()))
        return Names(weights, prefix=content.get("prefix", ""), fused=fused)
    except (TypeError, LookupError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: 'names' is not a table of names ({error}).") from None
