"""One session's scans -> volumes on one grid: reading, alignment, resampling, intensities.

Outside the brain every pixel is 0 (`levels.py`), so nothing is resampled beyond the box of the grid that holds it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cranium.volume import bias, dicom, masks, register
from cranium.volume.levels import to_levels
from cranium.volume.masks import Affine, Masked, Segment, masked, otsu_mask, same_grid
from cranium.volume.nifti import Orientation, Phi, Volume, read
from cranium.volume.quality import Note, Rejected
from cranium.volume.slices import BRAIN, Box, Grid, Kept, bounding_box, box, kept, onto_grid, session_grid

__all__ = ["Conformed", "Masked", "Wanted", "conform", "masked", "otsu_mask", "read_scans"]

MAX_APART_MM = 50.0  # between the centres of two contrasts of a session
COVER = (0.5, 0.98)  # share of the brain a scan must cover; and below which it is noted

MOVED_MM = 10.0  # of a corner of the brain: a motion that is noted

Align = Literal["none", "grids_differ", "always"]


@dataclass(frozen=True)
class Wanted:
    """One scan to read: paths below the raw folder, and what its choice left out."""

    path: str
    mask: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Conformed:
    """One session on its grid: `volumes` [C, Z, H, W] (absent channels zero), `brain` [Z, H, W].

    `transforms`: of each accepted contrast, its world -> the session's (RAS mm), already used here.
    """

    volumes: NDArray[Any]
    brain: NDArray[np.bool_]
    grid: Grid
    slices: range  # that are kept
    notes: Mapping[str, tuple[Note, ...]]  # of each accepted contrast
    rejected: Mapping[str, Rejected]
    transforms: Mapping[str, Affine]
    quality: Mapping[str, Mapping[str, Any]]  # of each accepted contrast's mask


# ---- reading --------------------------------------------------------------------------------------------------------


def read_scans(
    root: Path,
    wanted: Mapping[str, Wanted],
    ways: Mapping[str, Segment | None],
    orientation: Orientation = "agree",
    phi: Phi = "note",
) -> tuple[dict[str, Volume], dict[str, Masked], dict[str, Rejected]]:
    """Read the scans of a session and their masks: by channel as stored, with their masks, and what was rejected.

    `ways` to a mask are tried in order (`masks.Chain`). A scan without a supplied mask of its own takes that of another
    contrast of the session, and says so. `phi` holds for scans and masks.
    """
    once = functools.cache(
        lambda path: _read(root, path, orientation, phi)
    )  # one mask may serve several scans
    volumes: dict[str, Volume] = {}
    scans: dict[str, Masked] = {}
    rejected: dict[str, Rejected] = {}
    for channel, scan in wanted.items():
        try:
            volumes[channel] = once(scan.path)
        except Rejected as reason:
            rejected[channel] = reason
    paths = {channel: scan.mask for channel, scan in wanted.items() if scan.mask}
    chain = masks.Chain(ways, volumes, paths, once)
    for channel in list(volumes):
        try:
            note = wanted[channel].note
            scans[channel] = chain.join(channel, (Note("RUN_CHOSEN", note),) if note else ())
        except Rejected as reason:
            rejected[channel] = reason
    return {channel: volumes[channel] for channel in scans}, scans, rejected


def _read(root: Path, path: str, orientation: Orientation, phi: Phi) -> Volume:
    if dicom.is_series(root / path):
        return dicom.convert(root / path, root)
    return read(root / path, root=root, orientation=orientation, phi=phi)


# ---- one grid -------------------------------------------------------------------------------------------------------


def conform(
    scans: Mapping[str, Masked],
    channels: tuple[str, ...],
    *,
    size: int,
    spacing_mm: float,
    slice_spacing_mm: float,
    percentiles: tuple[float, float],
    min_brain: float,
    slices: Kept = BRAIN,
    align: Align = "none",
    template: Masked | None = None,
    bias_correction: Literal["none", "n4"] = "none",
    dtype: DTypeLike = np.uint8,
) -> Conformed:
    """Bring the scans of a session (by channel) onto one grid, that of the first channel present or of a template.

    Scans of one session share the scanner's world space; `align` says when they are registered all the same. One that
    lies elsewhere, cannot be aligned or cannot be scaled is rejected alone. Raises `Rejected`: EMPTY_BRAIN when no
    slice holds enough brain, or the reason of the first scan when none is left.
    """
    present = [channel for channel in channels if channel in scans]
    if not present:
        raise ValueError(f"none of the channels {channels} is among the scans {list(scans)}")
    transforms, moves, rejected = _transforms(scans, present, align, template, spacing_mm, slice_spacing_mm)
    placed = {channel: _moved(scans, channel, transforms) for channel in transforms}
    if not placed:
        raise next(iter(rejected.values()))
    reference = placed[next(iter(placed))]
    frame = template or reference
    grid = session_grid(frame.brain, frame.brain_affine, size, spacing_mm, slice_spacing_mm)
    volumes = np.zeros((len(channels), *grid.shape), dtype)
    brain = np.zeros(grid.shape, bool)
    notes: dict[str, tuple[Note, ...]] = {}
    quality: dict[str, Mapping[str, Any]] = {}
    first: NDArray[np.bool_] | None = None
    gridded = _masks(placed, grid)
    part = box(np.logical_or.reduce([mask for mask, _ in gridded.values()]))
    for channel, scan in placed.items():
        try:
            if bias_correction == "n4":
                scan = replace(scan, data=bias.n4(scan))
            values, inside, found = _place(scan, *gridded[channel], grid, part)
            volumes[channels.index(channel)][part] = to_levels(values, inside, percentiles, dtype)
        except Rejected as reason:
            rejected[channel] = reason
            continue
        alike = first is None or _same_mask(scan, reference)
        dice = None if first is None or alike else _dice(inside, first & np.isfinite(values))
        first = inside if first is None else first
        brain[part] |= inside
        quality[channel], odd = masks.quality(scans[channel], dice)
        notes[channel] = scan.notes + moves.get(channel, ()) + found + odd
    if not notes:
        raise next(iter(rejected.values()))
    run = kept(brain, min_brain, slices)
    if not run:
        raise Rejected(
            "EMPTY_BRAIN", f"no slice is brain to {min_brain:.0%} or more; lower `min_brain` or `size`"
        )
    used = {channel: transforms[channel] for channel in notes}
    return Conformed(volumes, brain, grid, run, notes, rejected, used, quality)


def _transforms(
    scans: Mapping[str, Masked],
    present: list[str],
    align: Align,
    template: Masked | None,
    spacing_mm: float,
    slice_spacing_mm: float,
) -> tuple[dict[str, Affine], dict[str, tuple[Note, ...]], dict[str, Rejected]]:
    """Of each contrast, its world -> the session's world; what is worth a note; and what could not be aligned."""
    reference = scans[present[0]]
    base = np.eye(4)
    moves: dict[str, tuple[Note, ...]] = {}
    if template is not None:  # a session that fits no template is lost as a whole
        fit = register.affine(reference, template)
        base = fit.matrix
        if fit.dice < masks.MIN_DICE:
            moves[present[0]] = (
                Note("TEMPLATE_ODD", f"Dice {fit.dice:.2f} of its mask with the template's"),
            )
    transforms: dict[str, Affine] = {present[0]: base}
    rejected: dict[str, Rejected] = {}
    for channel in present[1:]:
        scan = scans[channel]
        try:
            _not_apart(scan, reference)
            matrix = np.eye(4)
            if align == "always" or (align == "grids_differ" and not _same(scan, reference)):
                aligned = register.rigid(scan, reference, spacing_mm)
                # Less than half a pixel is not seen in the stacks, and no better than the headers.
                if aligned.largest_mm > min(spacing_mm, slice_spacing_mm) / 2:
                    matrix = aligned.matrix
                if aligned.largest_mm > MOVED_MM:
                    told = f"by {aligned.shift_mm:.1f} mm and {aligned.turn_degrees:.1f} degrees"
                    moves[channel] = (Note("MOVED", told),)
            transforms[channel] = np.round(base @ matrix, 6)
        except Rejected as reason:
            rejected[channel] = reason
    return transforms, moves, rejected


def _moved(scans: Mapping[str, Masked], channel: str, transforms: Mapping[str, Affine]) -> Masked:
    """A scan in the session's world. Its mask moves with the contrast on whose voxels it lies, or with the first."""
    scan, matrix = scans[channel], transforms[channel]
    order = [channel, *(other for other in transforms if other != channel)]
    owner = next(
        (
            other
            for other in order
            if same_grid(scan.brain.shape, scan.brain_affine, scans[other].data.shape, scans[other].affine)
        ),
        next(iter(transforms)),
    )
    return replace(scan, affine=matrix @ scan.affine, brain_affine=transforms[owner] @ scan.brain_affine)


def _same(scan: Masked, other: Masked) -> bool:
    return same_grid(scan.data.shape, scan.affine, other.data.shape, other.affine)


def _same_mask(scan: Masked, other: Masked) -> bool:
    grids = same_grid(scan.brain.shape, scan.brain_affine, other.brain.shape, other.brain_affine)
    return grids and (scan.brain is other.brain or np.array_equal(scan.brain, other.brain))


def _not_apart(scan: Masked, reference: Masked) -> None:
    apart = float(np.linalg.norm(_centre(scan) - _centre(reference)))
    if apart > MAX_APART_MM:
        raise Rejected(
            "MODALITY_GRID", f"its centre lies {apart:.0f} mm from that of the session's first contrast"
        )


def _masks(scans: Mapping[str, Masked], grid: Grid) -> dict[str, tuple[NDArray[np.bool_], float]]:
    """Of each contrast, its mask on the grid and how far the brain reaches beyond that (mm): one may serve several."""
    once: dict[tuple[int, bytes], tuple[NDArray[np.bool_], float]] = {}
    found = {}
    for channel, scan in scans.items():
        key = (id(scan.brain), scan.brain_affine.tobytes())
        if key not in once:
            voxels = scan.brain.view(np.uint8)
            mask = onto_grid(voxels, scan.brain_affine, grid, labels=True).astype(bool)
            once[key] = (mask, _cut(scan, grid))
        found[channel] = once[key]
    return found


def _place(
    scan: Masked, mask: NDArray[np.bool_], cut: float, grid: Grid, part: Box
) -> tuple[NDArray[np.float32], NDArray[np.bool_], tuple[Note, ...]]:
    """A scan and its mask on a part of the grid. Raises `Rejected(MODALITY_GRID)` where it covers too little of it."""
    values = onto_grid(scan.data, scan.affine, grid, part=part)
    inside = mask[part] & np.isfinite(values)
    cover = int(np.count_nonzero(inside)) / max(1, int(np.count_nonzero(mask)))
    if cover < COVER[0]:
        raise Rejected("MODALITY_GRID", f"covers {cover:.0%} of the brain mask only")
    notes = [Note("PARTIAL_COVER", f"covers {cover:.1%} of the brain mask")] if cover < COVER[1] else []
    if cut:
        notes.append(
            Note("CROPPED", f"brain reaches {cut:.0f} mm beyond the stack; a larger `size` keeps it")
        )
    return values, inside, tuple(notes)


def _dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2 * int(np.count_nonzero(a & b)) / max(1, int(np.count_nonzero(a)) + int(np.count_nonzero(b)))


def _centre(scan: Masked) -> NDArray[np.float64]:
    """World position (mm) of the middle of the field of view."""
    middle = (np.array(scan.data.shape) - 1) / 2
    return scan.affine[:3, :3] @ middle + scan.affine[:3, 3]


def _cut(scan: Masked, grid: Grid) -> float:
    """How many mm the brain reaches beyond the outer edge of the grid's pixels, in plane; 0 when inside."""
    low, high = bounding_box(scan.brain, scan.brain_affine)
    half = grid.affine[0, 1] / 2  # of a pixel
    ends = grid.affine @ np.array([[0, 0, 0, 1], [grid.shape[1] - 1, grid.shape[2] - 1, 0, 1]]).T
    least, most = ends[:2].min(axis=1) - half, ends[:2].max(axis=1) + half
    return float(max(0.0, (least - low[:2]).max(), (high[:2] - most).max()))
