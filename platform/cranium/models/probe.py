"""Probes on frozen features: a linear one whose regularisation is tuned inside its own subjects, and k-NN."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler

Array = NDArray[Any]


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression on standardised features; `c` is its inverse regularisation, `chosen_by` how it was chosen.

    `mean` and `std` [D] of its own subjects; `weight` [k, D] and `bias` [k] of the `seen` [k] classes; of two classes
    those of the second alone, [1, D] and [1].
    """

    mean: Array
    std: Array
    weight: Array
    bias: Array
    seen: Array
    num_classes: int
    c: float
    chosen_by: str = ""

    def predict(self, features: Array) -> Array:
        """Class probabilities [n, num_classes] of `features` [n, D]; a class never seen gets 0."""
        scores = (np.asarray(features, np.float64) - self.mean) / self.std @ self.weight.T + self.bias
        if len(self.seen) == 2:
            scores = np.concatenate([np.zeros_like(scores), scores], axis=1)
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities = np.zeros((len(features), self.num_classes))
        probabilities[:, self.seen] = odds / odds.sum(axis=1, keepdims=True)
        return probabilities


@dataclass(frozen=True)
class Neighbours:
    """Weighted k-NN: `train` [m, D] and its `labels` [m]. Features are standardised by `train`'s mean and deviation.

    Because the tokens of some backbones differ by a hair, and are all alike to a cosine.
    """

    train: Array
    labels: Array
    k: int
    temperature: float
    num_classes: int

    @property
    def chosen_by(self) -> str:
        return f"k {min(self.k, len(self.train))}, declared"

    def predict(self, features: Array) -> Array:
        """Class probabilities [n, num_classes] of `features` [n, D]."""
        mean, std = self.train.mean(0, dtype=np.float64), self.train.std(0, dtype=np.float64)
        std = np.where(std > 0, std, 1.0)
        known, asked = (self.train - mean) / std, (features - mean) / std
        return knn(known, self.labels, asked, self.k, self.temperature, self.num_classes)


def fit_linear(
    features: Array,
    labels: Array,
    *,
    c_grid: Sequence[float],
    folds: int,
    seed: int,
    groups: Array | None = None,
    num_classes: int | None = None,
) -> LinearProbe:
    """Fit multinomial logistic regression on standardised `features` [n, D], `labels` [n], a row a subject.

    The C with the lowest held-out log-loss over inner stratified folds of these same rows wins (the smaller C
    at a tie); `groups` [n] (families, heads) never straddle an inner fold. When a class has fewer than two
    groups there is nothing to tune on: the middle of the grid is used, and `chosen_by` says so. Raises
    ValueError for one class only.
    """
    labels = np.asarray(labels).astype(np.int64)
    grid = sorted(float(c) for c in c_grid)
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    classes = np.unique(labels)
    if not grid or grid[0] <= 0:
        raise ValueError(f"c_grid must hold positive values, got {list(c_grid)}")
    if len(features) != len(labels) or len(groups) != len(labels):
        raise ValueError(
            f"{len(features)} features, {len(labels)} labels and {len(groups)} groups do not match"
        )
    if len(classes) < 2:
        raise ValueError("a probe needs at least two classes among its labelled subjects")
    total = int(classes.max()) + 1 if num_classes is None else num_classes
    scarcest = min(len(np.unique(groups[labels == label])) for label in classes)
    inner = min(folds, scarcest)
    c, chosen_by = grid[len(grid) // 2], "the only value given"
    if len(grid) > 1:
        losses = _inner_losses(features, labels, groups, grid, inner, seed) if inner >= 2 else None
        if losses is None:
            chosen_by = f"the middle of the grid: a class has {scarcest} subject(s), too few for inner folds"
        else:
            c, chosen_by = grid[int(np.argmin(losses))], f"log-loss over {inner} inner folds"
    return replace(_fit(features, labels, c, seed, total), chosen_by=chosen_by)


def knn(
    train: Array,
    labels: Array,
    test: Array,
    k: int,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Array:
    """Class probabilities [n_test, num_classes] by weighted k-NN (Wu et al., 2018, section 3.4).

    The k nearest rows of `train` [n, D] by cosine similarity vote with weight exp(similarity / temperature);
    k is cut to n. Ties in similarity go to the earlier row.
    """
    labels = np.asarray(labels).astype(np.int64)
    if k < 1 or len(train) != len(labels):
        raise ValueError(
            f"k-NN needs k >= 1 and a label for each row, got k={k}, {len(train)} rows, {len(labels)}"
        )
    k = min(k, len(train))
    similarity = _unit(test) @ _unit(train).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    top = np.take_along_axis(similarity, nearest, axis=1)
    votes = np.exp((top - top[:, :1]) / temperature)
    total = int(labels.max()) + 1 if num_classes is None else num_classes
    probabilities = np.zeros((len(test), total))
    for rank in range(k):
        probabilities[np.arange(len(test)), labels[nearest[:, rank]]] += votes[:, rank]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return probabilities


def _unit(features: Array) -> Array:
    features = np.asarray(features, dtype=np.float64)
    unit: Array = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return unit


def _fit(features: Array, labels: Array, c: float, seed: int, num_classes: int) -> LinearProbe:
    scaler = StandardScaler()
    values = scaler.fit_transform(np.asarray(features, dtype=np.float64))
    model = LogisticRegression(C=c, max_iter=1000, random_state=seed)
    with warnings.catch_warnings():
        # A weakly regularised fit of separable subjects has no finite optimum; its loss decides, not the
        # warning.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(values, labels)
    learnt = (model.coef_, model.intercept_, model.classes_)
    return LinearProbe(scaler.mean_, scaler.scale_, *learnt, num_classes, c)


def _inner_losses(
    features: Array, labels: Array, groups: Array, grid: list[float], folds: int, seed: int
) -> Array | None:
    """Held-out log-loss of each C, pooled over rows; None if a training part would miss a class."""
    losses = np.zeros(len(grid))
    total = int(labels.max()) + 1
    for train, test in inner_folds(labels, groups, folds, seed):
        if len(np.unique(labels[train])) < len(np.unique(labels)):
            return None
        for index, c in enumerate(grid):
            predicted = _fit(features[train], labels[train], c, seed, total).predict(features[test])
            losses[index] -= np.log(np.maximum(predicted[np.arange(len(test)), labels[test]], 1e-12)).sum()
    return losses


def inner_folds(labels: Array, groups: Array, folds: int, seed: int) -> Iterator[tuple[Array, Array]]:
    """(training rows, held-out rows) of each inner fold: stratified, no group on both sides."""
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    yield from splitter.split(np.zeros(len(labels)), labels, groups)
