"""The settings of papers for studies of decoders, which `--paper NAME` puts in place of the defaults."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")


def preset(config: C, name: str, values: Mapping[str, Any], fast: Mapping[str, Any]) -> C:
    """Returns a paper's settings for the model and the data of a config, before the flags that win over them.

    Args:
      config: A config with `paper`, `model`, `data`, `out` and `fast`.
      name: What the name of the output directory ends in.
      values: The values of the paper by field.
      fast: The values of the smallest complete study, which win over the paper's if `config.fast`.
    """
    kind: Any = type(config)
    chosen = {field: getattr(config, field) for field in ("paper", "model", "data", "fast")}
    if chosen["fast"]:
        name, values = f"{name}-fast", {**values, **fast}
    return kind(**{**values, **chosen, "out": Path(f"{kind.out}-{name}")})
