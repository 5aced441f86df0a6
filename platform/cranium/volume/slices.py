"""From volumes in world space to slice stacks on one grid per session, and back.

The grid of a session is aligned with the world's axes and has a fixed spacing in mm, so that a tilted or flipped scan
gives the same stacks, and the size of a head or a ventricle survives. Index order is [slice, row, column]: slices run
from inferior to superior, rows from anterior (top) to posterior, columns from left to right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

Affine = NDArray[np.float64]
Box = tuple[slice, slice, slice]  # of an array with three axes

_FWHM = 2 * np.sqrt(2 * np.log(2))  # of a Gaussian, in standard deviations


@dataclass(frozen=True)
class Grid:
    """`shape` [Z, H, W]; `affine` (row, column, slice, 1) -> RAS+ world mm."""

    shape: tuple[int, int, int]
    affine: Affine

    @property
    def affine_xyz(self) -> Affine:
        """(column, row, slice, 1) -> world: the order in which the array's memory runs, fastest first."""
        return self.affine[:, [1, 0, 2, 3]]


def session_grid(
    mask: NDArray[np.bool_], affine: Affine, size: int, spacing: float, slice_spacing: float
) -> Grid:
    """The grid of `size` x `size` pixels centred on the bounding box of `mask` [I, J, K], with slices from end to end.

    Spacings in mm. Raises `ValueError` for an empty mask.
    """
    low, high = bounding_box(mask, affine)
    centre = np.round((low + high) / 2, 3)  # a thousandth of a mm: float32 headers differ by less than that
    num_slices = int(np.ceil(np.round((high[2] - low[2]) / slice_spacing, 3))) + 1
    half = (size - 1) / 2
    grid = np.zeros((4, 4))
    grid[1, 0] = -spacing  # rows: anterior to posterior
    grid[0, 1] = spacing  # columns: left to right
    grid[2, 2] = slice_spacing
    grid[:, 3] = [
        centre[0] - half * spacing,
        centre[1] + half * spacing,
        centre[2] - (num_slices - 1) / 2 * slice_spacing,
        1,
    ]
    return Grid((num_slices, size, size), grid)


def box_grid(low: Affine, high: Affine, spacing: float) -> Grid:
    """The grid of one spacing that covers a box of the world, whose centre is its own."""
    counts = np.ceil(np.round((high - low) / spacing, 3)).astype(int) + 1
    grid = np.zeros((4, 4))
    grid[1, 0], grid[0, 1], grid[2, 2] = -spacing, spacing, spacing
    reach = (counts - 1) / 2 * spacing
    grid[:, 3] = [*((low + high) / 2 + reach * (-1, 1, -1)), 1]
    return Grid((int(counts[2]), int(counts[1]), int(counts[0])), grid)


def bounding_box(mask: NDArray[np.bool_], affine: Affine) -> tuple[Affine, Affine]:
    """Least and greatest world coordinates (mm) of the centres of the voxels that are set."""
    if not mask.any():
        raise ValueError("the mask is empty")
    # The extremes lie at the ends of a line, so only those are looked at: exact, and a hundredth of the voxels. Of RAS
    # volumes the first axis is the one that runs through memory.
    starts = np.argwhere(mask.any(axis=0))
    lines = mask.transpose(1, 2, 0)[starts[:, 0], starts[:, 1]]
    first = lines.argmax(axis=1)
    last = mask.shape[0] - 1 - lines[:, ::-1].argmax(axis=1)
    ends = np.concatenate([np.column_stack([first, starts]), np.column_stack([last, starts])])
    world = ends @ affine[:3, :3].T + affine[:3, 3]
    return world.min(axis=0), world.max(axis=0)


def box(mask: NDArray[np.bool_]) -> Box:
    """The smallest box [Z, H, W] that holds all that is set; that of the first cell where nothing is."""
    sides = [np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    z, y, x = (slice(int(side[0]), int(side[-1]) + 1) if len(side) else slice(0, 1) for side in sides)
    return z, y, x


def onto_grid(
    data: NDArray[Any], affine: Affine, grid: Grid, *, labels: bool = False, part: Box | None = None
) -> NDArray[Any]:
    """Resample a volume [I, J, K] onto a grid: [Z, H, W] float32, NaN outside the volume's field of view.

    Linear; where the grid is coarser than the volume, a Gaussian first takes away what it cannot hold (Cardoso et al.
    2015, MICCAI, "Scale factor point spread function matching"). `part`: only these cells. `labels`: nearest voxel, own
    dtype, 0 outside, all cells.
    """
    step = np.linalg.inv(affine) @ grid.affine_xyz
    if not labels:
        data = _smoothed(data.astype(np.float32, copy=False), affine, grid)
        z, y, x = grid.shape
        return _cells(data, step, part or (slice(0, z), slice(0, y), slice(0, x)), labels=False)
    result = np.zeros(grid.shape, data.dtype)
    if data.any():
        near = _near(data != 0, affine, grid)
        result[near] = _cells(data, step, near, labels=True)
    return result


def _cells(data: NDArray[Any], step: Affine, part: Box, labels: bool) -> NDArray[Any]:
    z, y, x = part
    shape = (x.stop - x.start, y.stop - y.start, z.stop - z.start)
    return _resample(data, step, shape, labels, (x.start, y.start, z.start)).transpose(2, 1, 0)


def _near(mask: NDArray[np.bool_], affine: Affine, grid: Grid) -> Box:
    """The cells whose nearest voxel may be one that is set, and at least one: the rest need no look."""
    half = np.abs(affine[:3, :3]).sum(axis=1) / 2  # of a voxel
    low, high = bounding_box(mask, affine)
    ends = (
        np.linalg.inv(grid.affine) @ np.array([[*(low - half), 1], [*(high + half), 1]]).T
    )  # row, column, slice
    least = np.floor(ends[[2, 0, 1]].min(axis=1))
    most = np.ceil(ends[[2, 0, 1]].max(axis=1))
    return _clipped(least, most, grid.shape)


def to_native(
    labels: NDArray[Any],
    grid: Grid,
    shape: tuple[int, int, int],
    affine: Affine,
    transform: Affine | None = None,
) -> NDArray[Any]:
    """A label map [Z, H, W] of a grid on the scan's own voxels [I, J, K]: the nearest pixel, 0 outside the grid.

    `transform`: what aligned the scan with its session (`transforms` of `sessions.parquet`), world -> world.
    """
    placed = affine if transform is None else transform @ affine
    return nearest(labels.transpose(2, 1, 0), grid.affine_xyz, shape, placed)


def most_probable(
    probabilities: NDArray[np.float32],
    grid: Grid,
    shape: tuple[int, int, int],
    affine: Affine,
    transform: Affine | None = None,
) -> NDArray[np.uint8]:
    """The class of each of the scan's own voxels [I, J, K], from the probabilities [K, Z, H, W] of a grid.

    Probabilities are interpolated linearly and compared there, so that a border is not bound to the grid's pixels.
    Class 0, background, outside the grid; ties go to the lower class. `transform` as in `to_native`.
    """
    placed = affine if transform is None else transform @ affine
    step = np.linalg.inv(grid.affine_xyz) @ placed
    best, found = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.uint8)
    for index, values in enumerate(probabilities):
        here = np.nan_to_num(_resample(values.transpose(2, 1, 0), step, shape, labels=False), nan=-1.0)
        higher = here > best
        best[higher], found[higher] = here[higher], index
    return found


def nearest(labels: NDArray[Any], affine: Affine, shape: tuple[int, ...], other: Affine) -> NDArray[Any]:
    """Labels on the voxels of `affine`, at the voxels of another grid: the nearest, 0 outside."""
    return _resample(labels, np.linalg.inv(affine) @ other, shape, labels=True)


def _resample(
    data: NDArray[Any],
    step: Affine,
    shape: tuple[int, ...],
    labels: bool,
    start: tuple[int, int, int] = (0, 0, 0),
) -> NDArray[Any]:
    """`step` maps `start` + an index of the result [x, y, z] to an index of `data` [i, j, k]."""
    step = np.round(step, 6)  # so that headers equal up to float32 noise give equal voxels
    if labels:
        step[:3, 3] += 5e-7  # no place lies just between two voxels, where the last bit would choose
    touched = _touched(step, start, shape, data.shape)
    step[:3, 3] -= [side.start for side in touched]
    image = sitk.GetImageFromArray(np.ascontiguousarray(data[touched].transpose(2, 1, 0)))
    transform = sitk.AffineTransform(step[:3, :3].ravel().tolist(), step[:3, 3].tolist())
    method, outside = (sitk.sitkNearestNeighbor, 0.0) if labels else (sitk.sitkLinear, float("nan"))
    identity = np.eye(3).ravel().tolist()
    result = sitk.Resample(image, shape, transform, method, start, (1.0,) * 3, identity, outside)
    array: NDArray[Any] = sitk.GetArrayFromImage(result)
    return array.transpose(2, 1, 0)


def _touched(step: Affine, start: tuple[int, ...], shape: tuple[int, ...], of: tuple[int, ...]) -> Box:
    """The voxels among which the result's lie and one more at each side: copying all takes longer than resampling."""
    ends = [(first, first + count - 1) for first, count in zip(start, shape, strict=True)]
    places = step[:3] @ np.array(np.meshgrid(*ends, [1], indexing="ij")).reshape(4, -1)
    return _clipped(np.floor(places.min(axis=1)) - 1, np.ceil(places.max(axis=1)) + 1, of)


def _clipped(low: Affine, high: Affine, shape: tuple[int, ...]) -> Box:
    """From `low` to `high`, as far as an array of this shape has it, but at least its nearest cell."""
    last = np.array(shape) - 1
    ends = (np.clip(low, 0, last).astype(int).tolist(), np.clip(high, 0, last).astype(int).tolist())
    i, j, k = (slice(first, final + 1) for first, final in zip(*ends, strict=True))
    return i, j, k


def _smoothed(data: NDArray[np.float32], affine: Affine, grid: Grid) -> NDArray[np.float32]:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    target = np.linalg.norm(grid.affine_xyz[:3, :3], axis=0)
    along = np.abs(affine[:3, :3] / spacing).argmax(axis=0)  # the world axis nearest to each voxel axis
    for axis in range(3):
        ratio = target[along[axis]] / spacing[axis]
        if ratio > 1.01:
            data = ndimage.gaussian_filter1d(
                data, np.sqrt(ratio**2 - 1) / _FWHM, axis, mode="nearest", truncate=3.0
            )
    return data


def limit_threads(threads: int) -> None:
    """How many threads resampling may use in this process; the result does not depend on it."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


@dataclass(frozen=True)
class Kept:
    """The rule that keeps slices. `brain`: from the first to the last with enough brain. `range`: `count` slices at
    most from the index `first` of the grid on (BrainFound takes 140 from the 10th). Of those, every `every`-th.
    """

    rule: Literal["brain", "range"] = "brain"
    first: int = 10
    count: int = 140
    every: int = 1


BRAIN = Kept()


def kept(brain: NDArray[np.bool_], min_brain: float, rule: Kept = BRAIN) -> range:
    """Which slices of [Z, H, W] are kept, as one run with a step; nothing where no slice holds any brain.

    By default from the first to the last whose share of brain pixels reaches `min_brain`: without gaps, so that a
    slice's neighbours are its neighbours in the head.
    """
    enough = np.flatnonzero((brain.mean(axis=(1, 2)) >= min_brain) & brain.any(axis=(1, 2)))
    if not len(enough):
        return range(0)
    if rule.rule == "range":
        return range(rule.first, min(rule.first + rule.count, len(brain)), rule.every)
    return range(int(enough[0]), int(enough[-1]) + 1, rule.every)


def _run(slices: range) -> slice:
    return slice(slices.start, slices.stop, slices.step)


def kept_grid(grid: Grid, slices: range) -> Grid:
    """The grid of the slices that were kept alone: every n-th one is then n times as thick."""
    affine = grid.affine.copy()
    affine[:, 3] += slices.start * affine[:, 2]
    affine[:, 2] *= slices.step
    return Grid((len(slices), *grid.shape[1:]), affine)


def to_stacks(volumes: NDArray[Any], slices: range, depth: int = 1) -> NDArray[Any]:
    """Volumes [C, Z, H, W] -> stacks [n, C, depth, H, W] of the slices of a run, each in the middle of its neighbours.

    Neighbours are those in the volume, kept or not; zero beyond its ends. `depth` is odd.
    """
    if depth < 1 or depth % 2 == 0:
        raise ValueError(f"a stack of {depth} slices has no middle one")
    reach = depth // 2
    padded = np.pad(volumes, ((0, 0), (reach, reach), (0, 0), (0, 0))) if reach else volumes
    windows = np.lib.stride_tricks.sliding_window_view(padded, depth, axis=1)  # [C, Z, H, W, depth]
    return np.ascontiguousarray(windows[:, _run(slices)].transpose(1, 0, 4, 2, 3))


def from_stacks(stacks: NDArray[Any], slices: range, num_slices: int) -> NDArray[Any]:
    """The inverse of `to_stacks`, by the middle slices: [C, Z, H, W], zero where none was kept."""
    n, c, s, h, w = stacks.shape
    if n != len(slices):
        raise ValueError(f"{n} stacks cannot fill {len(slices)} slices")
    volumes = np.zeros((c, num_slices, h, w), stacks.dtype)
    volumes[:, _run(slices)] = stacks[:, :, s // 2].transpose(1, 0, 2, 3)
    return volumes
