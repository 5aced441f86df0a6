from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import phantoms
from cranium import restitch
from cranium.config import UserError
from cranium.volume import labels, nifti, slices

VALUES = ((4,), (7,))


def drawn(tmp_path: Path, axes: str, tilt: tuple[float, float, float] = (0, 0, 0)):  # type: ignore[no-untyped-def]
    """A label file stored along `axes` of a tilted, anisotropic scan, and its session as ingest records it."""
    shape, voxel = (48, 56, 36), phantoms.affine((3.0, 3.0, 4.0), (48, 56, 36), tilt)
    tissue = phantoms.tissues(phantoms.Head(lesion=(-32.0, 10.0, 5.0)), shape, voxel)
    raw = np.zeros(shape, np.int16)
    raw[tissue == 2], raw[tissue == 5] = 7, 4  # ventricles (the right one larger) and a lesion left
    stored, affine = phantoms.turned(raw, voxel, axes)
    path = phantoms.write(tmp_path / "label.nii.gz", stored, affine)
    grid = slices.session_grid(tissue > 1, voxel, 112, 2.0, 2.0)
    run = range(4, grid.shape[0] - 4)
    found = nifti.read(path, labels=True)
    ras, placed = nifti.to_ras(labels.numbered(found, VALUES), found.affine)
    on_grid = slices.onto_grid(ras, placed, grid, labels=True)
    row = {
        "native_shape": json.dumps({"T1w": stored.shape}),
        "native_affine": json.dumps({"T1w": affine.round(6).tolist()}),
        "stack_affine": json.dumps(grid.affine.round(6).tolist()),
        "crop": json.dumps({"shape": grid.shape, "slices": [run.start, run.stop, run.step]}),
        "transforms": json.dumps({"T1w": np.eye(4).tolist()}),
    }
    stacks = restitch.Stacks(np.zeros((len(run), 1, 1, 112, 112), np.uint8), on_grid[run.start : run.stop])
    return path, row, stacks, np.select([stored == 4, stored == 7], [1, 2], 0)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
def test_what_the_slices_hold_comes_back_to_the_files_own_voxels(tmp_path: Path, axes: str) -> None:
    """Slices -> native is the way in undone, whatever the storage order: sides, places and sizes stay."""
    path, row, stacks, expected = drawn(tmp_path, axes, (8.0, -5.0, 12.0))
    truth = restitch.read_truth(path, tmp_path, row, VALUES, stacks, "agree")
    assert truth.place.channel == "T1w" and np.array_equal(truth.classes, expected)
    one_hot = np.stack([stacks.labels == k for k in range(3)]).astype(np.float32)
    back = truth.place.to_native(one_hot)
    assert back.shape == expected.shape
    for k in (1, 2):
        overlap = 2 * ((back == k) & (expected == k)).sum() / ((back == k).sum() + (expected == k).sum())
        assert overlap > 0.93, (axes, k, overlap)  # mirrored or shifted by a slice it falls below 0.6
    restitch.write(tmp_path / "out.nii.gz", back, truth.place.affine, "words")
    ours, theirs = nib.load(tmp_path / "out.nii.gz"), nib.load(path)
    assert ours.shape == theirs.shape and ours.get_data_dtype() == np.uint8
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)
    assert np.array_equal(np.asarray(ours.dataobj), back)


def test_another_label_file_than_the_one_ingested_is_refused(tmp_path: Path) -> None:
    path, row, stacks, _ = drawn(tmp_path, "RAS")
    moved = restitch.Stacks(stacks.pixels, np.roll(stacks.labels, 3, axis=1))
    with pytest.raises(UserError, match="not what was ingested") as refused:
        restitch.read_truth(path, tmp_path, row, VALUES, moved, "agree")
    assert refused.value.code == "LABELS"
    with pytest.raises(UserError, match="values 7 are no class"):
        restitch.read_truth(path, tmp_path, row, ((4,),), stacks, "agree")
    with pytest.raises(UserError, match="cannot be read"):
        restitch.read_truth(tmp_path / "gone.nii.gz", tmp_path, row, VALUES, stacks, "agree")


def test_every_second_slice_kept_fills_the_gaps(tmp_path: Path) -> None:
    path, row, stacks, expected = drawn(tmp_path, "RAS")
    crop = json.loads(row["crop"])
    first, stop, _ = crop["slices"]
    thin = row | {"crop": json.dumps(crop | {"slices": [first, stop, 2]})}
    half = restitch.Stacks(stacks.pixels[::2], stacks.labels[::2])
    truth = restitch.read_truth(path, tmp_path, thin, VALUES, half, "agree")
    back = truth.place.to_native(np.stack([half.labels == k for k in range(3)]).astype(np.float32))
    overlap = 2 * ((back == 2) & (expected == 2)).sum() / ((back == 2).sum() + (expected == 2).sum())
    assert overlap > 0.9


def test_probabilities_are_compared_between_pixels() -> None:
    """At 3/4 of the way from a pixel of class 1 to one of class 0, background: p = 1/4; at 1/4 of it, class 1."""
    grid = slices.Grid((1, 2, 2), np.array([[0, 4.0, 0, 0], [-4.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]))
    probabilities = np.zeros((2, 1, 2, 2), np.float32)
    probabilities[1, 0, :, 0], probabilities[0, 0, :, 1] = 1, 1
    voxels = np.diag([1.0, 1.0, 1.0, 1.0])
    found = slices.most_probable(probabilities, grid, (5, 1, 1), voxels)
    assert found[:, 0, 0].tolist() == [1, 1, 0, 0, 0]  # half-way is a tie: the lower class
    outside = slices.most_probable(
        probabilities,
        grid,
        (3, 1, 1),
        voxels @ np.diag([1, 1, 1, 1.0])
        + np.array([[0, 0, 0, -20.0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
    )
    assert not outside.any()
