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

from cranium.volume.slices import Box, box

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
    part = box(brain)
    low = np.array([side.start for side in part])
    size = np.array([side.stop for side in part]) - low
    extent = (size * spacing[[2, 0, 1]])[::-1]
    count = int(np.count_nonzero(brain))
    ml = count * float(np.prod(spacing)) / 1000
    places = np.flatnonzero(brain[part])[:: max(1, count // SAMPLE)]
    found = np.array(np.unravel_index(places, size)) + low[:, None]
    world = affine[:3] @ np.stack([found[1], found[2], found[0], np.ones(len(places))])
    values = {name: volumes[channels.index(name)][tuple(found)].astype(np.float64) for name in native}
    return {
        "brain_ml": _short(ml),
        "extent_mm": [_short(float(mm)) for mm in extent],
        "fill": _short(ml * 1000 / (np.pi / 6 * float(np.prod(extent)))),
        "channels": {
            name: {
                "quantiles": _quantiles(*scan, world),
                "cover": _short(float(np.mean(values[name] > 0))),
                **_looks(volumes[channels.index(name)], part),
            }
            for name, scan in native.items()
        },
        "correlation": {
            f"{a}+{b}": _correlation(*(values[name][(values[a] > 0) & (values[b] > 0)] for name in (a, b)))
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
    values = np.sort(values[np.isfinite(values)])
    ranks = np.arange(len(values))
    at = np.array(PERCENT) / 100 * (len(values) - 1)
    return [_short(float(q)) for q in np.interp(at, ranks, values)] if len(values) else None


def _looks(volume: NDArray[Any], part: Box) -> dict[str, float | None]:
    """Sharpness and symmetry of every `STRIDE`-th slice of [Z, H, W], 0 outside the brain; `part` is its box."""
    z, rows, columns = part
    edge = min(columns.start, volume.shape[2] - columns.stop)  # the mirror stands in the middle of the grid
    seen = volume[z.start : z.stop : STRIDE, rows, edge : volume.shape[2] - edge]
    inside = seen > 0
    total = pairs = 0
    for one, other in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[..., 1:], np.s_[..., :-1])):
        both = inside[one] & inside[other]
        steps = np.maximum(seen[one], seen[other]) - np.minimum(seen[one], seen[other])
        total += int((steps * both).sum(dtype=np.int64))
        pairs += int(np.count_nonzero(both))
    spread = float(seen[inside].std()) if pairs else 0.0
    both = inside & inside[..., ::-1]
    return {
        "sharpness": _short(total / pairs / spread) if spread > 0 else None,
        "symmetry": _correlation(seen[both], seen[..., ::-1][both]),
    }


def _correlation(first: NDArray[Any], second: NDArray[Any]) -> float | None:
    if len(first) < 2:
        return None
    a, b = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (first, second))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return _short(float(a @ b) / scale) if scale > 0 else None
