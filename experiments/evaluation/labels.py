"""Metrics of labels and of numbers, from 0 to 100 (correlations from -100)."""

from collections.abc import Callable, Sequence

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of right labels."""
    from sklearn.metrics import accuracy_score  # takes a second

    return 100 * float(accuracy_score(labels, predictions))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the F1 of label 1 of two."""
    from sklearn.metrics import f1_score

    return 100 * float(f1_score(labels, predictions, zero_division=0))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the correlation coefficient of Matthews."""
    from sklearn.metrics import matthews_corrcoef

    return 100 * float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the correlation coefficient of Pearson; NaN if all predictions are equal."""
    from scipy.stats import pearsonr

    return _correlation(lambda a, b: pearsonr(a, b).statistic, predictions, labels)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the rank correlation coefficient of Spearman; NaN if all predictions are equal."""
    from scipy.stats import spearmanr

    return _correlation(lambda a, b: spearmanr(a, b).statistic, predictions, labels)


def read_answers(texts: Sequence[str], labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Returns the labels, or the numbers of a regression, that generated texts name.

    A text that names none counts as a wrong label, or as the number 0.

    Example:
      >>> read_answers([" Yes", "maybe"], np.array([1, 1]), ("no", "yes"))
      array([1, 0])
    """
    if not names:
        return np.array([_number(text) for text in texts])
    index_of = {name.casefold(): index for index, name in enumerate(names)}
    wrong = (labels + 1) % len(names)
    return np.array([index_of.get(text.strip().casefold(), other) for text, other in zip(texts, wrong)])


def _number(text: str) -> float:
    try:
        return float(np.nan_to_num(float(text)))
    except ValueError:
        return 0.0


def _correlation(coefficient: Callable, predictions: np.ndarray, labels: np.ndarray) -> float:
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return float("nan")
    return 100 * float(coefficient(predictions, labels))
