"""The chain of ways to a brain mask, and what is said of each mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import phantoms
from cranium.volume import masks, normalise
from cranium.volume.masks import Segment
from cranium.volume.nifti import Volume
from cranium.volume.quality import Rejected

SHAPE = (44, 52, 40)
GRID = phantoms.affine((4, 4, 4), SHAPE)
LABELS = phantoms.tissues(phantoms.Head(), SHAPE, GRID)
CHANNELS = ("T2w", "T1w", "FLAIR")


def volume(data: np.ndarray) -> Volume:
    return Volume(data.astype(np.float32), GRID, (), "")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for contrast in CHANNELS:
        phantoms.write(tmp_path / f"{contrast}.nii.gz", phantoms.intensities(LABELS, contrast, 1), GRID)
    phantoms.write(tmp_path / "mask.nii.gz", (LABELS >= 2).astype(np.uint8), GRID)
    (tmp_path / "broken.nii.gz").write_bytes(b"<html>")
    return tmp_path


def read(
    tree: Path, ways: Mapping[str, Segment | None], paths: Mapping[str, str] = {}
) -> tuple[dict[str, masks.Masked], dict[str, Rejected]]:
    wanted = {c: normalise.Wanted(f"{c}.nii.gz", paths.get(c)) for c in CHANNELS}
    volumes, scans, rejected = normalise.read_scans(tree, wanted, ways)
    assert list(volumes) == list(scans)
    return scans, rejected


def codes(scan: masks.Masked) -> list[str]:
    return [note.code for note in scan.notes]


def test_supplied_masks_come_first_and_are_shared(tree: Path) -> None:
    scans, rejected = read(tree, {"supplied": None, "otsu": None}, {"FLAIR": "mask.nii.gz"})
    assert not rejected and {scan.source for scan in scans.values()} == {"supplied"}
    assert codes(scans["FLAIR"]) == [] and codes(scans["T1w"]) == ["MASK_SHARED"]


def test_the_next_way_serves_where_one_gives_nothing(tree: Path) -> None:
    scans, rejected = read(tree, {"supplied": None, "otsu": None})
    assert not rejected
    assert all(scan.source == "otsu" and codes(scan) == ["MASK_FALLBACK"] for scan in scans.values())
    scans, rejected = read(tree, {"supplied": None, "otsu": None}, {"T1w": "broken.nii.gz"})
    assert not rejected and scans["T1w"].source == "otsu"
    assert codes(scans["T1w"]) == ["MASK_UNUSED", "MASK_FALLBACK"]
    assert "its brain mask <broken.nii.gz>" in scans["T1w"].notes[0].reason
    _, rejected = read(tree, {"supplied": None}, {"T1w": "broken.nii.gz"})
    assert {reason.code for reason in rejected.values()} == {"NOT_NIFTI"}
    _, rejected = read(tree, {"supplied": None})
    assert {reason.code for reason in rejected.values()} == {"MASK_MISSING"}


def test_a_network_sees_the_t1_once_and_its_mask_serves_all(tree: Path) -> None:
    seen: list[float] = []

    def network(data: np.ndarray, affine: np.ndarray) -> np.ndarray:
        np.testing.assert_allclose(affine, GRID)
        seen.append(float(data.sum()))
        return LABELS >= 2

    scans, rejected = read(tree, {"supplied": None, "deepbet": network, "otsu": None})
    t1w = phantoms.intensities(LABELS, "T1w", 1)
    assert not rejected and seen == [pytest.approx(float(t1w.sum()))]
    assert {scan.source for scan in scans.values()} == {"deepbet"}
    assert codes(scans["T1w"]) == ["MASK_MODEL"] and codes(scans["T2w"]) == ["MASK_SHARED"]
    assert "T1w" in scans["T2w"].notes[0].reason


def test_a_network_that_finds_no_brain_hands_on(tree: Path) -> None:
    calls = []

    def blind(data: np.ndarray, affine: np.ndarray) -> np.ndarray:
        calls.append(1)
        raise ValueError("no brain found")

    scans, _ = read(tree, {"deepbet": blind, "otsu": None})
    assert {scan.source for scan in scans.values()} == {"otsu"} and len(calls) == 1
    _, rejected = read(tree, {"deepbet": blind})
    assert {reason.code for reason in rejected.values()} == {"EMPTY_BRAIN"}
    assert "no brain found" in rejected["T1w"].reason


def test_a_shared_mask_moves_with_the_contrast_it_was_made_on(tree: Path) -> None:
    """T1w lies 12 mm off; its mask, which serves the T2w too, must end where the T2w's brain is."""
    move = np.eye(4)
    move[0, 3] = 12
    at = {c: move @ GRID if c == "T1w" else GRID for c in ("T2w", "T1w")}
    scans = {
        c: masks.Masked(
            phantoms.intensities(LABELS, c, 1).astype(np.float32),
            at[c],
            LABELS >= 2,
            at["T1w"],
            (),
            "deepbet",
        )
        for c in at
    }
    done = normalise.conform(
        scans,
        ("T2w", "T1w"),
        size=56,
        spacing_mm=4.0,
        slice_spacing_mm=4.0,
        percentiles=(0.5, 99.5),
        min_brain=0.05,
        align="grids_differ",
    )
    np.testing.assert_allclose(done.transforms["T2w"], np.eye(4))
    assert done.transforms["T1w"][0, 3] == pytest.approx(-12, abs=1)
    brain = phantoms.tissues(phantoms.Head(), done.grid.shape, done.grid.affine[:, [2, 0, 1, 3]]) >= 2
    overlap = 2 * np.count_nonzero(done.brain & brain) / (done.brain.sum() + brain.sum())
    assert overlap > 0.95  # 0.87 when the mask stays behind


def test_quality_in_closed_form() -> None:
    brain = np.zeros(SHAPE, bool)
    brain[10:30, 10:40, 0:25] = True  # 20 x 30 x 25 voxels of 4 mm, 20 x 30 of them on the lower edge
    scan = masks.Masked(np.zeros(SHAPE, np.float32), GRID, brain, GRID)
    found, notes = masks.quality(scan, 0.85)
    assert found == {
        "source": "supplied",
        "ml": 20 * 30 * 25 * 0.064,
        "border_cm2": 20 * 30 * 0.16,
        "dice": 0.85,
    }
    assert [note.code for note in notes] == ["MASK_ODD"]
    assert "96 cm2" in notes[0].reason and "Dice 0.85" in notes[0].reason and " ml" not in notes[0].reason
    fine = masks.Masked(np.zeros(SHAPE, np.float32), GRID, LABELS >= 2, GRID)
    found, notes = masks.quality(fine, None)
    assert found["ml"] == pytest.approx(4 / 3 * np.pi * np.prod(phantoms.RADII_MM) / 1000, rel=0.02)
    assert notes == () and found["border_cm2"] == 0
    tiny = masks.Masked(np.zeros(SHAPE, np.float32), GRID, LABELS == 2, GRID)
    assert [note.code for note in masks.quality(tiny, None)[1]] == ["MASK_ODD"]


def test_a_mask_that_disagrees_with_the_reference_is_noted() -> None:
    def scan(contrast: str, brain: np.ndarray) -> masks.Masked:
        return masks.masked(volume(phantoms.intensities(LABELS, contrast, 1)), volume(brain))

    scans = {
        "T1w": scan("T1w", LABELS >= 2),
        "T2w": scan("T2w", LABELS >= 1),
        "FLAIR": scan("FLAIR", LABELS >= 2),
    }
    done = normalise.conform(
        scans,
        ("T1w", "T2w", "FLAIR"),
        size=56,
        spacing_mm=4.0,
        slice_spacing_mm=4.0,
        percentiles=(0.5, 99.5),
        min_brain=0.05,
    )
    assert [note.code for note in done.notes["T2w"]] == ["MASK_ODD"] and done.quality["T2w"]["dice"] < 0.9
    assert done.quality["FLAIR"]["dice"] is None and done.notes["FLAIR"] == ()  # the same mask as the T1w's
