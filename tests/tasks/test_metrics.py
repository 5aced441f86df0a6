"""Metrics against scikit-learn, slow loops and closed forms; what is undefined says why (rows S7, S8)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from cranium.tasks import metrics, weighted
from cranium.tasks.metrics import Undefined


def sample(seed: int, n: int, k: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    probs = rng.dirichlet(np.ones(k), n)
    if ties:
        probs = np.round(probs * 4 + 1)
        probs /= probs.sum(axis=1, keepdims=True)
    return labels, probs


cases = given(st.integers(0, 10**6), st.integers(8, 60), st.integers(2, 4), st.booleans())


@settings(max_examples=60, deadline=None)
@cases
def test_against_scikit_learn(seed: int, n: int, k: int, ties: bool) -> None:
    y, p = sample(seed, n, k, ties)
    onehot = np.eye(k)[y]
    if k == 2:
        assert metrics.auroc(y, p) == pytest.approx(sk.roc_auc_score(y, p[:, 1]), abs=1e-12)
        assert metrics.aupr(y, p[:, 1]) == pytest.approx(sk.average_precision_score(y, p[:, 1]), abs=1e-12)
        assert metrics.brier(y, p) == pytest.approx(sk.brier_score_loss(y, p[:, 1]), abs=1e-12)
        guess = (p[:, 1] >= p[:, 0]).astype(int)
    else:
        macro = np.mean([sk.roc_auc_score(onehot[:, c], p[:, c]) for c in range(k)])
        assert metrics.auroc(y, p) == pytest.approx(macro, abs=1e-12)
        assert metrics.aupr(y, p) == pytest.approx(
            sk.average_precision_score(onehot, p, average="macro"), abs=1e-12
        )
        assert metrics.brier(y, p) == pytest.approx(sk.brier_score_loss(y, p, scale_by_half=False), abs=1e-12)
        guess = p.argmax(axis=1)
    assert metrics.balanced_accuracy(y, p) == pytest.approx(sk.balanced_accuracy_score(y, guess), abs=1e-12)
    average = "binary" if k == 2 else "macro"
    assert metrics.f1(y, p) == pytest.approx(sk.f1_score(y, guess, average=average), abs=1e-12)
    curves = [
        sk.roc_curve(onehot[:, c], p[:, c], drop_intermediate=False) for c in ([1] if k == 2 else range(k))
    ]
    best = np.mean([tpr[fpr <= 0.1 + 1e-12].max() for fpr, tpr, _ in curves])
    assert metrics.sensitivity_at_90(y, p) == pytest.approx(best, abs=1e-12)


@settings(max_examples=30, deadline=None)
@cases
def test_weighted_metrics_are_those_of_the_repeated_rows(seed: int, n: int, k: int, ties: bool) -> None:
    y, p = sample(seed, n, k, ties)
    weights = np.random.default_rng(seed).integers(0, 3, (6, n)).astype(float)
    weights[0] *= y != 0  # a resample without one of the classes
    for name in metrics.classification_metrics(y, p):
        fast, slow = getattr(weighted, name), weighted.by_resample(getattr(metrics, name))
        np.testing.assert_allclose(fast(y, p, weights), slow(y, p, weights), atol=1e-12, err_msg=name)


def test_ece_against_a_slow_loop_and_a_closed_form() -> None:
    y, p = sample(3, 200, 3, False)
    slow = 0.0
    for b in range(15):
        inside = [i for i in range(200) if b / 15 < p[i].max() <= (b + 1) / 15]
        if inside:
            accuracy = np.mean([p[i].argmax() == y[i] for i in inside])
            slow += len(inside) / 200 * abs(accuracy - np.mean([p[i].max() for i in inside]))
    assert metrics.ece(y, p) == pytest.approx(slow, abs=1e-12)
    assert metrics.ece([1, 1, 1, 0], [0.9, 0.9, 0.9, 0.9]) == pytest.approx(0.15)


def test_an_absent_class_is_undefined_with_its_reason() -> None:
    for score in (metrics.auroc, metrics.aupr, metrics.balanced_accuracy):
        value = score([0, 0, 0], [0.1, 0.2, 0.3])
        assert isinstance(value, Undefined) and value.reason == "no subject of class 1 among 3"
    assert metrics.auroc([0, 1, 1], [0.5, 0.5, 0.5]) == 0.5
    assert isinstance(metrics.brier([], []), Undefined)


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 score rows are not finite"):
        metrics.auroc([0, 1], [0.1, float("nan")])
    with pytest.raises(ValueError, match=r"labels run 0\.\.7"):
        metrics.auroc([0, 7], np.ones((2, 4)) / 4)


def box(shape: tuple[int, ...], *spans: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in spans)] = True
    return mask


def test_dice_of_shifted_boxes_in_closed_form() -> None:
    a = box((20, 20, 20), (2, 12), (2, 12), (2, 12))
    assert metrics.dice(a, np.roll(a, 3, axis=0)) == pytest.approx(0.7)
    assert metrics.dice(a, a) == 1.0


def test_hd95_of_shifted_boxes_counts_millimetres() -> None:
    a = box((30, 8, 8), (2, 12), (0, 8), (0, 8))
    b = np.roll(a, 9, axis=0)
    assert metrics.hd95(a, b, (2.5, 1, 1)) == pytest.approx(22.5)
    assert metrics.hd95(a, a, (2.5, 1, 1)) == 0.0


def test_hd95_against_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    spacing = np.array([3.0, 1.0, 0.5])
    a, b = rng.random((6, 7, 8)) > 0.6, rng.random((6, 7, 8)) > 0.8

    def surface(mask: np.ndarray) -> np.ndarray:
        points = []
        for index in np.argwhere(mask):
            for axis in range(3):
                for step in (-1, 1):
                    near = index.copy()
                    near[axis] += step
                    outside = near[axis] in (-1, mask.shape[axis])
                    if outside or not mask[tuple(near)]:
                        points.append(tuple(index))
        return np.array(sorted(set(points))) * spacing

    sa, sb = surface(a), surface(b)
    between = np.linalg.norm(sa[:, None] - sb[None], axis=2)
    slow = max(np.percentile(between.min(axis=1), 95), np.percentile(between.min(axis=0), 95))
    assert metrics.hd95(a, b, tuple(spacing)) == pytest.approx(slow, abs=1e-9)


def test_empty_masks_have_a_stated_policy() -> None:
    full, empty = box((5, 4, 3), (1, 3), (1, 3), (1, 2)), np.zeros((5, 4, 3), bool)
    diagonal = np.sqrt((4 * 2.0) ** 2 + 3**2 + 2**2)
    assert metrics.dice(full, empty) == 0.0 and metrics.dice(empty, full) == 0.0
    assert metrics.hd95(full, empty, (2, 1, 1)) == pytest.approx(diagonal)
    assert metrics.missed(full, empty) and not metrics.missed(empty, full)
    for value in (metrics.dice(empty, empty), metrics.hd95(empty, empty, (2, 1, 1))):
        assert isinstance(value, Undefined) and "left out of the mean" in value.reason
    with pytest.raises(ValueError, match="two bool masks"):
        metrics.dice(full.astype(np.uint8), full)


def test_thresholds_are_fixed_on_one_set_and_judged_on_another() -> None:
    home, away = sample(0, 60, 3, True), sample(1, 50, 3, False)
    at = metrics.thresholds(*home)
    assert not isinstance(at, Undefined)
    sensitivity, specificity = metrics.at_thresholds(*home, at)
    assert sensitivity == metrics.sensitivity_at_90(*home) and specificity >= 0.9
    slow = [[], []]  # type: list[list[float]]
    for k in range(3):
        called = [score >= at[k] for score in away[1][:, k]]
        slow[0].append(np.mean([c for c, label in zip(called, away[0], strict=True) if label == k]))
        slow[1].append(np.mean([not c for c, label in zip(called, away[0], strict=True) if label != k]))
    assert metrics.at_thresholds(*away, at) == pytest.approx(tuple(map(np.mean, slow)))
    alike = np.full(10, 0.5)  # nothing selective: nobody is called
    never = metrics.thresholds(np.arange(10) % 2, alike)
    assert never == np.inf and metrics.at_thresholds(np.arange(10) % 2, alike, never) == (0.0, 1.0)
    assert isinstance(metrics.thresholds([0, 0], [0.1, 0.2]), Undefined)
