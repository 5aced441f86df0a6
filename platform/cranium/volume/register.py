"""Alignment: the contrasts of a session to one of them (rigid), a session to a template (affine); what is a failure.

Nothing is resampled here. A result is a matrix, world of the moving scan -> world of the fixed one (RAS mm), that
corrects the moving scan's affine, so that a voxel is interpolated once, on its way to the stack. Mattes' mutual
information (Mattes et al. 2003, IEEE TMI 22:120) on two levels, with Powell's search for the six rigid parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from cranium.volume.masks import Affine, Masked
from cranium.volume.quality import Rejected
from cranium.volume.slices import Grid, bounding_box, box_grid, onto_grid

FINE_MM = (
    2.0  # of the finer level, or the stack's own spacing where that is coarser; the other level is twice that
)
FIXED_MARGIN_MM = 12.0  # of head around the fixed brain
MOVING_MARGIN_MM = 40.0
MAX_SHIFT_MM = 30.0  # of the brain's centre, between two contrasts of one visit
MAX_TURN_DEGREES = 25.0
MIN_INFORMATION = 0.05  # nats: less, and the two scans tell nothing of each other
MIN_KEPT = (
    0.95  # share of the headers' information below which the search went astray; up to 1 the headers stand
)
MAX_SCALE = (0.6, 1.7)  # of a head against the template, along any axis
AXES = {"left-right": (1.0, 0.0, 0.0), "front-back": (0.0, 1.0, 0.0), "foot-head": (0.0, 0.0, 1.0)}
TURNS = (
    180,
    90,
    -90,
)  # degrees about each axis by which a brain is turned to see whether it then fits better
ROUGH_MM = 8.0  # of the grid on which that is tried
TURNED = 1.05  # times the information and more: it does (with right headers 1.00 at most, with wrong ones from 1.1 on)
MIN_OVERLAP = 0.8  # share of the smaller brain mask that lies in the other, after a fit to a template
SEED = 1  # of the metric's sample
TURN_SCALE_MM = 60.0  # a turn by a radian moves a voxel of the brain by about this much


@dataclass(frozen=True)
class Aligned:
    """`matrix`: world of the moving scan -> world of the fixed one; how far that is, and the information gained."""

    matrix: Affine
    shift_mm: float  # of the brain's centre
    turn_degrees: float
    largest_mm: float  # displacement of a corner of the brain's bounding box
    before: float  # mutual information, nats
    after: float
    dice: float = 1.0  # of the brain masks, after a fit to a template


@contextmanager
def single_thread() -> Iterator[None]:
    """SimpleITK sums in another order on another number of threads; on one, the bytes are always the same."""
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def rigid(moving: Masked, fixed: Masked, spacing_mm: float = FINE_MM) -> Aligned:
    """Turn and shift `moving` onto `fixed`, starting from where the headers place both.

    Raises `Rejected(REGISTRATION_FAILED)`: no overlap, no gain, no shared information, or a motion that no head makes
    during a visit.
    """
    spacing = max(FINE_MM, spacing_mm)
    low, high = bounding_box(fixed.brain, fixed.brain_affine)
    with single_thread():
        images = _images(moving, fixed, low, high, spacing)
        start = sitk.Euler3DTransform()
        start.SetCenter(((low + high) / 2).tolist())
        found, before, after = _search(images, start, [TURN_SCALE_MM] * 3 + [1.0] * 3)
    aligned = _measured(_inverse(_matrix(found)), low, high, before, after)
    if aligned.shift_mm > MAX_SHIFT_MM or aligned.turn_degrees > MAX_TURN_DEGREES:
        moved = f"{aligned.shift_mm:.0f} mm and {aligned.turn_degrees:.0f} degrees"
        raise Rejected("REGISTRATION_FAILED", f"would have to move by {moved} to fit the session's reference")
    return aligned


def affine(moving: Masked, fixed: Masked, spacing_mm: float = 0.0) -> Aligned:
    """Twelve degrees of freedom, for a brain onto a template's: boxes, then a similarity on two grids, then all.

    Both are compared inside their masks. Raises `Rejected(REGISTRATION_FAILED)` as `rigid`, for a scale of no head, for
    a brain that fits better turned, and for masks that do not cover each other after the fit.
    """
    spacing = max(FINE_MM, spacing_mm)
    low, high = bounding_box(fixed.brain, fixed.brain_affine)
    with single_thread():
        rough = _upright(moving, fixed)
        coarse = _images(moving, fixed, low, high, 2 * spacing, stripped=True)
        alike, _, _ = _search(coarse, rough, SIMILARITY_SCALES, kept=0.0)
        start = sitk.AffineTransform(3)
        start.SetCenter(alike.GetCenter())
        start.SetMatrix(alike.GetMatrix())
        start.SetTranslation(alike.GetTranslation())
        images = _images(moving, fixed, low, high, spacing, stripped=True)
        found, before, after = _search(images, start, [TURN_SCALE_MM] * 9 + [1.0] * 3, kept=0.0)
    matrix = _inverse(_matrix(found))
    scales = np.linalg.svd(matrix[:3, :3], compute_uv=False)
    if scales.min() < MAX_SCALE[0] or scales.max() > MAX_SCALE[1] or np.linalg.det(matrix[:3, :3]) <= 0:
        raise Rejected(
            "REGISTRATION_FAILED", f"would be scaled by {scales.round(2).tolist()} to fit the template"
        )
    share, dice = _overlap(moving, fixed, matrix, 2 * spacing)
    if share < MIN_OVERLAP:
        raise Rejected(
            "REGISTRATION_FAILED",
            f"{1 - share:.0%} of its brain mask, or of the template's, lies beside the other",
        )
    return replace(_measured(matrix, low, high, before, after), dice=dice)


SIMILARITY_SCALES = [2 * TURN_SCALE_MM] * 3 + [1.0] * 3 + [TURN_SCALE_MM]


def _similarity(
    moving: Masked, fixed: Masked, axis: tuple[float, ...] = (0.0, 0.0, 1.0), degrees: float = 0
) -> Any:
    """Fixed -> moving: box onto box, turned about its centre."""
    low, high = bounding_box(fixed.brain, fixed.brain_affine)
    ends = bounding_box(moving.brain, moving.brain_affine)
    start = sitk.Similarity3DTransform()
    start.SetCenter(((low + high) / 2).tolist())
    start.SetScale(float(np.prod((ends[1] - ends[0]) / (high - low)) ** (1 / 3)))
    start.SetTranslation(((ends[0] + ends[1]) / 2 - (low + high) / 2).tolist())
    start.SetRotation(axis, float(np.radians(degrees)))
    return start


def _upright(moving: Masked, fixed: Masked) -> Any:
    """The similarity fixed -> moving, on a rough grid. Refuses a brain that fits better turned by a quarter or a half.

    A search finds back from some 60 degrees and no more, so the nine turns stand for all that a wrong header can be.
    """
    low, high = bounding_box(fixed.brain, fixed.brain_affine)
    images = _images(moving, fixed, low, high, ROUGH_MM, stripped=True)
    found, _, straight = _search(images, _similarity(moving, fixed), SIMILARITY_SCALES, kept=0.0)
    for (name, axis), degrees in itertools.product(AXES.items(), TURNS):
        try:
            _, _, turned = _search(
                images, _similarity(moving, fixed, axis, degrees), SIMILARITY_SCALES, kept=0.0
            )
        except Rejected:  # it leads nowhere
            continue
        if turned > TURNED * straight:
            reason = f"fits the template better turned by about {abs(degrees)} degrees about the {name} axis"
            raise Rejected("REGISTRATION_FAILED", f"{reason}: its header names wrong directions; correct it")
    return found


def _overlap(moving: Masked, fixed: Masked, matrix: Affine, spacing: float) -> tuple[float, float]:
    """Share of the smaller brain mask that lies in the other, and their Dice, with `moving` in the world of `fixed`."""
    low, high = bounding_box(fixed.brain, fixed.brain_affine)
    grid = box_grid(low - FIXED_MARGIN_MM, high + FIXED_MARGIN_MM, spacing)
    one = onto_grid(fixed.brain.astype(np.float32), fixed.brain_affine, grid) > 0.5
    other = onto_grid(moving.brain.astype(np.float32), matrix @ moving.brain_affine, grid) > 0.5
    both, size = int(np.count_nonzero(one & other)), int(one.sum())
    voxel = abs(float(np.linalg.det((matrix @ moving.brain_affine)[:3, :3])))
    whole = np.count_nonzero(moving.brain) * voxel / spacing**3  # also what lies beyond the grid
    return both / max(1.0, min(size, whole)), 2 * both / max(1.0, size + whole)


@dataclass(frozen=True)
class _Images:
    fixed: Any
    fixed_mask: Any
    moving: Any
    moving_mask: Any


def _images(
    moving: Masked, fixed: Masked, low: Affine, high: Affine, spacing: float, stripped: bool = False
) -> _Images:
    """Both scans on grids of one spacing around the fixed brain. The metric looks at the fixed brain and its edge."""
    near = box_grid(low - FIXED_MARGIN_MM, high + FIXED_MARGIN_MM, spacing)
    margin = MOVING_MARGIN_MM
    if stripped:  # its brain may lie anywhere
        ends = bounding_box(moving.brain, moving.brain_affine)
        far = box_grid(ends[0] - FIXED_MARGIN_MM, ends[1] + FIXED_MARGIN_MM, spacing)
    else:
        far = box_grid(low - margin, high + margin, spacing)
    values, seen, brain = _sampled(fixed, near, stripped)
    other, other_seen, _ = _sampled(moving, far, stripped)
    region = ndimage.binary_dilation(brain, iterations=max(1, round(10 / spacing))) & seen
    return _Images(
        _image(values, near),
        _image(region.astype(np.uint8), near),
        _image(other, far),
        _image(other_seen, far),
    )


def _sampled(scan: Masked, grid: Grid, stripped: bool) -> tuple[NDArray[np.float32], NDArray[np.uint8], Any]:
    values = onto_grid(scan.data, scan.affine, grid)
    brain = onto_grid(scan.brain.view(np.uint8), scan.brain_affine, grid, labels=True).astype(bool)
    seen = np.isfinite(values).astype(np.uint8)
    if stripped:  # outside the brain is darker than anything in it, whatever the scan's own zero
        low, high = np.percentile(values[brain & (seen > 0)], (0.5, 99.5)) if brain.any() else (0.0, 1.0)
        share = np.clip((np.nan_to_num(values) - low) / max(float(high - low), 1e-6), 0, 1)
        values, seen = np.where(brain, 0.25 + share, 0).astype(np.float32), np.ones_like(seen)
    return np.nan_to_num(values), seen, brain


def _image(array: NDArray[Any], grid: Grid) -> Any:
    """World coordinates stay RAS: ITK's are LPS, but only lengths and angles matter here, and those agree."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    step = grid.affine_xyz[:3, :3]
    spacing = np.linalg.norm(step, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(grid.affine[:3, 3].tolist())
    image.SetDirection((step / spacing).ravel().tolist())
    return image


def _search(
    images: _Images, start: Any, scales: list[float], kept: float = MIN_KEPT
) -> tuple[Any, float, float]:
    """The transform fixed -> moving that shares most information, and that information before and after.

    A search that ends worse than it began gives its start; with less than `kept` of it, it is refused.
    """
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentagePerLevel([1.0, 0.2], SEED)
    method.SetMetricFixedMask(images.fixed_mask)
    method.SetMetricMovingMask(images.moving_mask)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel([2, 1])
    spacing = images.fixed.GetSpacing()[0]
    method.SetSmoothingSigmasPerLevel([spacing, spacing / 2])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsPowell(20, stepLength=1.0, stepTolerance=0.01, valueTolerance=1e-6)
    method.SetOptimizerScales(scales)
    found = type(start)(start)
    method.SetInitialTransform(found, True)
    try:
        before = -_evaluate(images, start)
        method.Execute(images.fixed, images.moving)
        after = -_evaluate(images, found)
    except RuntimeError as error:  # all samples outside the moving scan, or nothing to see in it
        text = str(error).strip().splitlines()[-1]
        raise Rejected(
            "REGISTRATION_FAILED", f"cannot be compared with the session's reference: {text}"
        ) from None
    if not after > MIN_INFORMATION:
        raise Rejected("REGISTRATION_FAILED", f"shares {after:.3f} nats with the reference, as chance would")
    if after < kept * before:
        raise Rejected(
            "REGISTRATION_FAILED", f"the search ends worse ({after:.3f}) than the headers ({before:.3f})"
        )
    return (found, before, after) if after > before else (start, before, before)


def _evaluate(images: _Images, transform: Any) -> float:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricFixedMask(images.fixed_mask)
    method.SetMetricMovingMask(images.moving_mask)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(transform)
    return float(method.MetricEvaluate(images.fixed, images.moving))


def _matrix(transform: Any) -> Affine:
    turn = np.array(transform.GetMatrix()).reshape(3, 3)
    centre = np.array(transform.GetCenter())
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = centre + np.array(transform.GetTranslation()) - turn @ centre
    return matrix


def _inverse(matrix: Affine) -> Affine:
    inverse: Affine = np.linalg.inv(matrix).astype(np.float64)
    return inverse


def _measured(matrix: Affine, low: Affine, high: Affine, before: float, after: float) -> Aligned:
    matrix = np.round(matrix, 6)  # as it is recorded
    corners = np.array(np.meshgrid(*zip(low, high, strict=True), [1.0], indexing="ij")).reshape(4, -1)
    moved = np.linalg.norm(((matrix - np.eye(4)) @ corners)[:3], axis=0)
    centre = np.array([*(low + high) / 2, 1.0])
    turn = np.degrees(np.arccos(np.clip((np.trace(matrix[:3, :3]) - 1) / 2, -1, 1)))
    shift = float(np.linalg.norm(((matrix - np.eye(4)) @ centre)[:3]))
    return Aligned(matrix, shift, float(turn), float(moved.max()), before, after)
