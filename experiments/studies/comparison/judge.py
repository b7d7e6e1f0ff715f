"""Verdicts on claims that compare two rows, from paired differences over test examples and seeds."""

import math
from collections.abc import Sequence

import numpy as np

from experiments.reports.findings import Finding, Verdict
from experiments.studies.comparison.description import Summary

STANDARD_ERRORS = 2.0
"""Differences of up to so many standard errors do not distinguish two rows."""


def difference(one: Summary, other: Summary) -> tuple[float, float]:
    """Returns the difference of the test scores in points, and its standard error; NaN if all runs diverged.

    Differences are paired: by test example, and by seed if both rows ran with the same ones. The error combines the
    variance over examples and that over seeds.
    """
    if not one.contributions or not other.contributions:
        return math.nan, math.nan
    pairs = np.array(one.contributions, float), np.array(other.contributions, float)
    if len(pairs[0]) != len(pairs[1]):  # a head alone, or runs that diverged: seeds are not paired
        by_seed = sum(rows.mean(axis=1).var(ddof=1) / len(rows) for rows in pairs if len(rows) > 1)
        by_example = pairs[0].mean(axis=0) - pairs[1].mean(axis=0)
    else:
        differences = pairs[0] - pairs[1]
        by_seed = differences.mean(axis=1).var(ddof=1) / len(differences) if len(differences) > 1 else 0.0
        by_example = differences.mean(axis=0)
    error = math.sqrt(float(by_seed) + by_example.var(ddof=1) / len(by_example))
    return one.mean - other.mean, 100 * error


def best(rows: Sequence[Summary]) -> Summary:
    """Returns the row with the best validation score; of equal ones, and if all diverged, the first."""
    return rows[int(np.argmax(np.nan_to_num([row.validation for row in rows], nan=-np.inf)))]


def better(claim: str, one: Summary, other: Summary) -> Finding:
    """Judges the claim that one row has a higher score than another."""
    points, error = difference(one, other)
    verdict: Verdict = "observed" if points > STANDARD_ERRORS * error else "not decided"
    refuted = points < -STANDARD_ERRORS * error
    return Finding(claim, "not observed" if refuted else verdict, _evidence(one, other, points, error))


def as_good(claim: str, one: Summary, other: Summary, margin: float = 1.0) -> Finding:
    """Judges the claim that one row is as good as another: at most `margin` points worse.

    Args:
      claim: The claim.
      one: The row that is as good.
      other: The row that it is compared with.
      margin: The points that do not count.
    """
    points, error = difference(one, other)
    unit = "point" if margin == 1 else "points"
    evidence = f"{_evidence(one, other, points, error)}; up to {margin:g} {unit} worse is as good"
    return Finding(claim, not_worse(points, error, margin), evidence)


def not_worse(points: float, error: float, margin: float = 1.0) -> Verdict:
    """Judges a difference in points, with its standard error, that may be negative by at most `margin`.

    Example:
      >>> not_worse(-0.2, 0.1), not_worse(-0.2, 1.0), not_worse(-3.0, 0.1)
      ('observed', 'not decided', 'not observed')
    """
    if points + STANDARD_ERRORS * error < -margin:
        return "not observed"
    return "observed" if points - STANDARD_ERRORS * error > -margin else "not decided"


def _evidence(one: Summary, other: Summary, points: float, error: float) -> str:
    if math.isnan(points):
        return f"{one.row.name if not one.contributions else other.row.name} diverged"
    return f"{one.row.name} minus {other.row.name}: {points:+.1f} ± {error:.1f} points (standard error)"
