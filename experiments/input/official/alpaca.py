"""Alpaca: 52,002 instructions with answers of text-davinci-003; some answers are empty (`--on-bad skip`).

References:
  Taori et al., `Stanford Alpaca <https://github.com/tatsu-lab/stanford_alpaca>`_, 2023
"""

from typing import Any

from experiments.input.forms import parse
from experiments.input.official.layout import Example, Layout


def _example(row: Any, where: str) -> Example:
    record = parse(row, where, "alpaca")[1]
    return Example(record, (row["output"],))


LAYOUT = Layout(
    "alpaca",
    {"train": [["alpaca_data.json"], ["alpaca_data_cleaned.json"], ["data/alpaca_data.json"]]},
    _example,
    hub="tatsu-lab/alpaca",
)
