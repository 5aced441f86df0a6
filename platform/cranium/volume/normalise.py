"""One session's scans -> uint8 volumes on one grid: reading, masks, resampling, intensities.

Inside the brain mask intensities run from 1 to 255 between two percentiles of the volume; outside it every pixel is 0,
so 0 means "no brain" and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from cranium.volume import dicom
from cranium.volume.nifti import Volume, read, to_ras
from cranium.volume.quality import Note, Rejected
from cranium.volume.slices import Grid, bounding_box, kept, onto_grid, session_grid

MAX_APART_MM = 50.0  # between the centres of two contrasts of a session
MIN_MASK_VOXELS = 50
MAX_MASK_SHARE = 0.95  # of the field of view
COVER = (0.5, 0.98)  # share of the brain a scan must cover; and below which it is noted


@dataclass(frozen=True)
class Wanted:
    """One scan to read: paths below the raw folder, and what its choice left out."""

    path: str
    mask: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Masked:
    """A scan and its brain mask. `brain` is on the voxels of `brain_affine`; both are in RAS order."""

    data: NDArray[np.float32]
    affine: NDArray[np.float64]
    brain: NDArray[np.bool_]
    brain_affine: NDArray[np.float64]
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Conformed:
    """One session on its grid: `volumes` uint8 [C, Z, H, W] (absent channels zero), `brain` [Z, H, W]."""

    volumes: NDArray[np.uint8]
    brain: NDArray[np.bool_]
    grid: Grid
    slices: range  # that are kept
    notes: Mapping[str, tuple[Note, ...]]  # of each accepted contrast
    rejected: Mapping[str, Rejected]


def masked(scan: Volume, mask: Volume | None, notes: tuple[Note, ...] = ()) -> Masked:
    """Join a scan and its supplied mask (nonzero = brain); without one, `otsu_mask`. Raises `Rejected`."""
    data, affine = to_ras(scan.data, scan.affine)
    notes = scan.notes + notes
    if mask is None:
        brain, brain_affine = otsu_mask(data), affine
        notes += (Note("MASK_FALLBACK", "no supplied mask: Otsu's threshold, scalp included"),)
    else:
        labels, brain_affine = to_ras(mask.data, mask.affine)
        brain = labels > 0
    count = int(np.count_nonzero(brain))
    if count < MIN_MASK_VOXELS or count > MAX_MASK_SHARE * brain.size:
        raise Rejected("EMPTY_BRAIN", f"the brain mask sets {count} of {brain.size} voxels")
    return Masked(data, affine, brain, brain_affine, notes)


def read_scans(
    root: Path, wanted: Mapping[str, Wanted], supplied: bool
) -> tuple[dict[str, Volume], dict[str, Masked], dict[str, Rejected]]:
    """Read the scans of a session and their masks: by channel as stored, with their masks, and what was rejected.

    With `supplied` masks, a scan without its own takes that of another contrast of the session, and says so.
    """
    once = functools.cache(lambda path: _read(root, path))  # one mask may serve several scans
    spare = next((scan.mask for scan in wanted.values() if scan.mask), None)
    volumes: dict[str, Volume] = {}
    scans: dict[str, Masked] = {}
    rejected: dict[str, Rejected] = {}
    for channel, scan in wanted.items():
        try:
            volume, mask = once(scan.path), None
            notes = [Note("RUN_CHOSEN", scan.note)] if scan.note else []
            if supplied:
                if (path := scan.mask or spare) is None:
                    raise Rejected("MASK_MISSING", "no mask where the card says; or set ingest.mask=otsu")
                if path != scan.mask:
                    notes.append(Note("MASK_SHARED", path))
                mask = _read_mask(path, once)
            scans[channel] = masked(volume, mask, tuple(notes))
            volumes[channel] = volume
        except Rejected as reason:
            rejected[channel] = reason
    return volumes, scans, rejected


def _read(root: Path, path: str) -> Volume:
    if dicom.is_series(root / path):
        return dicom.convert(root / path, root)
    return read(root / path, root=root)


def _read_mask(path: str, once: Callable[[str], Volume]) -> Volume:
    try:
        return once(path)
    except Rejected as reason:
        raise Rejected(reason.code, f"its brain mask {path}: {reason.reason}") from reason


def otsu_mask(data: NDArray[np.float32]) -> NDArray[np.bool_]:
    """A classical fallback [I, J, K]: what is not background, its largest piece, holes filled.

    Where a quarter of the voxels hold one and the same background value the scan was stripped before, and the mask is
    what differs from it. Else Otsu's threshold (1979, IEEE Trans. SMC 9:62) after opening; it keeps the scalp.
    """
    background = float(data[0, 0, 0])
    if background == data.min() and np.count_nonzero(data == background) > data.size / 4:
        image = sitk.GetImageFromArray((data != background).astype(np.uint8))
    else:
        image = sitk.OtsuThreshold(sitk.GetImageFromArray(data), 0, 1)
        image = sitk.BinaryMorphologicalOpening(image, [1, 1, 1])
    pieces = sitk.RelabelComponent(sitk.ConnectedComponent(image), sortByObjectSize=True)
    whole = sitk.BinaryFillhole(pieces == 1)
    mask: NDArray[np.bool_] = sitk.GetArrayFromImage(whole).astype(bool)
    return mask


def to_uint8(
    values: NDArray[np.float32], brain: NDArray[np.bool_], percentiles: tuple[float, float]
) -> NDArray[np.uint8]:
    """1 + 254 x the share of the way between two percentiles inside `brain`, clipped; 0 outside. Any one shape.

    Raises `Rejected(EMPTY_BRAIN)` where the two percentiles are equal: there is nothing to see.
    """
    inside = values[brain]
    low, high = (float(p) for p in np.percentile(inside, percentiles)) if inside.size else (0.0, 0.0)
    if not high > low:
        raise Rejected("EMPTY_BRAIN", f"the brain is constant between the percentiles {percentiles}")
    share = np.clip((inside.astype(np.float64) - low) / (high - low), 0, 1)
    result = np.zeros(values.shape, np.uint8)
    result[brain] = np.rint(1 + 254 * share).astype(np.uint8)
    return result


def conform(
    scans: Mapping[str, Masked],
    channels: tuple[str, ...],
    *,
    size: int,
    spacing_mm: float,
    slice_spacing_mm: float,
    percentiles: tuple[float, float],
    min_brain: float,
) -> Conformed:
    """Bring the scans of a session (by channel) onto one grid, that of the first channel present.

    Scans of one session share the scanner's world space; one that lies elsewhere or cannot be scaled is rejected
    alone. Raises `Rejected(EMPTY_BRAIN)` when no slice holds enough brain, or nothing is left.
    """
    present = [channel for channel in channels if channel in scans]
    if not present:
        raise ValueError(f"none of the channels {channels} is among the scans {list(scans)}")
    reference = scans[present[0]]
    grid = session_grid(reference.brain, reference.brain_affine, size, spacing_mm, slice_spacing_mm)
    volumes = np.zeros((len(channels), *grid.shape), np.uint8)
    brain = np.zeros(grid.shape, bool)
    notes: dict[str, tuple[Note, ...]] = {}
    rejected: dict[str, Rejected] = {}
    for channel in present:
        try:
            volume, inside, found = _place(scans[channel], reference, grid, percentiles)
        except Rejected as reason:
            rejected[channel] = reason
            continue
        volumes[channels.index(channel)] = volume
        brain |= inside
        notes[channel] = scans[channel].notes + found
    if not notes:
        raise next(iter(rejected.values()))
    slices = kept(brain, min_brain)
    if not slices:
        raise Rejected(
            "EMPTY_BRAIN", f"no slice is brain to {min_brain:.0%} or more; lower `min_brain` or `size`"
        )
    return Conformed(volumes, brain, grid, slices, notes, rejected)


def _place(
    scan: Masked, reference: Masked, grid: Grid, percentiles: tuple[float, float]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], tuple[Note, ...]]:
    apart = float(np.linalg.norm(_centre(scan) - _centre(reference)))
    if apart > MAX_APART_MM:
        raise Rejected(
            "MODALITY_GRID", f"its centre lies {apart:.0f} mm from that of the session's first contrast"
        )
    inside = onto_grid(scan.brain.view(np.uint8), scan.brain_affine, grid, labels=True).astype(bool)
    values = onto_grid(scan.data, scan.affine, grid)
    seen = np.isfinite(values)
    cover = float((inside & seen).sum()) / max(1.0, float(inside.sum()))
    if cover < COVER[0]:
        raise Rejected("MODALITY_GRID", f"covers {cover:.0%} of the brain mask only")
    notes = [Note("PARTIAL_COVER", f"covers {cover:.1%} of the brain mask")] if cover < COVER[1] else []
    if cut := _cut(scan, grid):
        notes.append(
            Note("CROPPED", f"brain reaches {cut:.0f} mm beyond the stack; a larger `size` keeps it")
        )
    inside &= seen
    return to_uint8(values, inside, percentiles), inside, tuple(notes)


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
