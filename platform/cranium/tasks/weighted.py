"""The metrics of many bootstrap resamples at once: weights [r, n], how often each subject was drawn -> values [r].

Each equals its namesake in `metrics` on the rows repeated by their weights (`by_resample`). NaN marks a resample
without one of the classes (of Brier and ECE: without a row); the bootstrap drops and counts it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .metrics import BINS, SPECIFICITY, Floats, Ints, Undefined, Value, checked, most_probable

Masks = NDArray[np.bool_]


def auroc(labels: ArrayLike, probs: ArrayLike, weights: Floats) -> Floats:
    """w+' S w- / (sum w+ . sum w-) with S[i, j] = 1, 1/2, 0 as positive i scores above, at, below negative j."""

    def one(own: Masks, score: Floats) -> Floats:
        above = (np.sign(score[own][:, None] - score[~own][None, :]) + 1) / 2
        inside, outside = weights[:, own], weights[:, ~own]
        return _ratio(
            np.einsum("rn,rn->r", inside @ above, outside), inside.sum(axis=1) * outside.sum(axis=1)
        )

    return _one_vs_rest(labels, probs, weights, one)


def aupr(labels: ArrayLike, probs: ArrayLike, weights: Floats) -> Floats:
    def one(own: Masks, score: Floats) -> Floats:
        order = np.argsort(-score, kind="stable")
        drawn = weights[:, order]
        last = np.append(np.diff(score[order]) != 0, True)  # one threshold per distinct score
        hits, called = (drawn * own[order]).cumsum(axis=1)[:, last], drawn.cumsum(axis=1)[:, last]
        precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
        return _ratio((np.diff(hits, axis=1, prepend=0.0) * precision).sum(axis=1), hits[:, -1])

    return _one_vs_rest(labels, probs, weights, one)


def balanced_accuracy(labels: ArrayLike, probs: ArrayLike, weights: Floats) -> Floats:
    y, p = checked(labels, probs)
    guess = most_probable(p)
    recalls = [_ratio(weights @ ((y == k) & (guess == k)), weights @ (y == k)) for k in range(p.shape[1])]
    return np.asarray(np.mean(recalls, axis=0))


def f1(labels: ArrayLike, probs: ArrayLike, weights: Floats) -> Floats:
    y, p = checked(labels, probs)
    guess = most_probable(p)
    found = [
        2 * (weights @ ((y == k) & (guess == k))) / np.maximum(weights @ (guess == k) + weights @ (y == k), 1)
        for k in _positives(p)
    ]
    return np.where(_complete(y, p, weights), np.mean(found, axis=0), np.nan)


def sensitivity_at_90(labels: ArrayLike, probs: ArrayLike, weights: Floats) -> Floats:
    def one(own: Masks, score: Floats) -> Floats:
        order = np.argsort(score, kind="stable")
        first = np.append(True, np.diff(score[order]) != 0)  # of each distinct score

        def reaching(mask: Masks) -> Floats:
            """The share of these [r, distinct scores + 1] that reach each distinct score, ascending, and infinity."""
            tails = (weights[:, order] * mask[order])[:, ::-1].cumsum(axis=1)[:, ::-1][:, first]
            tails = np.append(tails, np.zeros((len(weights), 1)), axis=1)
            return _ratio(tails, (weights @ mask)[:, None])

        threshold = (reaching(~own) <= 1 - SPECIFICITY + 1e-12).argmax(axis=1)
        return np.asarray(reaching(own)[np.arange(len(weights)), threshold])

    return _one_vs_rest(labels, probs, weights, one)


def brier(labels: ArrayLike, probs: ArrayLike, weights: Floats) -> Floats:
    y, p = checked(labels, probs)
    if p.shape[1] == 2:
        return _ratio(weights @ (p[:, 1] - y) ** 2, weights.sum(axis=1))
    return _ratio(weights @ np.sum((p - np.eye(p.shape[1])[y]) ** 2, axis=1), weights.sum(axis=1))


def ece(labels: ArrayLike, probs: ArrayLike, weights: Floats) -> Floats:
    y, p = checked(labels, probs)
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == y
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # bins are (low, high]
    gaps = weights @ (np.eye(BINS)[place] * (confidence - correct)[:, None])
    return _ratio(np.abs(gaps).sum(axis=1), weights.sum(axis=1))


def by_resample(
    metric: Callable[[ArrayLike, ArrayLike], Value],
) -> Callable[[ArrayLike, ArrayLike, Floats], Floats]:
    """Any metric in this shape, by repeating rows: slow, and the second opinion on those above."""

    def resampled(labels: ArrayLike, probs: ArrayLike, weights: Floats) -> Floats:
        y, p = checked(labels, probs)
        values = [metric(np.repeat(y, w), np.repeat(p, w, axis=0)) for w in weights.astype(np.int64)]
        return np.array([np.nan if isinstance(value, Undefined) else value for value in values])

    return resampled


def _positives(p: Floats) -> list[int]:
    return [1] if p.shape[1] == 2 else list(range(p.shape[1]))


def _complete(y: Ints, p: Floats, weights: Floats) -> Masks:
    """Which resamples [r] have every class."""
    return np.asarray(np.all([weights @ (y == k) > 0 for k in range(p.shape[1])], axis=0))


def _ratio(a: Floats, b: Floats) -> Floats:
    """a / b, NaN where b is 0."""
    return np.asarray(np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b > 0))


def _one_vs_rest(
    labels: ArrayLike, probs: ArrayLike, weights: Floats, one: Callable[[Masks, Floats], Floats]
) -> Floats:
    """Binary: of class 1. More classes: the plain mean over classes, each against the rest."""
    y, p = checked(labels, probs)
    mean = np.mean([one(y == k, p[:, k]) for k in _positives(p)], axis=0)
    return np.where(_complete(y, p, weights), mean, np.nan)
