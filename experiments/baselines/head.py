"""The head-only baseline: logistic regression on frozen features, to convergence.

A head trained by a few epochs of SGD stops ten points short of this one and flatters whatever is compared
with it. Features are standardised, the L2 penalty is chosen on validation, and the standardisation is folded
into the head's weights, so that every other method can start from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from experiments.errors import UserError

PENALTIES = tuple(10.0**power for power in np.arange(-4, 2.01, 0.5))  # C, the inverse strength of the penalty
_PATIENCE = 2  # penalties in a row that may be worse than the best before the search ends


@dataclass(frozen=True)
class Head:
    """A linear classifier on raw (not standardised) features.

    Attributes:
      kernel: `float32[features, classes]`.
      bias: `float32[classes]`.
      penalty: The C that validation chose.
      validation_loss: With it, the mean cross-entropy.
      validation_accuracy: Likewise.
    """

    kernel: np.ndarray
    bias: np.ndarray
    penalty: float
    validation_loss: float
    validation_accuracy: float


def fit(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
) -> Head:
    """The head with the smallest loss on validation, over the penalties.

    The loss tells penalties apart that accuracy, a count of a few thousand examples, does not, and finds the head
    that is sure of itself where it may be. Penalties are tried from the strongest to weaker ones until two in a
    row are worse than the best.

    Args:
      train: Features `float[examples, features]` and labels `int[examples]`.
      validation: The same, to choose the penalty by.
      classes: How many classes there are; one without a training example is never predicted.
      penalties: Values of C, ascending.

    Raises:
      UserError: All training examples have the same label.
    """
    features, labels = train[0].astype(np.float64), train[1]
    if len(np.unique(labels)) < 2:
        raise UserError("the training examples all have one label: nothing to learn")
    mean, spread = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-6)
    model = LogisticRegression(max_iter=5000, warm_start=True)
    best, worse = None, 0
    for penalty in sorted(penalties):
        with threadpool_limits(1):  # products this small are slower on several threads, far slower on busy ones
            model.set_params(C=penalty).fit((features - mean) / spread, labels)
        kernel, bias = _unfold(model, mean, spread, classes)
        head = Head(kernel, bias, penalty, *_measure(validation[0] @ kernel + bias, validation[1]))
        if best is None or head.validation_loss < best.validation_loss:
            best, worse = head, 0
        else:
            worse += 1
        if worse == _PATIENCE:
            break
    assert best is not None, "at least one penalty"
    return best


def _measure(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    largest = logits.max(axis=-1)
    normalizer = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    loss = np.mean(normalizer - logits[np.arange(len(labels)), labels])
    return float(loss), float(np.mean(logits.argmax(axis=-1) == labels))


def _unfold(
    model: LogisticRegression, mean: np.ndarray, spread: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias on raw features, a column for every class."""
    coefficients, intercept = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn keeps the difference of the two only
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    seen = coefficients.T / spread[:, None]
    kernel = np.zeros((len(mean), classes))
    kernel[:, model.classes_] = seen
    bias = np.full(classes, intercept.min() - 100.0)
    bias[model.classes_] = intercept - mean @ seen
    return kernel.astype(np.float32), bias.astype(np.float32)
