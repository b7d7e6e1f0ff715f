"""What the outputs of a model mean for a task: its loss, its predictions, and the metrics that score these."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.evaluation import labels, tasks
from experiments.input.official import catalog
from experiments.tasks import examples


@dataclass(frozen=True)
class Metric:
    """A score of predictions, at most 1.

    Attributes:
      name: The name in records.
      title: The name in tables and figures.
      function: `function(predictions, labels)`.
    """

    name: str
    title: str
    function: Callable[[np.ndarray, np.ndarray], float]

    def score(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        """Returns the score; 0 for a correlation with predictions that are all equal."""
        return float(np.nan_to_num(self.function(predictions, labels)))

    def contributions(self, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Returns what each example contributes to the score: its pseudo-value of the jackknife, `float[examples]`.

        Of a mean over examples, such as the accuracy, it is the value of the example. The standard error of the mean
        over contributions estimates that of the score.

        Example:
          >>> ACCURACY.contributions(np.array([1, 0, 1]), np.array([1, 1, 1])).round(6).tolist()
          [1.0, 0.0, 1.0]
        """
        count, whole = len(labels), self.score(predictions, labels)
        pairs = np.stack([predictions, labels]).astype(np.float64)
        _, first, which = np.unique(pairs, axis=1, return_index=True, return_inverse=True)
        without = [self.score(np.delete(predictions, i), np.delete(labels, i)) if count > 1 else whole for i in first]
        return count * whole - (count - 1) * np.array(without)[which.ravel()]


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions == labels))


def _fraction(function: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda predictions, truth: function(predictions, truth) / 100


ACCURACY = Metric("accuracy", "accuracy", _accuracy)
METRICS = {
    "accuracy": ACCURACY,
    "f1": Metric("f1", "F1", _fraction(labels.f1)),
    "matthews": Metric("matthews", "Matthews correlation", _fraction(labels.matthews)),
    "pearson": Metric("pearson", "Pearson correlation", _fraction(labels.pearson)),
    "spearman": Metric("spearman", "Spearman correlation", _fraction(labels.spearman)),
}
"""The metrics by name; functions are those of :mod:`experiments.evaluation.labels`."""


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      metrics: The first one selects learning rates and rows, and is that of figures and findings.
      is_regression: Whether the output is a number, which a squared loss trains, instead of a logit for each class.
    """

    metrics: tuple[Metric, ...] = (ACCURACY,)
    is_regression: bool = False

    @property
    def metric(self) -> Metric:
        """The first metric."""
        return self.metrics[0]

    def predict(self, outputs: np.ndarray) -> np.ndarray:
        """Returns the numbers, or the classes of the largest logits, of `float[..., outputs]`."""
        return outputs[..., 0] if self.is_regression else outputs.argmax(axis=-1)

    def score(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        """Returns the first metric of `float[examples, outputs]`."""
        return self.metric.score(self.predict(outputs), labels)

    def losses(self, outputs: jax.Array, labels: jax.Array, label_smoothing: float) -> jax.Array:
        """Returns the loss of each example: the squared error, or the cross-entropy.

        Args:
          outputs: `float[batch, outputs]`.
          labels: `float[batch]` of a regression, otherwise `int[batch]`.
          label_smoothing: The probability that is spread evenly over the classes; none in a regression.
        """
        if self.is_regression:
            return jnp.square(outputs[..., 0] - labels.astype(outputs.dtype))
        targets = optax.smooth_labels(jax.nn.one_hot(labels, outputs.shape[-1]), label_smoothing)
        return optax.softmax_cross_entropy(outputs, targets)


CLASSIFICATION = Task()


def of_data(data: str, *, is_regression: bool) -> Task:
    """Returns the task of a data set: GLUE's metrics, or the accuracy of other classifications.

    Args:
      data: See :func:`experiments.input.labeled.load`.
      is_regression: Whether its labels are numbers.

    Example:
      >>> [metric.title for metric in of_data("glue/mrpc", is_regression=False).metrics]
      ['accuracy', 'F1']
    """
    selection = None if data in examples.SHIPPED else catalog.find(data)
    names = tasks.names(selection.layout.name) if selection is not None else ()
    return Task(tuple(METRICS[name] for name in names) or (ACCURACY,), is_regression)
