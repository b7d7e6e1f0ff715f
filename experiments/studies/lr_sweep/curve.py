"""The validation loss of one method by learning rate."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from experiments.reports.results import read_record, write_json

WITHIN = 2.0
"""Differences of up to so many standard errors do not distinguish two losses."""


@dataclass(frozen=True)
class Curve:
    """The validation loss of one method by learning rate.

    Attributes:
      model: The base.
      name: The method, such as `LoRA, rank 8`.
      rates: The learning rates, ascending.
      losses: The mean validation loss of each rate; None if training diverged.
      errors: The standard error of each loss's difference from the smallest one, over the same examples; empty if
        losses of single examples are not known.
      examples: The losses of the examples at the best rate; empty if they are not known.
      accuracies: The validation accuracy of each rate; empty for a decoder.
      start: The validation loss before training.
      rule: The learning rate of the published rule.
      seconds: Time of training and evaluation, including compilation.
    """

    model: str
    name: str
    rates: list[float]
    losses: list[float | None]
    errors: list[float | None]
    examples: list[float]
    accuracies: list[float | None]
    start: float
    rule: float
    seconds: float

    @property
    def best(self) -> int:
        """The index of the smallest loss."""
        return int(np.nanargmin(self._losses()))

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the first or the last one, so that a better one may lie beyond."""
        return self.best in (0, len(self.rates) - 1)

    @property
    def best_rate(self) -> float:
        """The tried rate with the smallest loss."""
        return self.rates[self.best]

    @property
    def as_good(self) -> list[float]:
        """The rates whose loss is not distinguished from the smallest one."""
        best, errors = self.best, self.errors or [0.0] * len(self.rates)
        differences = self._losses() - self._losses()[best]
        return [
            rate
            for index, (rate, difference, error) in enumerate(zip(self.rates, differences, errors))
            if index == best or (error is not None and difference <= WITHIN * error)
        ]

    def nearest(self, rate: float) -> int:
        """Returns the index of the tried rate that is nearest to a rate, by their ratio."""
        return int(np.argmin(np.abs(np.log(self.rates) - math.log(rate))))

    def _losses(self) -> np.ndarray:
        return np.array([math.nan if loss is None else loss for loss in self.losses])

    def save(self, path: Path) -> None:
        """Writes the curve as JSON, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Curve":
        """Reads a curve that :meth:`save` wrote."""
        return read_record(path, cls, {})


def measured(
    model: str,
    name: str,
    rates: list[float],
    losses: np.ndarray,
    accuracies: np.ndarray,
    *,
    start: float,
    rule: float,
    seconds: float,
) -> Curve:
    """Returns the curve of losses of single examples.

    Args:
      model: See :class:`Curve`, also for the other arguments that are not described here.
      name: The method.
      rates: The learning rates.
      losses: `float[examples, rates]`; NaN if training diverged.
      accuracies: `float[rates]`; NaN if training diverged.
      start: The loss before training.
      rule: The learning rate of the published rule.
      seconds: Time of training and evaluation.
    """
    means = losses.mean(axis=0)
    best = losses[:, int(np.nanargmin(means))]
    errors = (losses - best[:, None]).std(axis=0, ddof=1) / math.sqrt(len(losses))
    columns = [[None if math.isnan(x) else float(x) for x in values] for values in (means, errors, accuracies)]
    return Curve(
        model,
        name,
        rates,
        losses=columns[0],
        errors=columns[1],
        examples=np.round(best, 6).tolist(),
        accuracies=columns[2],
        start=start,
        rule=rule,
        seconds=seconds,
    )
