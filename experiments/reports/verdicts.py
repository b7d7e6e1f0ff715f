"""Verdicts on claims that compare two scores, from their difference and its standard error."""

from experiments.reports.findings import Finding, Verdict

_STANDARD_ERRORS = 2.0  # differences of up to so many do not distinguish two scores


def positive(difference: float, error: float) -> Verdict:
    """Judges the claim that a difference is positive.

    Example:
      >>> positive(1.0, 0.2), positive(1.0, 0.6), positive(-1.0, 0.2)
      ('observed', 'not decided', 'not observed')
    """
    if not abs(difference) > _STANDARD_ERRORS * error:  # or either is NaN
        return "not decided"
    return "observed" if difference > 0 else "not observed"


def not_worse(difference: float, error: float, margin: float = 1.0) -> Verdict:
    """Judges the claim that a difference is positive, or negative by at most `margin`.

    Example:
      >>> not_worse(-0.2, 0.1), not_worse(-0.2, 1.0), not_worse(-3.0, 0.1)
      ('observed', 'not decided', 'not observed')
    """
    return positive(difference + margin, error)


def as_good(claim: str, points: float, error: float, evidence: str, margin: float = 1.0) -> Finding:
    """Judges the claim that one score is as good as another: at most `margin` points worse.

    Args:
      claim: The claim.
      points: The one score minus the other.
      error: The standard error of the difference.
      evidence: The figures, without a period.
      margin: The points that do not count.
    """
    unit = "point" if margin == 1 else "points"
    return Finding(claim, not_worse(points, error, margin), f"{evidence}; up to {margin:g} {unit} worse is as good")
