"""Brain masks: which one a scan gets, a classical fallback, and how far a mask can be believed.

A chain of ways is tried in the declared order: the cohort's own mask, a model or a program given as a function, Otsu's
threshold. Every mask that was not supplied is noted as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from cranium.volume.nifti import Volume, to_ras
from cranium.volume.quality import Note, Rejected, named
from cranium.volume.slices import nearest

Affine = NDArray[np.float64]
# Scan [I, J, K] and affine -> mask; ValueError.
Segment = Callable[[NDArray[np.float32], Affine], NDArray[np.bool_]]

MIN_MASK_VOXELS = 50
MAX_MASK_SHARE = 0.95  # of the field of view
PLAUSIBLE_ML = (50.0, 2500.0)  # from a fetus of 20 weeks to the largest adult, with some scalp
MAX_BORDER_CM2 = 20.0  # of mask against the edge of the field of view; a cut brain stem has less
MIN_DICE = 0.9  # with the mask of the session's reference contrast
SAME_GRID_MM = 0.1


@dataclass(frozen=True)
class Masked:
    """A scan and its brain mask. `brain` is on the voxels of `brain_affine`; both are in RAS order."""

    data: NDArray[np.float32]
    affine: Affine
    brain: NDArray[np.bool_]
    brain_affine: Affine
    notes: tuple[Note, ...] = ()
    source: str = "supplied"  # how the mask was made

    def brain_here(self) -> NDArray[np.bool_]:
        """The mask on the scan's own voxels."""
        if same_grid(self.data.shape, self.affine, self.brain.shape, self.brain_affine):
            return self.brain
        mask: NDArray[np.bool_] = nearest(
            self.brain.view(np.uint8), self.brain_affine, self.data.shape, self.affine
        ).astype(bool)
        return mask


def same_grid(shape: tuple[int, ...], affine: Affine, other_shape: tuple[int, ...], other: Affine) -> bool:
    """Whether two grids have the same voxels at the same places in the world, to a tenth of a millimetre."""
    if tuple(shape) != tuple(other_shape):
        return False
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1.0], indexing="ij")).reshape(4, -1)
    return float(np.linalg.norm(((affine - other) @ corners)[:3], axis=0).max()) <= SAME_GRID_MM


def masked(
    scan: Volume, mask: Volume | None, notes: tuple[Note, ...] = (), source: str = "supplied"
) -> Masked:
    """Join a scan and a mask (nonzero = brain); without one, `otsu_mask`. Raises `Rejected(EMPTY_BRAIN)`."""
    return _joined(scan, None if mask is None else _brain(mask), notes, source)


def _brain(mask: Volume) -> tuple[NDArray[np.bool_], Affine]:
    brain: NDArray[np.bool_]
    brain, affine = to_ras(mask.data > 0, mask.affine)
    return brain, affine


def _joined(
    scan: Volume, mask: tuple[NDArray[np.bool_], Affine] | None, notes: tuple[Note, ...], source: str
) -> Masked:
    data, affine = to_ras(scan.data, scan.affine)
    notes = scan.notes + notes
    if mask is None:
        brain, brain_affine, source = otsu_mask(data), affine, "otsu"
        notes += (Note("MASK_FALLBACK", "no supplied mask: Otsu's threshold, scalp included"),)
    else:
        brain, brain_affine = mask
    count = int(np.count_nonzero(brain))
    if count < MIN_MASK_VOXELS or count > MAX_MASK_SHARE * brain.size:
        raise Rejected("EMPTY_BRAIN", f"the brain mask sets {count} of {brain.size} voxels")
    return Masked(data, affine, brain, brain_affine, notes, source)


@dataclass
class Chain:
    """The ways to a mask for the scans of one session, in order; `None` stands for what needs no function.

    `ways`: "supplied", "otsu", and any name with its function. `read` reads a supplied mask, `paths` names them by
    channel. A function is called once, on the session's T1 where there is one (the published networks were trained on
    T1), and its mask serves the other contrasts.
    """

    ways: Mapping[str, Segment | None]
    volumes: Mapping[str, Volume]
    paths: Mapping[str, str]
    read: Callable[[str], Volume]
    _made: dict[str, tuple[NDArray[np.bool_], Affine] | Rejected] = field(default_factory=dict)
    _told: dict[str, tuple[Note, ...]] = field(default_factory=dict)  # by reading a supplied mask

    def join(self, channel: str, notes: tuple[Note, ...]) -> Masked:
        """The scan of a channel with the first mask that can be had. Raises the first way's `Rejected`."""
        reasons: list[Rejected] = []
        for way, segment in self.ways.items():
            try:
                lost = tuple(Note("MASK_UNUSED", str(r)) for r in reasons if r.code != "MASK_MISSING")
                return self._try(way, segment, channel, notes + lost)
            except Rejected as reason:
                reasons.append(reason)
        raise reasons[0]

    def _try(self, way: str, segment: Segment | None, channel: str, notes: tuple[Note, ...]) -> Masked:
        volume = self.volumes[channel]
        if segment is not None:
            base = next((c for c in self.volumes if c.startswith("T1")), next(iter(self.volumes)))
            note = Note("MASK_MODEL" if base == channel else "MASK_SHARED", f"by {way}, from {base}")
            mask = self._once(way, lambda: _by(way, segment, self.volumes[base], base))
            return _joined(volume, mask, (*notes, note), way)
        if way == "otsu":
            return masked(volume, None, notes)
        path = self.paths.get(channel) or next(iter(self.paths.values()), None)
        if path is None:
            raise Rejected("MASK_MISSING", "no mask where the card says; or add to ingest.mask, e.g. otsu")
        if path != self.paths.get(channel):
            notes += (Note("MASK_SHARED", named(path)),)
        mask = self._once(path, lambda: self._supplied(path))
        told = tuple(replace(note, reason=f"its brain mask: {note.reason}") for note in self._told[path])
        return _joined(volume, mask, notes + told, "supplied")

    def _once(
        self, key: str, make: Callable[[], tuple[NDArray[np.bool_], Affine]]
    ) -> tuple[NDArray[np.bool_], Affine]:
        """A mask is read or made once, and is one array for all scans that it serves."""
        if key not in self._made:
            try:
                self._made[key] = make()
            except Rejected as reason:
                self._made[key] = reason
        made = self._made[key]
        if isinstance(made, Rejected):
            raise made
        return made

    def _supplied(self, path: str) -> tuple[NDArray[np.bool_], Affine]:
        try:
            found = self.read(path)
            self._told[path] = found.notes
            return _brain(found)
        except Rejected as reason:
            raise Rejected(reason.code, f"its brain mask {named(path)}: {reason.reason}") from reason


def _by(way: str, segment: Segment, scan: Volume, name: str) -> tuple[NDArray[np.bool_], Affine]:
    try:
        brain: NDArray[np.bool_]
        brain, affine = to_ras(segment(scan.data, scan.affine), scan.affine)
        return brain, affine
    except ValueError as error:
        raise Rejected("EMPTY_BRAIN", f"{way} found no brain in {name}: {error}") from error


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


def quality(scan: Masked, dice: float | None) -> tuple[dict[str, Any], tuple[Note, ...]]:
    """How believable the mask of a contrast is, as plain numbers, and a note where one is implausible.

    `ml`: its volume; `border_cm2`: how much of it lies against the edge of the field of view; `dice`: its overlap with
    the mask of the session's reference contrast, after alignment (None for the reference, and where one mask serves
    both).
    """
    edges = np.linalg.norm(scan.brain_affine[:3, :3], axis=0)
    volume = float(abs(np.linalg.det(scan.brain_affine[:3, :3])))
    ml = np.count_nonzero(scan.brain) * volume / 1000
    border = 0.0
    for axis in range(3):
        planes = np.moveaxis(scan.brain, axis, 0)
        ends = np.count_nonzero(planes[0]) + np.count_nonzero(planes[-1])
        border += ends * volume / edges[axis] / 100
    found = {
        "source": scan.source,
        "ml": round(ml, 1),
        "border_cm2": round(border, 1),
        "dice": None if dice is None else round(dice, 3),
    }
    odd = [f"{ml:.0f} ml"] if not PLAUSIBLE_ML[0] <= ml <= PLAUSIBLE_ML[1] else []
    odd += [f"{border:.0f} cm2 on the edge of the field of view"] if border > MAX_BORDER_CM2 else []
    odd += [f"Dice {dice:.2f} with the reference's mask"] if dice is not None and dice < MIN_DICE else []
    return found, (Note("MASK_ODD", ", ".join(odd)),) if odd else ()
