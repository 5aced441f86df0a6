"""Brain, tissue and ventricle volumes of a T1w head by a classical method: what a reviewer asks for first.

Inside the mask (what is not zero) a mixture of three Gaussians is fitted to the intensities (expectation
maximisation, as in Ashburner and Friston 2005 without priors or bias field). By rising mean its classes are, on T1w,
CSF, grey and white matter. CSF far from the brain's surface stands for the ventricles. Crude beside a segmentation of
anatomy, but it knows size and atrophy, and nothing that was learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[Any]
DEEP_MM = 15.0  # from the surface of the mask: beyond the cortex and its sulci


class Mixture(NamedTuple):
    """Weights, means and standard deviations [3] of a mixture, by rising mean."""

    weights: Array
    means: Array
    stds: Array


class Volumes(NamedTuple):
    """In ml; `deep_csf` is the ventricles' stand-in."""

    brain: float
    csf: float
    grey: float
    white: float
    deep_csf: float


def volumes(image: NDArray[np.uint8], spacing: Sequence[float]) -> Volumes | None:
    """Of a T1w head uint8 [Z, H, W] without skull, zero outside the brain; `spacing` in mm along each axis.

    None where the image holds no brain, or fewer than three intensities.
    """
    counts = np.bincount(image.ravel(), minlength=256).astype(np.float64)
    counts[0] = 0
    if np.count_nonzero(counts) < 3:
        return None
    belongs = responsibilities(mixture(counts)).argmax(axis=1)  # class of each of 256 intensities
    mask = image > 0
    label = np.where(mask, belongs[image] + 1, 0)
    ml = float(np.prod(spacing)) / 1000
    padded = np.pad(
        mask, ((0, 0), (1, 1), (1, 1))
    )  # slices end where rows were kept, not where the brain does
    deep = ndimage.distance_transform_edt(padded, sampling=spacing)[:, 1:-1, 1:-1] > DEEP_MM
    _, csf, grey, white = (np.bincount(label.ravel(), minlength=4) * ml).tolist()
    return Volumes(float(mask.sum()) * ml, csf, grey, white, float(((label == 1) & deep).sum()) * ml)


def mixture(counts: Array, steps: int = 200, tolerance: float = 1e-6) -> Mixture:
    """Three Gaussians fitted to a histogram [256] by expectation maximisation, from its own terciles.

    Stops when the mean log-likelihood gains less than `tolerance`. Standard deviations are kept at 1 or above, the
    width of a bin of these integers.
    """
    values = np.arange(len(counts), dtype=np.float64)
    share = counts / counts.sum()
    rank = np.cumsum(share) - share / 2
    third = np.clip((rank * 3).astype(int), 0, 2)
    belongs = np.eye(3)[third]
    before = -np.inf
    for _ in range(steps):
        mass = np.maximum((share[:, None] * belongs).sum(0), 1e-12)
        means = (share[:, None] * belongs * values[:, None]).sum(0) / mass
        spread = (share[:, None] * belongs * (values[:, None] - means) ** 2).sum(0) / mass
        fitted = Mixture(mass / mass.sum(), means, np.sqrt(np.maximum(spread, 1.0)))
        density = _density(fitted, values)
        total = density.sum(1)
        belongs = density / np.maximum(total, 1e-300)[:, None]
        now = float((share * np.log(np.maximum(total, 1e-300))).sum())
        if now - before < tolerance:
            break
        before = now
    order = np.argsort(fitted.means)
    return Mixture(fitted.weights[order], fitted.means[order], fitted.stds[order])


def responsibilities(fitted: Mixture, bins: int = 256) -> Array:
    """Probability [bins, 3] of each class at each intensity.

    Beyond the lowest and highest mean the outer class takes all: a wide Gaussian would claim both tails.
    """
    values = np.arange(bins, dtype=np.float64)
    density = _density(fitted, values)
    density[values <= fitted.means[0]] = (1, 0, 0)
    density[values >= fitted.means[2]] = (0, 0, 1)
    shares: Array = density / np.maximum(density.sum(1), 1e-300)[:, None]
    return shares


def _density(fitted: Mixture, values: Array) -> Array:
    z = (values[:, None] - fitted.means) / fitted.stds
    density: Array = fitted.weights * np.exp(-0.5 * z**2) / (fitted.stds * np.sqrt(2 * np.pi))
    return density
