"""Metrics of one test set. A metric that has no value says why: it is never NaN or 0 in a mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Undefined:
    """A value that does not exist, and the reason in words."""

    reason: str


Value = float | Undefined
SPECIFICITY = 0.9  # at which sensitivity is told
BINS = 15  # of confidence, for calibration


def checked(labels: ArrayLike, probs: ArrayLike) -> tuple[Ints, Floats]:
    """labels [n] and class scores [n, k]; a vector of binary scores p becomes the columns 1 - p, p."""
    y, p = np.asarray(labels), np.asarray(probs, dtype=np.float64)
    if p.ndim == 1:
        p = np.stack([1 - p, p], axis=1)
    if y.ndim != 1 or p.ndim != 2 or len(y) != len(p) or p.shape[1] < 2:
        raise ValueError(f"labels [n] and scores [n, k>=2] needed, got {list(y.shape)} and {list(p.shape)}")
    if not np.isfinite(p).all():
        raise ValueError(f"{int((~np.isfinite(p)).any(axis=1).sum())} of {len(p)} score rows are not finite")
    y = y.astype(np.int64)
    if len(y) and (y.min() < 0 or y.max() >= p.shape[1]):
        raise ValueError(f"labels run {y.min()}..{y.max()} but there are {p.shape[1]} classes")
    return y, p


def _absent(y: Ints, num_classes: int) -> Undefined | None:
    missing = [str(k) for k in range(num_classes) if not (y == k).any()]
    if missing:
        return Undefined(f"no subject of class {', '.join(missing)} among {len(y)}")
    return None


def _one_vs_rest(
    labels: ArrayLike, probs: ArrayLike, score: Callable[[NDArray[np.bool_], Floats], float]
) -> Value:
    """Binary: the score of class 1. More classes: the plain mean over classes, each against the rest."""
    y, p = checked(labels, probs)
    absent = _absent(y, p.shape[1])
    if absent:
        return absent
    positives = [1] if p.shape[1] == 2 else range(p.shape[1])
    return float(np.mean([score(y == k, p[:, k]) for k in positives]))


def auroc(labels: ArrayLike, probs: ArrayLike) -> Value:
    """Area under the ROC curve by ranks, ties counted half; macro one-vs-rest beyond two classes.

    labels [n] ints, probs [n] or [n, k]. Undefined when a class is absent.
    """

    def by_ranks(positive: NDArray[np.bool_], score: Floats) -> float:
        n1, n0 = int(positive.sum()), int((~positive).sum())
        return float((stats.rankdata(score)[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))

    return _one_vs_rest(labels, probs, by_ranks)


def aupr(labels: ArrayLike, probs: ArrayLike) -> Value:
    """Average precision: sum over thresholds of (recall step) x precision; macro beyond two classes."""

    def average_precision(positive: NDArray[np.bool_], score: Floats) -> float:
        order = np.argsort(-score, kind="stable")
        hits, ranked = np.cumsum(positive[order]), score[order]
        last = np.append(ranked[1:] != ranked[:-1], True)  # one threshold per distinct score
        precision = hits[last] / (np.flatnonzero(last) + 1)
        return float(np.sum(np.diff(np.append(0, hits[last])) * precision) / positive.sum())

    return _one_vs_rest(labels, probs, average_precision)


def most_probable(probs: Floats) -> Ints:
    """The class [n] of `probs` [n, k]. A binary tie at 0.5 goes to class 1, as with the threshold p >= 0.5."""
    guess: Ints = (probs[:, 1] >= probs[:, 0]).astype(np.int64) if probs.shape[1] == 2 else probs.argmax(1)
    return guess


def balanced_accuracy(labels: ArrayLike, probs: ArrayLike) -> Value:
    """Mean over classes of the recall of the most probable class. Undefined when a class is absent."""
    y, p = checked(labels, probs)
    absent = _absent(y, p.shape[1])
    if absent:
        return absent
    guess = most_probable(p)
    return float(np.mean([(guess[y == k] == k).mean() for k in range(p.shape[1])]))


def f1(labels: ArrayLike, probs: ArrayLike) -> Value:
    """2 TP / (2 TP + FP + FN) of the most probable class: of class 1, or the plain mean over more than two classes."""
    y, p = checked(labels, probs)
    absent = _absent(y, p.shape[1])
    if absent:
        return absent
    guess = most_probable(p)
    found = [1] if p.shape[1] == 2 else range(p.shape[1])
    return float(
        np.mean([2 * ((guess == k) & (y == k)).sum() / ((guess == k).sum() + (y == k).sum()) for k in found])
    )


def thresholds(labels: ArrayLike, probs: ArrayLike, specificity: float = SPECIFICITY) -> Floats | Undefined:
    """The lowest score of class 1 (or of each of more classes) that at most 1 - specificity of the others reach.

    [1] or [k]; inf where no score is so selective.
    """
    y, p = checked(labels, probs)
    absent = _absent(y, p.shape[1])
    if absent:
        return absent
    found = []
    for k in [1] if p.shape[1] == 2 else range(p.shape[1]):
        others, scores = np.sort(p[y != k, k]), np.append(np.unique(p[:, k]), np.inf)
        passing = (len(others) - np.searchsorted(others, scores)) / len(others)
        found.append(scores[np.flatnonzero(passing <= 1 - specificity + 1e-12)[0]])
    return np.array(found)


def at_thresholds(labels: ArrayLike, probs: ArrayLike, at: Floats) -> tuple[Value, Value]:
    """Sensitivity and specificity of score >= threshold; plain means over the classes of `at` (of `thresholds`)."""
    y, p = checked(labels, probs)
    absent = _absent(y, p.shape[1])
    if absent:
        return absent, absent
    classes = [1] if p.shape[1] == 2 else range(p.shape[1])
    called = [(p[:, k] >= threshold, y == k) for k, threshold in zip(classes, at, strict=True)]
    sensitivity = np.mean([positive[own].mean() for positive, own in called])
    return float(sensitivity), float(np.mean([1 - positive[~own].mean() for positive, own in called]))


def sensitivity_at_90(labels: ArrayLike, probs: ArrayLike) -> Value:
    """Sensitivity where the ROC curve of this test set has a specificity of at least 90 %."""
    at = thresholds(labels, probs)
    return at if isinstance(at, Undefined) else at_thresholds(labels, probs, at)[0]


def brier(labels: ArrayLike, probs: ArrayLike) -> Value:
    """Mean squared error of probabilities: binary (p1 - y)^2 in 0..1, else summed over classes in 0..2."""
    y, p = checked(labels, probs)
    if not len(y):
        return Undefined("no subjects")
    if p.shape[1] == 2:
        return float(np.mean((p[:, 1] - y) ** 2))
    return float(np.mean(np.sum((p - np.eye(p.shape[1])[y]) ** 2, axis=1)))


def ece(labels: ArrayLike, probs: ArrayLike) -> Value:
    """Expected calibration error of the top class over equal-width bins (Guo et al. 2017, equation 3)."""
    y, p = checked(labels, probs)
    if not len(y):
        return Undefined("no subjects")
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == y
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # bins are (low, high]
    gap = np.bincount(place, confidence, BINS) - np.bincount(place, correct, BINS)
    return float(np.abs(gap).sum() / len(y))


def classification_metrics(labels: ArrayLike, probs: ArrayLike) -> dict[str, Value]:
    """All of the above by name, for one test set."""
    scores = (auroc, aupr, balanced_accuracy, f1, sensitivity_at_90, brier, ece)
    return {score.__name__: score(labels, probs) for score in scores}


def _masks(truth: ArrayLike, prediction: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    a, b = np.asarray(truth), np.asarray(prediction)
    if a.shape != b.shape or a.dtype != np.bool_ or b.dtype != np.bool_:
        raise ValueError(
            f"two bool masks of one shape needed, got {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
    return a, b


BOTH_EMPTY = Undefined("nothing to find and nothing found: correct, and left out of the mean")


def missed(truth: ArrayLike, prediction: ArrayLike) -> bool:
    """Whether there was something to find and the prediction is empty; reported beside Dice and HD95."""
    a, b = _masks(truth, prediction)
    return bool(a.any() and not b.any())


def dice(truth: ArrayLike, prediction: ArrayLike) -> Value:
    """2 |A and B| / (|A| + |B|) of bool masks; 0 when only one is empty, Undefined when both are."""
    a, b = _masks(truth, prediction)
    size = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / size if size else BOTH_EMPTY


def hd95(truth: ArrayLike, prediction: ArrayLike, spacing: Sequence[float]) -> Value:
    """95 % Hausdorff distance in mm: the larger of both directed 95th percentiles between surface voxels.

    spacing: mm per voxel along each axis. When one mask is empty: the image diagonal (the worst case between
    voxel centres); when both are: Undefined.
    """
    a, b = _masks(truth, prediction)
    distances = _surface_distances(a, b, spacing)
    return distances if isinstance(distances, Undefined) else _hd95(distances, a.shape, spacing)


def surface_dice(
    truth: ArrayLike, prediction: ArrayLike, spacing: Sequence[float], tolerance_mm: float
) -> Value:
    """Share of the voxels of both surfaces that lie within `tolerance_mm` of the other (Nikolov et al. 2021,
    arXiv 1809.04430), a surface voxel counted as one. 0 when one mask is empty; Undefined when both are.
    """
    a, b = _masks(truth, prediction)
    distances = _surface_distances(a, b, spacing)
    return distances if isinstance(distances, Undefined) else _surface_dice(distances, tolerance_mm)


def segmentation_metrics(
    truth: ArrayLike, prediction: ArrayLike, spacing: Sequence[float], tolerance_mm: float
) -> dict[str, Value]:
    """`dice`, `hd95_mm` and `surface_dice` of one class of one subject, the surfaces measured once."""
    a, b = _masks(truth, prediction)
    distances = _surface_distances(a, b, spacing)
    if isinstance(distances, Undefined):
        return dict.fromkeys(("dice", "hd95_mm", "surface_dice"), distances)
    return {
        "dice": dice(a, b),
        "hd95_mm": _hd95(distances, a.shape, spacing),
        "surface_dice": _surface_dice(distances, tolerance_mm),
    }


Distances = tuple[Floats, Floats]


def _surface_distances(
    a: NDArray[np.bool_], b: NDArray[np.bool_], spacing: Sequence[float]
) -> Distances | Undefined:
    """mm from every surface voxel of `a` to the surface of `b`, and back; two empty arrays when one has none."""
    if len(spacing) != a.ndim:
        raise ValueError(f"{a.ndim} axes but {len(spacing)} spacings")
    if not a.any() or not b.any():
        return (np.empty(0), np.empty(0)) if a.any() or b.any() else BOTH_EMPTY
    box = ndimage.find_objects((a | b).astype(np.uint8))[
        0
    ]  # beyond it there is no surface: exact, and a fraction of the voxels
    edge_a, edge_b = (mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (a, b))
    to_b = ndimage.distance_transform_edt(~edge_b, sampling=spacing)[edge_a]
    to_a = ndimage.distance_transform_edt(~edge_a, sampling=spacing)[edge_b]
    return to_b, to_a


def _hd95(distances: Distances, shape: tuple[int, ...], spacing: Sequence[float]) -> float:
    if not len(distances[0]):
        return float(np.linalg.norm((np.array(shape) - 1) * np.asarray(spacing)))
    return float(max(np.percentile(part, 95) for part in distances))


def _surface_dice(distances: Distances, tolerance_mm: float) -> float:
    near = sum(int((part <= tolerance_mm).sum()) for part in distances)
    return near / sum(map(len, distances)) if len(distances[0]) else 0.0
