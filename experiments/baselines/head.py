"""The head-only baseline: logistic regression, or least squares, on frozen features, to convergence.

A head that is trained by a few epochs of SGD is ten points worse, which would flatter the methods that are compared
with it. Features are standardized, the L2 penalty is chosen by validation, and the standardization is folded into the
head's weights, so that every other method can start from it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_limits

from experiments.errors import UserError

PENALTIES = tuple(10.0**power for power in np.arange(-4, 2.01, 0.5))  # C, the inverse of the penalty
_PATIENCE = 2  # the search ends after so many consecutive penalties that are worse than the best


@dataclass(frozen=True)
class Head:
    """A linear function of raw (not standardized) features: a classifier or a regression.

    Attributes:
      kernel: `float32[features, classes]`; one column of a regression.
      bias: `float32[classes]`.
      penalty: The chosen value of C.
      validation_loss: The mean cross-entropy on validation; of a regression the mean squared error.
    """

    kernel: np.ndarray
    bias: np.ndarray
    penalty: float
    validation_loss: float


def fit(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
) -> Head:
    """Returns the head with the smallest validation loss over the penalties.

    The loss distinguishes penalties that accuracy, a count of a few thousand examples, does not, and prefers calibrated
    heads. Penalties are tried from the strongest to the weakest until two consecutive ones are worse than the best.

    Args:
      train: Features `float[examples, features]` and labels `int[examples]`.
      validation: Features and labels that choose the penalty.
      classes: The number of classes; classes without a training example are never predicted.
      penalties: The values of C.

    Raises:
      UserError: All training examples have the same label.
    """
    features, labels = train[0].astype(np.float64), train[1]
    if len(np.unique(labels)) < 2:
        raise UserError("all training examples have the same label")
    mean, scale = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-6)
    model = LogisticRegression(max_iter=5000, warm_start=True)

    def head_of(penalty: float) -> Head:
        model.set_params(C=penalty).fit((features - mean) / scale, labels)
        kernel, bias = _unfold(model, mean, scale, classes)
        return Head(kernel, bias, penalty, _cross_entropy(validation[0] @ kernel + bias, validation[1]))

    return _select(head_of, penalties)


def fit_regression(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    *,
    penalties: Sequence[float] = PENALTIES,
) -> Head:
    """Returns the regression with the smallest squared error on validation over the penalties; see :func:`fit`.

    Args:
      train: Features `float[examples, features]` and numbers `float[examples]`.
      validation: Features and numbers that choose the penalty.
      penalties: The values of C.

    Raises:
      UserError: All training examples have the same number.
    """
    features, numbers = train[0].astype(np.float64), train[1].astype(np.float64)
    if np.ptp(numbers) == 0:
        raise UserError("all training examples have the same label")
    mean, scale = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-6)

    def head_of(penalty: float) -> Head:
        model = Ridge(alpha=1 / penalty).fit((features - mean) / scale, numbers)
        column = model.coef_ / scale
        kernel, bias = column[:, None].astype(np.float32), np.array([model.intercept_ - mean @ column], np.float32)
        error = (validation[0] @ kernel + bias)[:, 0] - validation[1]
        return Head(kernel, bias, penalty, float(np.mean(np.square(error))))

    return _select(head_of, penalties)


def _select(head_of: Callable[[float], Head], penalties: Sequence[float]) -> Head:
    best, worse = None, 0
    for penalty in sorted(penalties):
        with threadpool_limits(1):  # small products are slower with several threads, much slower on busy machines
            head = head_of(penalty)
        if best is None or head.validation_loss < best.validation_loss:
            best, worse = head, 0
        else:
            worse += 1
        if worse == _PATIENCE:
            break
    assert best is not None, "at least one penalty"
    return best


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean cross-entropy."""
    largest = logits.max(axis=-1)
    normalizer = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    return float(np.mean(normalizer - logits[np.arange(len(labels)), labels]))


def _unfold(
    model: LogisticRegression, mean: np.ndarray, scale: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns kernel and bias for raw features, with a column for every class."""
    coefficients, intercept = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn stores the difference of the two only
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    columns = coefficients.T / scale[:, None]
    kernel = np.zeros((len(mean), classes))
    kernel[:, model.classes_] = columns
    bias = np.full(classes, intercept.min() - 100.0)
    bias[model.classes_] = intercept - mean @ columns
    return kernel.astype(np.float32), bias.astype(np.float32)
