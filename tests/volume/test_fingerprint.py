"""Fingerprints: the same head after other processing, other heads, and the arithmetic of comparing."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import phantoms
from cranium.volume import fingerprint, normalise

RADII = np.array([62.0, 80.0, 55.0])
HEADS = 10


def field(seed: int) -> np.ndarray:
    """What is a head's own: a random field on knots 13 mm apart."""
    return np.random.default_rng(seed).normal(size=(18, 18, 18))


def head(
    seed: int,
    *,
    spacing: float = 4.0,
    slice_mm: float = 4.0,
    turn: tuple[float, float, float] = (0, 0, 0),
    shift: tuple[float, float, float] = (0, 0, 0),
    radius: float = 1.0,
    flip: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A conformed head [Z, H, W], its brain and affine: anatomy that all share, and half as much of its own."""
    shape = (round(150 / slice_mm), round(192 / spacing), round(192 / spacing))
    grid = np.zeros((4, 4))
    grid[1, 0], grid[0, 1], grid[2, 2] = -spacing, spacing, slice_mm
    grid[:, 3] = [-96 + spacing / 2, 96 - spacing / 2, -75 + slice_mm / 2, 1]
    index = np.indices(shape)[[1, 2, 0]].reshape(3, -1)
    world = grid[:3, :3] @ index + grid[:3, 3:]
    rotation = phantoms.affine((1, 1, 1), (1, 1, 1), turn)[:3, :3]
    own = rotation.T @ (world - np.array(shift)[:, None])
    own[0] *= -1 if flip else 1
    brain = (((own / (RADII[:, None] * radius)) ** 2).sum(axis=0) <= 1).reshape(shape)
    knots = own / 13 + 8.5
    common, mine = (ndimage.map_coordinates(field(s), knots, order=2).reshape(shape) for s in (0, seed))
    values = 120 + 30 * common + 20 * mine
    return np.where(brain, np.clip(values, 1, 255), 0), brain, grid


def printed(values: np.ndarray, brain: np.ndarray, grid: np.ndarray) -> bytes:
    return fingerprint.fingerprint(np.rint(values).astype(np.uint8)[None], brain, grid)


@pytest.fixture(scope="module")
def cohort() -> list[bytes]:
    return [printed(*head(seed)) for seed in range(1, HEADS + 1)]


def other_processing(seed: int) -> dict[str, bytes]:
    values, brain, grid = head(seed)
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in values.shape), indexing="ij")
    eroded = ndimage.binary_erosion(brain)
    flipped = head(seed, flip=True)
    return {
        "spacing": printed(*head(seed, spacing=2.5, slice_mm=5.0)),
        "gamma": printed(np.clip(255 * (values / 255) ** 0.7, brain, 255), brain, grid),
        "shading": printed(np.clip(values * (1 + 0.25 * x - 0.2 * y * z), brain, 255), brain, grid),
        "noise": printed(np.clip(values + rng.normal(0, 12, values.shape), 1, 255) * brain, brain, grid),
        "few grey values": printed(np.where(brain, values // 16 * 16 + 8, 0), brain, grid),
        "smaller mask": printed(values * eroded, eroded, grid),
        "cut below": printed(values * (z > -0.63), brain & (z > -0.63), grid),
        "turned and moved": printed(*head(seed, turn=(6, -4, 5), shift=(4, -6, 3))),
        "mirrored": printed(*flipped),
        "16 bit": fingerprint.fingerprint(np.rint(values * 256).astype(np.uint16)[None], brain, grid),
    }


@pytest.mark.parametrize("seed", [1, 5])
def test_a_head_is_found_again_after_other_processing_and_no_other_head_is(
    cohort: list[bytes], seed: int
) -> None:
    people = [f"person {n}" for n in range(HEADS + 1)]
    for what, made in other_processing(seed).items():
        found = fingerprint.matches([*cohort, made], people, range(HEADS))
        assert [(match.first, match.second) for match in found] == [(seed - 1, HEADS)], what


def test_different_heads_do_not_match_and_one_person_is_no_duplicate(cohort: list[bytes]) -> None:
    people = [str(n) for n in range(HEADS)]
    assert fingerprint.matches(cohort, people, range(HEADS)) == []
    twice = [*cohort, cohort[3]]
    assert fingerprint.matches(twice, [*people, "3"], range(HEADS)) == []  # two sessions of one person
    assert fingerprint.matches(twice, [*people, "x"], [0, 1]) == []  # neither of the two is asked about
    assert fingerprint.matches(twice, [*people, "x"], []) == []
    (match,) = fingerprint.matches(twice, [*people, "x"], [3])
    assert (match.first, match.second, match.similarity) == (3, HEADS, 1.0)


def test_two_small_cohorts_are_compared_without_knowing_what_heads_share(cohort: list[bytes]) -> None:
    few = [cohort[0], cohort[1], cohort[0]]
    (match,) = fingerprint.matches(few, ["a", "b", "c"], range(3))
    assert (match.first, match.second) == (0, 2)


def test_similarity_is_the_correlation_without_the_mean_of_the_others() -> None:
    rng = np.random.default_rng(0)
    cells = rng.choice([-1.0, 1.0], (11, 60)).astype(np.float32)
    order = np.arange(60)[::-1]
    fast = fingerprint.similarity(cells, cells[:, order], np.array([2, 7]))
    for row, i in enumerate((2, 7)):
        for j in range(11):
            if i == j:
                continue
            mean = np.delete(cells, [i, j], axis=0).mean(axis=0)
            slow = [
                float((a := cells[i] - mean) @ (b := other) / np.sqrt((a @ a) * (b @ b)))
                for other in (cells[j] - mean, (cells[j] - mean)[order])
            ]
            assert fast[row, j] == pytest.approx(max(slow), abs=1e-4)


def test_an_absent_contrast_says_nothing(cohort: list[bytes]) -> None:
    values, brain, grid = head(1)
    one = np.rint(values).astype(np.uint8)
    both = [fingerprint.fingerprint(np.stack([one, np.zeros_like(one)]), brain, grid)]
    both += [fingerprint.fingerprint(np.stack([np.zeros_like(one), one]), brain, grid)]
    assert fingerprint.matches(both, ["a", "b"], range(2)) == []
    with pytest.raises(ValueError, match="cannot be compared"):
        fingerprint.matches([both[0], cohort[0]], ["a", "b"], range(2))


def test_a_matrix_an_axis_samples_what_interpolation_does() -> None:
    rng = np.random.default_rng(3)
    means = rng.normal(100, 20, (2, 21, 30, 26)).astype(np.float32)
    coarse = np.array([[0, 0, 3.0, -40], [0, -2.0, 0, 28], [4.0, 0, 0, -39], [0, 0, 0, 1]])
    covariance = np.diag([700.0, 500.0, 900.0])  # wide: some points lie outside
    places, blur = fingerprint._sampling(coarse, np.array([1.0, -2, 3]), np.eye(3), covariance)
    straight = fingerprint._straight(means, places, blur)
    np.testing.assert_allclose(straight, fingerprint._turned(means, places, blur), atol=1e-3)
    assert (straight == 0).any()


def test_moments_are_those_of_the_points() -> None:
    share = np.random.default_rng(4).random((9, 12, 10)).astype(np.float32)
    share[share < 0.7] = 0
    coarse = np.array([[0.1, 0, 3.0, -40], [0, -2.0, 0.2, 28], [4.0, 0, 0, -39], [0, 0, 0, 1]])
    world = np.argwhere(share) @ coarse[:3, :3].T + coarse[:3, 3]
    centre, covariance = fingerprint._moments(share, coarse)
    weights = share[share > 0]
    np.testing.assert_allclose(centre, np.average(world, axis=0, weights=weights))
    np.testing.assert_allclose(covariance, np.cov(world.T, aweights=weights, ddof=0), rtol=1e-5, atol=1e-5)


def test_a_tiny_or_flat_brain_has_a_fingerprint() -> None:
    grid = head(1)[2]
    volume = np.zeros((1, 10, 64, 64), np.uint8)
    volume[0, 4, 30, 30] = 9
    assert len(fingerprint.fingerprint(volume, volume[0] > 0, grid)) == 4 * fingerprint.BYTES


@pytest.mark.flow
def test_real_patients_are_told_apart(test_data: Path) -> None:
    """Four glioma patients, two contrasts: each found again after other processing, none taken for another."""

    def conformed(patient: str, turn: float, spacing: float) -> bytes:
        folder = test_data / f"data/glioma4/brats_2013_pat{patient}_1"
        brain = nib.as_closest_canonical(nib.load(folder / "brainmask.nii.gz"))
        mask = np.asarray(brain.dataobj) > 0
        moved = phantoms.affine((1, 1, 1), (1, 1, 1), (turn, turn / 2, -turn))
        scans = {}
        for name in ("T1c", "Flair"):
            image = nib.as_closest_canonical(nib.load(folder / f"{name}_subtrMeanDivStd.nii.gz"))
            data = np.asarray(image.dataobj, np.float32)
            affine = moved @ image.affine
            scans[name] = normalise.Masked(data, affine, mask, affine)
        made = normalise.conform(
            scans, ("T1c", "Flair"), size=round(224 / spacing), spacing_mm=spacing, slice_spacing_mm=2 * spacing - 1,
            percentiles=(0.5, 99.5), min_brain=0.05,
        )  # fmt: skip
        return fingerprint.fingerprint(made.volumes, made.brain, made.grid.affine)

    patients = ("0003", "0004", "0005", "0006")
    prints = [conformed(p, 0.0, 1.0) for p in patients] + [conformed(p, 5.0, 1.5) for p in patients]
    found = fingerprint.matches(prints, [str(n) for n in range(8)], range(8))
    assert {(match.first, match.second) for match in found} == {(n, n + 4) for n in range(4)}
