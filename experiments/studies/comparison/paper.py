"""Applies the setting of a paper to a comparison: its model, the hyperparameters of single rows, and its values."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.configs.comparison import Comparison
from experiments.configs.papers import Preset
from experiments.errors import UserError
from experiments.models import checkpoint, location
from experiments.studies.comparison.description import Row

_FLAGS = {"rates": ("lr", "full_lr", "prefix_lr"), "epochs": ("epochs",), "batch_size": ("batch_size",)}
"""The fields of a config that win over a field of a row."""


def notes(config: Comparison) -> list[str]:
    """Returns sentences about the paper's setting and the differences from it; none without a paper.

    Raises:
      UserError: The model is of another architecture than the paper's.
    """
    preset = _preset(config)
    if preset is None:
        return []
    content = checkpoint.read_config(location.find(config.model))
    kind, width = content.get("model_type", "bert"), content.get("hidden_size")
    if preset.model_type is not None and kind != preset.model_type:
        raise UserError(f"--paper {config.paper}: {config.model} is of the type {kind}, expected {preset.model}")
    lines = [f"Setting: {preset.source}.", *preset.notes]
    if preset.width is not None and width != preset.width:
        lines.append(f"The paper's model has a width of {preset.width:,}, this one {width:,}.")
    return lines


def heading(config: Comparison) -> str:
    """Returns the heading of the column of the paper's values; empty if it is that of the study."""
    preset = _preset(config)
    return "" if preset is None or preset.heading is None else preset.heading(_task(config, preset))


def rows(config: Comparison, rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with the paper's hyperparameters that differ by row, unless a flag sets them."""
    preset = _preset(config)
    if preset is None:
        return list(rows)
    usual = config.preset()
    by_row = preset.rows(_task(config, preset))

    def changed(name: str) -> bool:
        fields = [field for field in _FLAGS.get(name, ()) if hasattr(config, field)]
        return any(getattr(config, field) != getattr(usual, field) for field in fields)

    def fields(row: Row) -> dict[str, Any]:
        values = next((values for pattern, values in by_row.items() if re.search(pattern, row.name)), {})
        hyperparameters = {name: value for name, value in values.items() if row.rates or name == "paper"}
        return {name: value for name, value in hyperparameters.items() if not changed(name)}

    return [replace(row, **fields(row)) for row in rows]


def _preset(config: Comparison) -> Preset | None:
    return config.PRESETS[config.paper] if config.paper else None


def _task(config: Comparison, preset: Preset) -> str:
    return preset.task(str(config.paper), config.model, type(config).model, config.data)
