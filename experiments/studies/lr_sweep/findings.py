"""The findings of LoRA Without Regret, each compared with the measured curves."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.reports.findings import Finding, Verdict
from experiments.reports.table import short
from experiments.studies.lr_sweep.curve import WITHIN, Curve

_FACTOR, _TOLERANCE = 10.0, 2.0
"""The published ratio of the best rates of LoRA and full fine-tuning, and the factor that a rate may be off by."""


def compare_ratio(adapted: Sequence[Curve], full: Curve) -> Finding:
    """Compares the best rates of LoRA and of full fine-tuning.

    Args:
      adapted: LoRA on all linear layers, of several ranks.
      full: Full fine-tuning.
    """
    ratios = [curve.best_rate / full.best_rate for curve in adapted]
    mean = float(np.exp(np.mean(np.log(ratios))))
    figures = f"{mean:.1f} (by rank: {_list(f'{ratio:.1f}' for ratio in ratios)}); full {short(full.best_rate)}"
    claim = "LoRA's best learning rate is about 10 × that of full fine-tuning"
    if edge := _edge([*adapted, full]):
        return Finding(claim, "not decided", f"{figures}; {edge}")
    near = _FACTOR / _TOLERANCE <= mean <= _FACTOR * _TOLERANCE
    return Finding(claim, "observed" if near else "not observed", figures)


def compare_ranks(adapted: Sequence[Curve]) -> Finding:
    """Compares the best rates of several ranks."""
    rates = [curve.best_rate for curve in adapted]
    spread = max(rates) / min(rates)
    figures = (
        f"{_list(f'{short(rate)} ({curve.name})' for rate, curve in zip(rates, adapted))}: a factor of {spread:.1f}"
    )
    claim = "with the same alpha, LoRA's best learning rate hardly depends on the rank"
    if edge := _edge(adapted):
        return Finding(claim, "not decided", f"{figures}; {edge}")
    return Finding(claim, "observed" if spread <= _TOLERANCE else "not observed", figures)


def compare_quality(adapted: Sequence[Curve], full: Curve) -> Finding:
    """Compares the smallest losses of the best rank and of full fine-tuning."""
    best = min(adapted, key=lambda curve: np.mean(curve.examples))
    difference, error = paired(best, full)
    worse = difference > WITHIN * error
    return Finding(
        "LoRA is as good as full fine-tuning, each at its best learning rate",
        "not observed" if worse else "observed",
        f"loss of {best.name} minus that of full fine-tuning: {difference:+.4f} ± {error:.4f}",
    )


def compare_targets(attention: Curve, linear: Curve) -> Finding:
    """Compares LoRA on attention alone with LoRA on all linear layers, of about as many parameters."""
    difference, error = paired(attention, linear)
    verdict: Verdict = "observed" if difference > WITHIN * error else "not decided"
    return Finding(
        "LoRA on attention alone is worse than on all linear layers, with as many parameters",
        "not observed" if difference < -WITHIN * error else verdict,
        f"loss of {attention.name} minus that of {linear.name}: {difference:+.4f} ± {error:.4f}",
    )


def compare_rule(curve: Curve) -> Finding:
    """Compares the published rule's learning rate with the measured losses."""
    index = curve.nearest(curve.rule)
    loss, error = curve.losses[index], (curve.errors or [None] * len(curve.rates))[index]
    smallest = curve.losses[curve.best]
    figures = f"rule {short(curve.rule)}, best {short(curve.best_rate)}"
    claim = f"the published rule gives a good learning rate for {curve.name} of {curve.model}"
    if loss is None or smallest is None:
        return Finding(claim, "not observed", f"{figures}; training diverged at {short(curve.rates[index])}")
    difference = loss - smallest
    figures += f"; loss at {short(curve.rates[index])}, the nearest: {difference:+.4f}"
    if error is None:  # losses of single examples are not known
        near = 1 / _TOLERANCE <= curve.rule / curve.best_rate <= _TOLERANCE
        verdict: Verdict = "not decided" if curve.at_edge else "observed" if near else "not observed"
        return Finding(claim, verdict, figures)
    return Finding(claim, "observed" if difference <= WITHIN * error else "not observed", f"{figures} ± {error:.4f}")


def paired(one: Curve, other: Curve) -> tuple[float, float]:
    """Returns the mean difference of the losses of examples at the best rates, and its standard error."""
    difference = np.array(one.examples) - np.array(other.examples)
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def _edge(curves: Sequence[Curve]) -> str:
    names = [curve.name for curve in curves if curve.at_edge]
    return f"the best of the tried rates is the first or last one: {_list(names)}" if names else ""


def _list(parts: Iterable[str]) -> str:
    return ", ".join(parts)
