"""Verdicts on claims that compare the scores of two models' answers, as of independent examples."""

import math
from dataclasses import dataclass

from experiments.reports.findings import Finding, Verdict
from experiments.studies.comparison.judge import STANDARD_ERRORS, not_worse


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
    verdict: Verdict = "observed" if points > STANDARD_ERRORS * error else "not decided"
    return Finding(claim, "not observed" if points < -STANDARD_ERRORS * error else verdict, evidence)


def as_good(claim: str, one: Scored, other: Scored) -> Finding:
    """Judges the claim that one score is at most one point worse than another."""
    points, error, evidence = _difference(one, other)
    return Finding(claim, not_worse(points, error), f"{evidence}; up to 1 point worse is as good")


def _difference(one: Scored, other: Scored) -> tuple[float, float, str]:
    points, error = one.score - other.score, math.hypot(one.error, other.error)
    return points, error, f"{one.measure}, {one.name} minus {other.name}: {points:+.1f} ± {error:.1f}"
