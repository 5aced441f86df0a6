"""Between a session's slices and its scan's own voxels: stacks and labels out of shards, label maps into NIfTI."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from cranium import shardset, store
from cranium.config import UserError
from cranium.store import Artefact
from cranium.volume import labels, nifti, shard, slices
from cranium.volume.masks import same_grid
from cranium.volume.quality import Rejected
from cranium.volume.slices import Affine, Grid

MAX_CHANGED = 1e-3  # of the labelled pixels: a voxel half-way between two pixels may fall to either
Row = Mapping[str, Any]  # of sessions.parquet


@dataclass(frozen=True)
class Stacks:
    """A session's rows in the order of its slices: `pixels` [n, C, S, H, W], `labels` [n, H, W] of their middles."""

    pixels: NDArray[Any]
    labels: NDArray[np.uint8]  # class numbers of the card; zero without a label map


@dataclass(frozen=True)
class Place:
    """Where a session's slices lie, and the voxels of its scan: `transform` takes the scan's world to the session's."""

    grid: Grid  # of the slices kept
    channel: str
    shape: tuple[int, int, int]
    affine: Affine
    transform: Affine

    def to_native(self, probabilities: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Class numbers [I, J, K] from probabilities [K, n, H, W] of the slices kept."""
        return slices.most_probable(probabilities, self.grid, self.shape, self.affine, self.transform)


@dataclass(frozen=True)
class Truth:
    """A session's label file as class numbers of its card [I, J, K], the voxels it is drawn on, its SHA-256."""

    classes: NDArray[np.uint8]
    place: Place
    sha256: str


def read_stacks(shard_set: Artefact, manifest: Mapping[str, Any], subject: str, session: str) -> Stacks:
    """Every row of a session, checked. Raises `ShardError`, and KeyError when the set has no such session."""
    pixels, drawn = [], []
    for file, entry in zip(shardset.files(shard_set, dict(manifest)), manifest["shards"], strict=True):
        for index, group in enumerate(entry["row_groups"]):
            if (group["subject"], group["session"]) != (subject, session):
                continue
            table = shard.read_row_group(file, index)
            shard.check_rows(table, f"{file}, row group {index}")
            stacks, masks = shard.pixels(table), shard.masks(table)
            pixels.append(stacks)
            n, _, s, h, w = stacks.shape
            drawn.append(np.zeros((n, h, w), np.uint8) if masks is None else masks[:, s // 2])
    if not pixels:
        raise KeyError((subject, session))
    return Stacks(np.concatenate(pixels), np.concatenate(drawn))


def place(row: Row, channel: str | None = None) -> Place:
    """The geometry of a session, to the voxels of `channel`'s scan; None: of its first scan, the reference."""
    transforms = {c: np.array(matrix) for c, matrix in json.loads(row["transforms"]).items()}
    channel = channel or next(iter(transforms))
    crop = json.loads(row["crop"])
    grid = slices.kept_grid(
        Grid(tuple(crop["shape"]), np.array(json.loads(row["stack_affine"]))), range(*crop["slices"])
    )
    shape = tuple(json.loads(row["native_shape"])[channel])
    affine = np.array(json.loads(row["native_affine"])[channel])
    return Place(grid, channel, shape, affine, transforms[channel])


def read_truth(
    path: Path, root: Path, row: Row, values: Sequence[Sequence[int]], stacks: Stacks, orientation: Any
) -> Truth:
    """The label file of a session, whose classes have the raw `values`.

    It must still be what the labels in the shards were made from: on their grid it gives the same pixels. Raises
    `UserError(LABELS)`.
    """
    try:
        found = nifti.read(path, root=root, orientation=orientation, labels=True)
        classes = labels.numbered(found, values)
    except Rejected as reason:
        raise UserError("LABELS", f"{path} cannot be scored against: {reason}") from None
    owner = _owner(found, row)
    at = place(row, owner)
    ras, affine = nifti.to_ras(classes, found.affine)
    again = slices.onto_grid(ras, at.transform @ affine, _whole(row), labels=True)
    run = json.loads(row["crop"])["slices"]
    changed = np.count_nonzero(again[run[0] : run[1] : run[2]] != stacks.labels)
    if changed > MAX_CHANGED * np.count_nonzero(stacks.labels):
        raise UserError("LABELS", f"{path} is not what was ingested; run `cranium ingest` again")
    own = Place(at.grid, at.channel, classes.shape, found.affine, at.transform)
    return Truth(classes, own, found.sha256)


def _whole(row: Row) -> Grid:
    return Grid(tuple(json.loads(row["crop"])["shape"]), np.array(json.loads(row["stack_affine"])))


def _owner(found: nifti.Volume, row: Row) -> str | None:
    """The scan on whose voxels a label map lies, as ingest chose it (`labels.place`)."""
    shapes, affines = json.loads(row["native_shape"]), json.loads(row["native_affine"])
    mine = nifti.to_ras(_blank(found.data.shape), found.affine)
    for channel in json.loads(row["transforms"]):
        scan = nifti.to_ras(_blank(shapes[channel]), np.array(affines[channel]))
        if same_grid(mine[0].shape, mine[1], scan[0].shape, scan[1]):
            return str(channel)
    return None


def _blank(shape: Sequence[int]) -> NDArray[np.uint8]:
    return np.broadcast_to(np.uint8(0), tuple(shape))


def write(path: Path, classes: NDArray[np.uint8], affine: Affine, words: str) -> None:
    """A label map [I, J, K] as `.nii.gz`, `affine` in both of its headers; `words` (80 bytes at most) in `descrip`."""
    image = nib.Nifti1Image(np.ascontiguousarray(classes), affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = words.encode()[:79]
    # No time of day in it: the same bytes every time.
    store.write_atomic(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
