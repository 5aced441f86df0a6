"""What a session's quality page needs to know of its pixels, measured once, while they are at hand.

Everything is a number of a conformed session, cheap (a sample of voxels, every fourth slice) and without a threshold:
what is odd is decided later, against the cohort.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Native = tuple[NDArray[Any], NDArray[np.float64]]  # voxels [I, J, K] as stored, and their affine to RAS mm

PERCENT = tuple(range(0, 101, 5))  # of the raw intensities inside the brain
SAMPLE = 40_000  # voxels looked at
STRIDE = 4  # of slices, where whole slices are looked at


def measures(
    native: Mapping[str, Native],
    channels: Sequence[str],
    volumes: NDArray[Any],
    brain: NDArray[np.bool_],
    affine: NDArray[np.float64],
) -> dict[str, Any]:
    """Measures of a session: `volumes` [C, Z, H, W] of `channels`, `brain` [Z, H, W], affine (row, column, slice, 1) to
    RAS mm.

    `native`: the scans of the channels that are present. Returns `brain_ml`, `extent_mm` (left-right, front-back,
    up-down), `fill` (share of the ellipsoid in its bounding box that is brain), for each channel `quantiles` (raw
    intensities at `PERCENT`), `sharpness` (mean step between neighbours in plane over the standard deviation), `cover`
    (share of the brain with a signal) and `symmetry` (correlation with the mirror image), and for each pair of channels
    their `correlation`. Four digits; None where it is undefined.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)  # row, column, slice
    box = [int(np.ptp(np.flatnonzero(brain.any(axis=axes)))) + 1 for axes in ((0, 1), (0, 2), (1, 2))]
    extent = np.array(box) * spacing[[1, 0, 2]]
    count = int(np.count_nonzero(brain))
    ml = count * float(np.prod(spacing)) / 1000
    places = np.flatnonzero(brain)[:: max(1, count // SAMPLE)]
    found = np.array(np.unravel_index(places, brain.shape))
    world = affine[:3] @ np.stack([found[1], found[2], found[0], np.ones(len(places))])
    slices = np.flatnonzero(brain.any(axis=(1, 2)))[::STRIDE]
    values = {name: volumes[channels.index(name)].reshape(-1)[places].astype(np.float64) for name in native}
    return {
        "brain_ml": _short(ml),
        "extent_mm": [_short(float(mm)) for mm in extent],
        "fill": _short(ml * 1000 / (np.pi / 6 * float(np.prod(extent)))),
        "channels": {
            name: {
                "quantiles": _quantiles(*scan, world),
                "cover": _short(float(np.mean(values[name] > 0))),
                **_looks(volumes[channels.index(name), slices].astype(np.float32)),
            }
            for name, scan in native.items()
        },
        "correlation": {
            f"{a}+{b}": _correlation(values[a], values[b], (values[a] > 0) & (values[b] > 0))
            for a, b in itertools.combinations(native, 2)
        },
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _quantiles(
    data: NDArray[Any], affine: NDArray[np.float64], world: NDArray[np.float64]
) -> list[float] | None:
    """Raw intensities at `PERCENT` of the voxels nearest to `world` [3, n] mm."""
    inverse = np.linalg.inv(affine)
    index = np.rint(inverse[:3, :3] @ world + inverse[:3, 3:]).astype(int)
    index = index[:, ((index >= 0) & (index < np.array(data.shape[:3])[:, None])).all(axis=0)]
    values = np.asarray(data[tuple(index)], np.float64)
    values = values[np.isfinite(values)]
    return [_short(float(q)) for q in np.percentile(values, PERCENT)] if len(values) else None


def _looks(slices: NDArray[np.float32]) -> dict[str, float | None]:
    """Sharpness and symmetry of some slices [n, H, W], where 0 is outside the brain."""
    inside = slices > 0
    spread = float(slices[inside].std()) if inside.any() else 0.0
    steps = [
        np.abs(np.diff(slices, axis=axis))[
            np.take(inside, range(1, inside.shape[axis]), axis)
            & np.take(inside, range(inside.shape[axis] - 1), axis)
        ]
        for axis in (1, 2)
    ]
    step = np.concatenate(steps)
    mirrored = slices[:, :, ::-1]
    both = inside & (mirrored > 0)
    return {
        "sharpness": _short(float(step.mean()) / spread) if step.size and spread > 0 else None,
        "symmetry": _correlation(slices, mirrored, both),
    }


def _correlation(first: NDArray[Any], second: NDArray[Any], where: NDArray[np.bool_]) -> float | None:
    a, b = first[where].astype(np.float64), second[where].astype(np.float64)
    if len(a) < 2 or not a.std() > 0 or not b.std() > 0:
        return None
    return _short(float(np.corrcoef(a, b)[0, 1]))
