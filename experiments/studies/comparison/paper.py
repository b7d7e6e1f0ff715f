"""Applies the setting of a paper to a comparison: its model, the hyperparameters of single rows, and its values."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.configs.comparison import FAST, Comparison, PaperComparison
from experiments.configs.papers import Preset
from experiments.errors import UserError
from experiments.models import checkpoint, location
from experiments.studies.comparison.description import Row

_RATES = ("lr", "full_lr", "prefix_lr")
"""The fields of configs that are the `rates` of rows."""


def preset(config: Comparison) -> Preset | None:
    """Returns the preset that a config names; None without one."""
    return config.PRESETS[config.paper] if isinstance(config, PaperComparison) and config.paper else None


def notes(config: Comparison) -> list[str]:
    """Returns sentences about the paper's setting and the differences from it; none without a paper.

    Raises:
      UserError: The model is of another architecture than the paper's.
    """
    if not isinstance(config, PaperComparison) or (setting := preset(config)) is None:
        return []
    content = checkpoint.read_config(location.find(config.model))
    kind, width = content.get("model_type", "bert"), content.get("hidden_size")
    if setting.model_type is not None and kind != setting.model_type:
        raise UserError(f"--paper {config.paper}: {config.model} is of the type {kind}, expected {setting.model}")
    lines = [f"Setting: {setting.source}.", *setting.notes]
    if setting.width is not None and isinstance(width, int) and width != setting.width:
        lines.append(f"The paper's model has a width of {setting.width:,}, this one {width:,}.")
    return lines


def heading(config: Comparison) -> str:
    """Returns the heading of the column of the paper's results; empty if it is that of the study."""
    if not isinstance(config, PaperComparison) or (setting := preset(config)) is None or setting.heading is None:
        return ""
    return setting.heading(config.task())


def of_gpt3(config: PaperComparison, results: str) -> str:
    """Returns the paper's results of GPT-3 as the table shows them.

    Args:
      config: The config, whose setting may be that of GPT-3 on MNLI.
      results: The results on WikiSQL and MNLI, as in `73.4 / 91.3`; in this setting, that on MNLI is returned.
    """
    return results.rpartition(" / ")[2] if config.paper == "gpt-3" else results


def rows(config: Comparison, rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with the paper's hyperparameters that differ by row, unless a flag or `fast` sets them."""
    if not isinstance(config, PaperComparison) or (setting := preset(config)) is None:
        return list(rows)
    usual, by_row = config.preset(), setting.rows(config.task())
    fast = FAST if config.fast else {}

    def fields(row: Row) -> dict[str, Any]:
        values = next((values for pattern, values in by_row.items() if re.search(pattern, row.name)), {})
        result = {name: value for name, value in values.items() if name == "paper"}
        for name, value in values.items() if row.rates else ():
            if name != "paper" and name not in fast and getattr(config, name) == getattr(usual, name):
                result["rates" if name in _RATES else name] = value
        return result

    return [replace(row, **fields(row)) for row in rows]
