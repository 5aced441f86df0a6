"""Motions that are known, because the phantoms were moved: found again, or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

import phantoms
from cranium.volume import masks, normalise, register
from cranium.volume.masks import Masked
from cranium.volume.quality import Rejected

HEAD = phantoms.Head(lesion=(-32.0, 10.0, 5.0))
MOTIONS = {  # degrees about x, y, z; mm
    "nod": ((3.0, -2.0, 4.0), (5.0, -3.0, 2.0)),
    "large": ((-6.0, 5.0, 8.0), (-8.0, 6.0, -7.0)),
}


def motion(degrees: tuple[float, ...], mm: tuple[float, ...]) -> np.ndarray:
    matrix = phantoms.affine((1, 1, 1), (1, 1, 1), degrees)
    matrix[:3, 3] = mm
    return matrix


def scan(
    contrast: str, move: np.ndarray | None = None, *, thick: bool = False, seed: int = 1, fine: int = 3
) -> Masked:
    """A head in its scanner; `move` says by how much it lay elsewhere. `thick`: tilted slabs on a grid of their own.

    `fine`: mm a voxel, in plane.
    """
    spacing, shape = (fine, fine, fine), (180 // fine, 210 // fine, 162 // fine)
    if thick:
        spacing, shape = (fine, fine, 2 * fine), (*shape[:2], 84 // fine)
    grid = phantoms.affine(spacing, shape, (6, -4, 3) if thick else (0, 0, 0))
    labels = phantoms.tissues(HEAD, shape, grid)
    data = phantoms.intensities(labels, contrast, seed).astype(np.float32)
    placed = grid if move is None else move @ grid
    return Masked(data, placed, labels >= 2, placed)


def error_mm(matrix: np.ndarray, move: np.ndarray) -> np.ndarray:
    """Target registration error at points all over the brain."""
    directions = np.random.default_rng(0).normal(size=(500, 3))
    points = directions / np.linalg.norm(directions, axis=1, keepdims=True) * phantoms.RADII_MM
    residue = matrix @ move - np.eye(4)
    return np.linalg.norm(points @ residue[:3, :3].T + residue[:3, 3], axis=1)


FIXED = scan("T1w")


@pytest.mark.parametrize(("contrast", "name"), [("T2w", "large"), ("FLAIR", "nod")])
def test_known_motions_are_found(contrast: str, name: str) -> None:
    """Mean error below a quarter of a voxel, worst below half, at 3 x 3 x 6 mm and a working grid of 4 mm."""
    move = motion(*MOTIONS[name])
    found = register.rigid(scan(contrast, move, thick=True, seed=2), FIXED, 4.0)
    errors = error_mm(found.matrix, move)
    print(f"{contrast} {name}: error {errors.mean():.2f} mm on average, {errors.max():.2f} at most")
    assert errors.mean() < 0.75 and errors.max() < 1.5
    assert found.after > found.before
    turned = np.degrees(np.arccos((np.trace(move[:3, :3]) - 1) / 2))
    assert found.turn_degrees == pytest.approx(turned, abs=0.6)


@pytest.mark.flow
@pytest.mark.parametrize("contrast", ["T2w", "FLAIR"])
@pytest.mark.parametrize("name", ["nod", "large"])
def test_known_motions_on_the_finest_grid(contrast: str, name: str) -> None:
    """At voxels of 2 x 2 x 4 mm and a working grid of 2 mm: mean error below a third of a voxel, worst below half."""
    move = motion(*MOTIONS[name])
    moving = scan(contrast, move, thick=True, seed=2, fine=2)
    errors = error_mm(register.rigid(moving, scan("T1w", fine=2)).matrix, move)
    print(f"{contrast} {name}: error {errors.mean():.2f} mm on average, {errors.max():.2f} at most")
    assert errors.mean() < 0.66 and errors.max() < 1.0


def test_a_head_that_did_not_move_stays_within_half_a_pixel() -> None:
    found = register.rigid(scan("FLAIR", thick=True, seed=2), FIXED, 4.0)
    assert found.largest_mm < 2.0  # so `conform` leaves it where its header says


def test_the_same_bytes_on_any_number_of_threads() -> None:
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    moving = scan("T2w", motion(*MOTIONS["nod"]), thick=True)
    try:
        found = []
        for threads in (1, 3):
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
            found.append(register.rigid(moving, FIXED, 6.0))
            assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == threads
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    assert len({f.matrix.tobytes() for f in found}) == 1 and len({f.after for f in found}) == 1


def failed(moving: Masked) -> str:
    with pytest.raises(Rejected) as error:
        register.rigid(moving, FIXED, 6.0)
    assert error.value.code == "REGISTRATION_FAILED"
    return error.value.reason


def test_what_is_no_head_is_refused() -> None:
    noise = np.random.default_rng(0).normal(100, 10, FIXED.data.shape).astype(np.float32)
    assert "nats" in failed(replace(FIXED, data=noise))


def test_a_motion_that_no_head_makes_is_refused() -> None:
    assert "40 degrees" in failed(scan("T1w", motion((0, 40, 0), (0, 0, 0))))
    failed(scan("T1w", motion((0, 0, 0), (36, 0, 0))))  # too far to be believed, or to be found


def test_scans_without_overlap_are_refused() -> None:
    assert "cannot be compared" in failed(scan("T2w", motion((0, 0, 0), (400, 0, 0))))


def test_a_search_that_goes_astray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worse than where it began by over 5 %: refused. A little worse: the headers stand."""
    values = iter([-0.8, -0.5, -0.8, -0.79])
    monkeypatch.setattr(register, "_evaluate", lambda images, transform: next(values))
    moving = scan("T2w", motion(*MOTIONS["nod"]))
    assert "worse" in failed(moving)
    np.testing.assert_array_equal(register.rigid(moving, FIXED, 6.0).matrix, np.eye(4))


@pytest.mark.flow
@pytest.mark.parametrize("contrast", ["FLAIR"])
def test_a_known_affine_is_found(contrast: str) -> None:
    """Scaled by 0.95 to 1.1, turned, and 26 mm away: mean error below a quarter of a voxel, worst below half."""
    move = phantoms.affine((1.1, 0.95, 1.05), (1, 1, 1), (6, -5, 4))
    move[:3, 3] = (8, -20, 15)
    errors = error_mm(register.affine(scan(contrast, move, seed=3), FIXED).matrix, move)
    print(f"{contrast}: error {errors.mean():.2f} mm on average, {errors.max():.2f} at most")
    assert errors.mean() < 0.75 and errors.max() < 1.5


@pytest.mark.flow
def test_a_scale_of_no_head_is_refused() -> None:
    move = np.diag([0.4, 0.4, 0.4, 1.0])
    with pytest.raises(Rejected, match="scaled"):
        register.affine(scan("T1w", move), FIXED, 6.0)


@pytest.mark.parametrize("degrees", [(180, 0, 0), (0, 0, 180), (90, 0, 0), (0, 0, -90)])
def test_a_header_that_names_wrong_directions_is_refused(degrees: tuple[float, ...]) -> None:
    """Upside down, back to front, face up and sideways: no search finds back, but the brain fits better turned."""
    with pytest.raises(Rejected, match=r"fits the template better turned by about .* its header") as error:
        register.affine(scan("T1w", motion(degrees, (0, 0, 0)), seed=3), FIXED, 6.0)
    assert error.value.code == "REGISTRATION_FAILED"


def test_a_nod_is_no_wrong_header() -> None:
    move = motion((30, 0, 10), (5, 0, -10))
    found = register.affine(scan("T1w", move, seed=3), FIXED, 6.0)
    assert error_mm(found.matrix, move).mean() < 3 and found.dice > 0.95


def test_masks_that_do_not_meet_after_the_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = register._search

    def astray(*arguments: Any, **more: Any) -> tuple[Any, float, float]:
        found, before, after = real(*arguments, **more)
        if isinstance(found, sitk.AffineTransform):
            found.Translate((0.0, 50.0, 0.0))
        return found, before, after

    monkeypatch.setattr(register, "_search", astray)
    with pytest.raises(Rejected, match="lies beside the other") as error:
        register.affine(scan("T1w", seed=3), FIXED, 6.0)
    assert error.value.code == "REGISTRATION_FAILED"


def test_a_mask_that_lacks_a_part_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit holds, and the session is used; that its mask is not the template's is told."""
    monkeypatch.setattr(register, "FINE_MM", 6.0)
    whole = scan("T1w", seed=3)
    brain = whole.brain.copy()
    brain[:, :, 34:] = False
    settings = {
        "size": 36,
        "spacing_mm": 6.0,
        "slice_spacing_mm": 6.0,
        "percentiles": (0.5, 99.5),
        "min_brain": 0.02,
    }
    for head, expected in ((whole, []), (replace(whole, brain=brain), ["TEMPLATE_ODD"])):
        done = normalise.conform({"T1w": head}, ("T1w",), template=FIXED, **settings)  # type: ignore[arg-type]
        assert [note.code for note in done.notes["T1w"] if note.code.startswith("TEMPLATE")] == expected


def test_same_grid_looks_at_every_corner() -> None:
    grid = phantoms.affine((1, 1, 1), (240, 240, 155))
    tilted = phantoms.affine((1, 1, 1), (240, 240, 155), (0.1, 0, 0))  # 0.2 mm at a corner
    noise = grid + np.random.default_rng(0).normal(0, 1e-5, (4, 4)) * np.array([[1], [1], [1], [0]])
    shape = (240, 240, 155)
    assert masks.same_grid(shape, grid, shape, noise)
    assert not masks.same_grid(shape, grid, shape, tilted)
    assert not masks.same_grid(shape, grid, (240, 240, 154), grid)
