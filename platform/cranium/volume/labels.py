"""Segmentation label maps: from the values of a collection to class numbers on the grid of the stacks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cranium.volume.masks import Affine, Masked, same_grid
from cranium.volume.nifti import Volume, to_ras
from cranium.volume.quality import Note, Rejected
from cranium.volume.slices import Grid, nearest, onto_grid

MAX_VALUE = 65535
MIN_IN_BRAIN = 0.9  # share of the labelled voxels, for a map on a grid of its own
MAX_CUT = 0.02  # share of the labelled volume that may lie beyond the stack unnoticed


@dataclass(frozen=True)
class LabelMap:
    """`classes` uint8 [Z, H, W]: 0 background, then the card's classes from 1; `ml` of each in the slices kept."""

    classes: NDArray[np.uint8]
    ml: tuple[float, ...]
    notes: tuple[Note, ...]


def place(
    found: Volume,
    values: Sequence[Sequence[int]],
    scans: Mapping[str, Masked],
    transforms: Mapping[str, Affine],
    grid: Grid,
    brain: NDArray[np.bool_],
    slices: range,
    rejected: Collection[str] = (),
) -> LabelMap:
    """A label map on the grid of its session's stacks, by the nearest voxel.

    `values`: the raw values of each class. `scans` as read, by channel, and their `transforms`: a map on the voxels of
    one of them moves with it. One on other voxels is taken where the session's reference lies, if its labels lie in
    the brain. `rejected`: the session's scans that are not used, whether they could be read or not. The notes are those
    of reading it and of placing it. Raises `Rejected`: MASK_VALUES, MASK_GRID.
    """
    data, affine = to_ras(numbered(found, values), found.affine)
    owner = _owner(data, affine, scans, transforms, rejected)
    moved = (transforms[owner] if owner else next(iter(transforms.values()))) @ affine
    placed: NDArray[np.uint8] = onto_grid(data, moved, grid, labels=True)
    notes = list(found.notes)
    if owner is None:
        back = nearest(brain.view(np.uint8).transpose(2, 1, 0), grid.affine_xyz, data.shape, moved)
        share = int(np.count_nonzero(back[data > 0])) / max(1, int(np.count_nonzero(data)))
        if share < MIN_IN_BRAIN:
            raise Rejected(
                "MASK_GRID",
                f"on the grid of no scan that is used, and {1 - share:.0%} of it is outside the brain",
            )
        notes.append(Note("LABELS_GRID", "on the grid of no scan that is used; placed by its header"))
    pixel = abs(float(np.linalg.det(grid.affine[:3, :3]))) / 1000
    kept = placed[slices.start : slices.stop : slices.step]
    ml = [
        round(float(np.count_nonzero(kept == c)) * pixel * slices.step, 3) for c in range(1, len(values) + 1)
    ]
    voxel = abs(float(np.linalg.det(moved[:3, :3]))) / 1000
    whole, cut = (count * voxel for count in _beyond(data, moved, grid, slices))
    if cut > MAX_CUT * whole + pixel:
        notes.append(Note("LABELS_CUT", f"{cut:.1f} of {whole:.1f} ml lie outside the slices kept"))
    return LabelMap(placed, tuple(ml), tuple(notes))


def _beyond(data: NDArray[np.uint8], moved: Affine, grid: Grid, slices: range) -> tuple[int, int]:
    """Labelled voxels, and those of them that lie nearest to no pixel of the slices kept.

    Counted on the map's own voxels: what a coarse grid samples of a small label is more or less than there is.
    """
    voxels = np.argwhere(data)
    to_grid = np.linalg.inv(grid.affine) @ moved
    at = np.rint(voxels @ to_grid[:3, :3].T + to_grid[:3, 3])  # row, column, slice
    _, rows, columns = grid.shape
    low, high = (0, 0, slices.start), (rows, columns, slices.stop)
    return len(voxels), int(np.count_nonzero(((at < low) | (at >= high)).any(1)))


def _owner(
    data: NDArray[np.uint8],
    affine: Affine,
    scans: Mapping[str, Masked],
    transforms: Mapping[str, Affine],
    rejected: Collection[str],
) -> str | None:
    """The scan on whose voxels a map lies, of those that are used."""
    on = [c for c in scans if same_grid(data.shape, affine, scans[c].data.shape, scans[c].affine)]
    if used := [c for c in on if c in transforms]:
        return used[0]
    if on:
        raise Rejected("MASK_GRID", f"drawn on the {on[0]}, which was rejected; mend that scan first")
    if twin := next((c for c in transforms if scans[c].data.shape == data.shape), None):
        reason = f"has as many voxels as {twin} but lies elsewhere; correct its header"
        if rejected:
            reason += f", unless it was drawn on the {' or '.join(rejected)}, which was rejected"
        raise Rejected("MASK_GRID", reason)
    return None


def numbered(found: Volume, values: Sequence[Sequence[int]]) -> NDArray[np.uint8]:
    """Raw values -> class numbers. Values may be stored as floats, but must be whole and in the card."""
    if any(note.code == "NONFINITE_FILLED" for note in found.notes):
        raise Rejected("MASK_VALUES", "holds NaN or infinity; write it again as integers")
    data = found.data
    odd = data[(data != np.rint(data)) | (data < 0) | (data > MAX_VALUE)]
    if odd.size:
        raise Rejected(
            "MASK_VALUES", f"{odd.size} voxels are no label, e.g. {float(odd[0]):g}; write whole numbers"
        )
    raw = data.astype(np.uint16)
    table = np.zeros(MAX_VALUE + 1, np.uint8)
    for index, own in enumerate(values, 1):
        table[[value for value in own if 0 <= value <= MAX_VALUE]] = index
    known = {0, *(value for own in values for value in own)}
    present = np.flatnonzero(np.bincount(raw.ravel(order="K"))).tolist()
    if unknown := [value for value in present if value not in known]:
        some = ", ".join(map(str, unknown[:8]))
        raise Rejected(
            "MASK_VALUES", f"values {some} are no class; name them under `segmentation` in the card"
        )
    return table[raw]
