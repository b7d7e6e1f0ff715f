"""Verdicts on claims that compare two rows, from the spread over seeds."""

import math

from experiments.reports.findings import Finding, Verdict
from experiments.studies.comparison.description import Summary

WITHIN = 2.0
"""Differences of up to so many standard errors do not distinguish two rows."""


def difference(one: Summary, other: Summary) -> tuple[float, float]:
    """Returns the difference of the mean accuracies in points, and its standard error; NaN for one seed."""
    errors = [row.error / math.sqrt(len(row.results)) if len(row.results) > 1 else math.nan for row in (one, other)]
    return one.mean - other.mean, math.hypot(*errors)


def better(claim: str, one: Summary, other: Summary) -> Finding:
    """Judges the claim that one row has a higher accuracy than another."""
    points, error = difference(one, other)
    verdict: Verdict = "observed" if points > WITHIN * error else "not decided"
    return Finding(claim, "not observed" if points < -WITHIN * error else verdict, _figures(one, other, points, error))


def as_good(claim: str, one: Summary, other: Summary, margin: float = 1.0) -> Finding:
    """Judges the claim that one row is as good as another: at most `margin` points worse.

    Args:
      claim: The claim.
      one: The row that is as good.
      other: The row that it is compared with.
      margin: The points that do not count.
    """
    points, error = difference(one, other)
    return Finding(claim, not_worse(points, error, margin), _figures(one, other, points, error))


def not_worse(points: float, error: float, margin: float = 1.0) -> Verdict:
    """Judges a difference in points, with its standard error, that may be negative by at most `margin`.

    Example:
      >>> not_worse(-0.2, 0.1), not_worse(-0.2, 1.0), not_worse(-3.0, 0.1)
      ('observed', 'not decided', 'not observed')
    """
    if points + WITHIN * error < -margin:
        return "not observed"
    return "observed" if points - WITHIN * error > -margin else "not decided"


def _figures(one: Summary, other: Summary, points: float, error: float) -> str:
    spread = "one seed" if math.isnan(error) else f"± {error:.1f}"
    return f"{one.row.name} minus {other.row.name}: {points:+.1f} points ({spread})"
