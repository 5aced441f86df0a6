"""Probes: tuned inside their own subjects only, honest about how."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cranium.models import probe

Array = NDArray[Any]


def _blobs(per_class: int, classes: int, noise: float, seed: int = 0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    centres = random.standard_normal((classes, 20))
    return centres[labels] + noise * random.standard_normal((len(labels), 20)), labels


def test_separable_classes_are_found_whatever_the_features_scale() -> None:
    features, labels = _blobs(20, 3, 0.1)
    scale = 10.0 ** np.arange(-10, 10)
    fitted = probe.fit_linear(features * scale, labels, c_grid=(0.01, 1.0), folds=3, seed=0)
    predicted = fitted.predict(features * scale)
    assert predicted.shape == (60, 3)
    assert (predicted.argmax(axis=1) == labels).all()
    np.testing.assert_allclose(predicted.sum(axis=1), 1.0)
    assert fitted.chosen_by == "log-loss over 3 inner folds"


@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_are_those_of_scikit_learn(classes: int) -> None:
    features, labels = _blobs(20, classes, 1.0)
    features[:, 3] = 7.0  # says nothing, and has no deviation
    fitted = probe.fit_linear(features, labels, c_grid=(0.1,), folds=3, seed=0)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(features, labels)
    np.testing.assert_allclose(fitted.predict(features), theirs.predict_proba(features), atol=1e-12)


def test_noise_labels_get_the_strongest_regularisation_and_signal_a_weak_one() -> None:
    random = np.random.default_rng(0)
    noise, labels = random.standard_normal((40, 30)), np.tile([0, 1], 20)
    grid = (1e-5, 1e-2, 1.0, 100.0)
    assert probe.fit_linear(noise, labels, c_grid=grid, folds=4, seed=0).c == 1e-5
    features, labels = _blobs(20, 2, 0.2)
    assert probe.fit_linear(features, labels, c_grid=grid, folds=4, seed=0).c >= 1.0


def test_one_subject_in_a_class_falls_back_to_the_middle_and_says_so() -> None:
    features, labels = _blobs(5, 2, 0.1)
    fitted = probe.fit_linear(features[:6], labels[:6], c_grid=(10.0, 0.1, 1.0), folds=3, seed=0)
    assert fitted.c == 1.0
    assert fitted.chosen_by.startswith("the middle of the grid: a class has 1 subject(s)")


def test_a_family_counts_once_and_never_straddlesinner_folds() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 0, 1])
    groups = np.array(["a", "a", "a", "b", "b", "b", "c", "d"])
    for train, test in probe.inner_folds(labels, groups, 2, 0):
        assert not set(groups[train]) & set(groups[test])
    one_family = np.array(["a", "a", "a", "b", "b", "b", "a", "d"])
    features, _ = _blobs(4, 2, 0.1)
    fitted = probe.fit_linear(features, labels, c_grid=(1.0, 2.0, 3.0), folds=2, seed=0, groups=one_family)
    assert "a class has 1 subject(s)" in fitted.chosen_by


def test_an_absent_class_gets_probability_zero() -> None:
    features, labels = _blobs(6, 2, 0.1)
    fitted = probe.fit_linear(features, labels * 2, c_grid=(1.0,), folds=3, seed=0, num_classes=4)
    predicted = fitted.predict(features)
    assert predicted.shape == (12, 4)
    assert not predicted[:, [1, 3]].any()
    assert fitted.chosen_by == "the only value given"


def test_the_test_features_cannot_influence_the_fit() -> None:
    features, labels = _blobs(10, 2, 1.0)
    fitted = probe.fit_linear(features, labels, c_grid=(0.1, 1.0), folds=3, seed=0)
    alone = fitted.predict(features[:1])
    beside = fitted.predict(np.concatenate([features[:1], 1e6 * features]))[:1]
    # BLAS multiplies one row by another kernel than many: the last digit may differ, an influence could not hide there.
    np.testing.assert_allclose(beside, alone, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"c_grid": ()}, "c_grid"), ({"c_grid": (0.0, 1.0)}, "c_grid"), ({"groups": np.arange(3)}, "groups")],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    features, labels = _blobs(4, 2, 0.1)
    with pytest.raises(ValueError, match=message):
        probe.fit_linear(features, labels, **{"c_grid": (1.0,), "folds": 2, "seed": 0, **options})


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="two classes"):
        probe.fit_linear(np.zeros((3, 2)), np.zeros(3), c_grid=(1.0,), folds=2, seed=0)


def test_knn_by_a_loop() -> None:
    random = np.random.default_rng(0)
    train, test, labels = (
        random.standard_normal((30, 5)),
        random.standard_normal((7, 5)),
        random.integers(0, 3, 30),
    )
    got = probe.knn(train, labels, test, k=4, temperature=0.1, num_classes=4)
    for row, x in enumerate(test):
        similarity = [float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for y in train]
        votes = np.zeros(4)
        for index in sorted(range(30), key=lambda i: -similarity[i])[:4]:
            votes[labels[index]] += np.exp(similarity[index] / 0.1)
        np.testing.assert_allclose(got[row], votes / votes.sum())


def test_knn_cuts_k_and_one_neighbour_is_certain() -> None:
    train, labels = np.eye(3), np.array([2, 0, 1])
    assert probe.knn(train, labels, 5 * np.eye(3), k=1).argmax(axis=1).tolist() == [2, 0, 1]
    np.testing.assert_allclose(probe.knn(train, labels, np.ones((1, 3)), k=99), np.full((1, 3), 1 / 3))
    with pytest.raises(ValueError, match="k >= 1"):
        probe.knn(train, labels, train, k=0)
