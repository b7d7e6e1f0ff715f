"""Metrics of tasks: scores, what examples contribute to them, and the loss of a regression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.evaluation import tasks
from experiments.studies.task import ACCURACY, CLASSIFICATION, METRICS, Task, of_data


def sample(name, count=200, seed=0):
    """Predictions and labels that agree more often than not."""
    rng = np.random.default_rng(seed)
    if name in ("pearson", "spearman"):
        labels = rng.uniform(0, 5, count).astype(np.float32)
        return labels + rng.normal(0, 1, count).astype(np.float32), labels
    labels = rng.integers(0, 2, count)
    return np.where(rng.random(count) < 0.8, labels, 1 - labels), labels


@pytest.mark.parametrize("name", METRICS)
def test_contributions_estimate_the_score_and_its_error(name):
    metric, (predictions, labels) = METRICS[name], sample(name)
    contributions = metric.contributions(predictions, labels)
    score = metric.score(predictions, labels)
    assert contributions.shape == (200,) and contributions.mean() == pytest.approx(score, abs=0.01)
    rng = np.random.default_rng(1)
    drawn = [rng.integers(0, 200, 200) for _ in range(200)]
    bootstrap = np.std([metric.score(predictions[rows], labels[rows]) for rows in drawn])
    assert contributions.std(ddof=1) / np.sqrt(200) == pytest.approx(bootstrap, rel=0.25)


def test_contributions_to_the_accuracy_are_the_right_answers():
    predictions, labels = sample("accuracy")
    np.testing.assert_allclose(ACCURACY.contributions(predictions, labels), predictions == labels, atol=1e-9)


def test_equal_predictions_have_no_correlation():
    numbers, labels = np.ones(4, np.float32), np.arange(4, dtype=np.float32)
    assert METRICS["pearson"].score(numbers, labels) == METRICS["spearman"].score(numbers, labels) == 0
    assert METRICS["matthews"].score(np.ones(4, int), np.array([0, 1, 1, 0])) == 0
    assert METRICS["pearson"].contributions(numbers[:1], labels[:1]).tolist() == [0]


@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"])
def test_tasks_of_glue_have_the_metrics_of_the_benchmark(name):
    task = of_data(f"glue/{name}", is_regression=name == "stsb")
    outputs = np.random.default_rng(0).normal(size=(30, 1 if name == "stsb" else 2))
    labels = np.linspace(0, 5, 30) if name == "stsb" else np.arange(30) % 2
    expected = tasks.evaluate(f"glue/{name}", task.predict(outputs), labels)
    assert {m.name: 100 * m.score(task.predict(outputs), labels) for m in task.metrics} == pytest.approx(expected)
    assert 100 * task.score(outputs, labels) == pytest.approx(next(iter(expected.values())))
    assert of_data("debian_sections", is_regression=False) == CLASSIFICATION


def test_the_loss_of_a_regression_is_the_squared_error():
    outputs, labels = jnp.array([[1.0], [3.0]]), jnp.array([0.0, 5.0])
    task = Task((METRICS["pearson"],), is_regression=True)
    np.testing.assert_allclose(task.losses(outputs, labels, 0.1), [1, 4])
    logits = jnp.array([[2.0, 0.0]])
    smooth = CLASSIFICATION.losses(logits, jnp.array([0]), 0.2)
    np.testing.assert_allclose(smooth, -(jax.nn.log_softmax(logits) @ jnp.array([0.9, 0.1])), rtol=1e-6)
