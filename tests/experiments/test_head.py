"""The head-only baseline."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.baselines import head
from experiments.errors import UserError


def clusters(classes, count=120, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count).astype(np.int32)
    centers = np.random.default_rng(9).normal(0, 2, (classes, 6))
    features = centers[labels] + rng.normal(0, 1.5, (count, 6))
    return (features * [1, 10, 0.1, 1, 1, 5] + [3, 0, 0, -40, 0, 0]).astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 4])
def test_folded_head_is_the_standardised_regression(classes):
    train, validation = clusters(classes), clusters(classes, seed=1)
    fitted = head.fit(train, validation, classes, penalties=[0.3])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=5000)).fit(*train)
    logits = validation[0] @ fitted.kernel + fitted.bias
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    np.testing.assert_allclose(probabilities, pipeline.predict_proba(validation[0]), atol=2e-3)
    assert np.mean(logits.argmax(-1) == validation[1]) == pipeline.score(*validation)
    expected = log_loss(validation[1], pipeline.predict_proba(validation[0]), labels=list(range(classes)))
    assert fitted.validation_loss == pytest.approx(expected, rel=1e-2)
    assert fitted.kernel.dtype == fitted.bias.dtype == np.float32


def test_a_regression_has_the_smallest_error_on_validation():
    def numbers(seed):
        features, labels = clusters(3, seed=seed)
        return features, (features @ [1, 0.1, 5, 0, 1, -0.2] + labels).astype(np.float32)

    train, validation = numbers(0), numbers(1)
    best = head.fit_regression(train, validation)
    pipeline = make_pipeline(StandardScaler(), Ridge(alpha=1 / best.penalty)).fit(*train)
    predictions = (validation[0] @ best.kernel + best.bias)[:, 0]
    np.testing.assert_allclose(predictions, pipeline.predict(validation[0]), atol=2e-3)
    assert best.validation_loss == pytest.approx(np.mean((predictions - validation[1]) ** 2))
    assert best.kernel.shape == (6, 1) and best.kernel.dtype == best.bias.dtype == np.float32
    for penalty in head.PENALTIES:
        one = head.fit_regression(train, validation, penalties=[penalty])
        assert best.validation_loss <= one.validation_loss + 1e-6
    with pytest.raises(UserError, match="all training examples have the same label"):
        head.fit_regression((train[0], train[1] * 0), validation)


def test_validation_chooses_the_penalty():
    train, validation = clusters(3), clusters(3, seed=1)
    best = head.fit(train, validation, 3)
    for penalty in head.PENALTIES:
        assert best.validation_loss <= head.fit(train, validation, 3, penalties=[penalty]).validation_loss + 1e-4


def test_unseen_class_is_never_predicted():
    (features, labels), validation = clusters(4), clusters(4, seed=1)
    seen = labels != 2
    fitted = head.fit((features[seen], labels[seen]), validation, 4, penalties=[1.0])
    assert fitted.kernel.shape == (6, 4)
    assert set(np.argmax(features @ fitted.kernel + fitted.bias, -1)) == {0, 1, 3}


def test_one_label_only():
    features, labels = clusters(2)
    with pytest.raises(UserError, match="all training examples have the same label"):
        head.fit((features, labels * 0), (features, labels), 2)
