"""Verdicts on claims that compare the scores of two models' answers, as of independent examples."""

import math
from dataclasses import dataclass

from experiments.reports import verdicts
from experiments.reports.findings import Finding


@dataclass(frozen=True)
class Scored:
    """The score of a model.

    Attributes:
      name: The name of the model in tables.
      measure: The name of the score.
      score: The score, from 0 to 100.
      error: Its standard error over the examples.
    """

    name: str
    measure: str
    score: float
    error: float


def better(claim: str, one: Scored, other: Scored) -> Finding:
    """Judges the claim that one score is higher than another."""
    points, error, evidence = _difference(one, other)
    return Finding(claim, verdicts.positive(points, error), evidence)


def as_good(claim: str, one: Scored, other: Scored) -> Finding:
    """Judges the claim that one score is at most one point worse than another."""
    return verdicts.as_good(claim, *_difference(one, other))


def _difference(one: Scored, other: Scored) -> tuple[float, float, str]:
    points, error = one.score - other.score, math.hypot(one.error, other.error)
    return points, error, f"{one.measure}, {one.name} minus {other.name}: {points:+.1f} ± {error:.1f}"
