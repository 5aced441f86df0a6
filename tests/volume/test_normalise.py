from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import phantoms
from cranium.volume import levels, normalise, slices
from cranium.volume.nifti import Volume
from cranium.volume.quality import Rejected

CHANNELS = ("T1w", "T2w", "FLAIR")
SPEC: Mapping[str, Any] = {
    "size": 56,
    "spacing_mm": 4.0,
    "slice_spacing_mm": 4.0,
    "percentiles": (0.5, 99.5),
    "min_brain": 0.05,
}
SHAPE = (44, 52, 40)


def scan(
    contrast: str,
    *,
    axes: str = "RAS",
    centre: tuple[float, float, float] = (0, 0, 0),
    spacing: tuple[float, float, float] = (4, 4, 4),
    shape: tuple[int, int, int] = SHAPE,
    degrees: tuple[float, float, float] = (0, 0, 0),
    head: phantoms.Head | None = None,
) -> normalise.Masked:
    grid = phantoms.affine(spacing, shape, degrees, centre)
    labels = phantoms.tissues(head or phantoms.Head(), shape, grid)
    data = phantoms.intensities(labels, contrast, seed=-1).astype(np.float32)
    return normalise.masked(volume(data, grid, axes), volume((labels >= 2).astype(np.float32), grid, axes))


def volume(data: np.ndarray, grid: np.ndarray, axes: str = "RAS") -> Volume:
    data, grid = phantoms.turned(data, grid, axes)
    return Volume(data, grid, (), "")


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_implausible_masks_are_rejected(share: float) -> None:
    grid = phantoms.affine((4, 4, 4), SHAPE)
    data = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    with pytest.raises(Rejected) as error:
        normalise.masked(volume(data, grid), volume(np.full(SHAPE, share, np.float32), grid))
    assert error.value.code == "EMPTY_BRAIN"


def test_one_session_on_one_grid() -> None:
    """Contrasts on other grids, axes and tilts show the same anatomy in the same pixels."""
    scans = {
        "T1w": scan("T1w"),
        "T2w": scan("T2w", axes="LPS", degrees=(6, -4, 3)),
        "FLAIR": scan("FLAIR", axes="PIR", spacing=(3, 3, 5), shape=(60, 70, 32)),
    }
    result = normalise.conform(scans, CHANNELS, **SPEC)
    assert result.volumes.shape == (3, *result.grid.shape) and result.volumes.dtype == np.uint8
    assert set(result.notes) == set(CHANNELS) and not result.rejected
    supports = result.volumes > 0
    for other in (1, 2):
        both = np.count_nonzero(supports[0] & supports[other])
        assert 2 * both / (np.count_nonzero(supports[0]) + np.count_nonzero(supports[other])) > 0.95
    z, h, w = np.indices(result.grid.shape)
    world = np.stack([h, w, z, np.ones_like(z)]).reshape(4, -1)
    labels = phantoms.tissues(phantoms.Head(), result.grid.shape, result.grid.affine[:, [2, 0, 1, 3]])
    assert np.all(np.abs(world).max() < 100)
    white, csf = labels == 4, labels == 2
    for channel, brighter in (("T1w", white), ("T2w", csf), ("FLAIR", white)):
        values = result.volumes[CHANNELS.index(channel)]
        darker = csf if brighter is white else white
        assert np.median(values[brighter]) > np.median(values[darker]) + 50
    right = labels[:, :, 28:] == 2
    left = labels[:, :, :28] == 2
    assert right.sum() > 1.3 * left.sum()  # the larger ventricle is on the right side of the picture


def test_what_lies_outside_every_brain_need_not_be_resampled() -> None:
    """Masks of different size on grids that differ: the same levels as from the whole grid."""
    scans = {
        "T1w": scan("T1w"),
        "T2w": scan("T2w", degrees=(6, -4, 3)),
        "FLAIR": scan("FLAIR", centre=(6, 0, 0), head=phantoms.Head(scale=(1.1, 1.1, 1.1))),
    }
    result = normalise.conform(scans, CHANNELS, **SPEC)
    whole = np.zeros(result.grid.shape, bool)
    for channel, given in scans.items():
        values = slices.onto_grid(given.data, given.affine, result.grid)
        voxels = given.brain.astype(np.uint8)
        brain = slices.onto_grid(voxels, given.brain_affine, result.grid, labels=True) > 0
        brain &= np.isfinite(values)
        expected = levels.to_levels(values, brain, SPEC["percentiles"]).astype(int)
        apart = np.abs(result.volumes[CHANNELS.index(channel)] - expected)
        assert apart.max() <= 1 and np.count_nonzero(apart) < 5  # a rounding of float32 may differ
        whole |= brain
    np.testing.assert_array_equal(result.brain, whole)


def test_memory_order_leaves_no_trace() -> None:
    first = normalise.conform({"T1w": scan("T1w"), "T2w": scan("T2w")}, CHANNELS, **SPEC)
    for axes in ("LAS", "LPI", "AIL"):
        other = {"T1w": scan("T1w", axes=axes), "T2w": scan("T2w", axes=axes)}
        second = normalise.conform(other, CHANNELS, **SPEC)
        np.testing.assert_array_equal(second.volumes, first.volumes)
        np.testing.assert_array_equal(second.grid.affine, first.grid.affine)
        assert second.slices == first.slices


def test_size_is_kept_in_mm() -> None:
    """A head 10 % larger covers 21 % more pixels: nothing is fitted to the frame."""
    areas = []
    for scale in (1.0, 1.1):
        one = scan("T1w", head=phantoms.Head((scale,) * 3), spacing=(2, 2, 2), shape=(88, 104, 80))
        result = normalise.conform({"T1w": one}, CHANNELS, **SPEC | {"size": 112, "spacing_mm": 2.0})
        middle = result.grid.shape[0] // 2
        areas.append(np.count_nonzero(result.volumes[0, middle]))
    assert areas[1] / areas[0] == pytest.approx(1.21, abs=0.01)


def test_missing_contrasts_leave_a_zero_channel_in_place() -> None:
    result = normalise.conform({"FLAIR": scan("FLAIR")}, CHANNELS, **SPEC)
    assert [bool(v.any()) for v in result.volumes] == [False, False, True]


def test_contrasts_that_lie_elsewhere_are_rejected_alone() -> None:
    result = normalise.conform({"T1w": scan("T1w"), "T2w": scan("T2w", centre=(0, 0, 60))}, CHANNELS, **SPEC)
    assert result.rejected["T2w"].code == "MODALITY_GRID"
    assert "T1w" in result.notes and not result.volumes[1].any()
    near = normalise.conform({"T1w": scan("T1w"), "T2w": scan("T2w", centre=(0, 0, 40))}, CHANNELS, **SPEC)
    assert not near.rejected  # the same head, seen through another window


def test_partial_cover_and_cropping_are_noted() -> None:
    whole = scan("T1w")
    grid = phantoms.affine((4, 4, 4), (44, 52, 24))  # ends inside the brain
    labels = phantoms.tissues(phantoms.Head(), (44, 52, 24), grid)
    slab = phantoms.intensities(labels, "T2w", -1).astype(np.float32)
    shared = normalise.Masked(slab, grid, whole.brain, whole.brain_affine)
    result = normalise.conform({"T1w": whole, "T2w": shared}, CHANNELS, **SPEC)
    assert [note.code for note in result.notes["T2w"]] == ["PARTIAL_COVER"]
    assert result.notes["T1w"] == ()
    cropped = normalise.conform({"T1w": whole}, CHANNELS, **SPEC | {"size": 28})
    assert [note.code for note in cropped.notes["T1w"]] == ["CROPPED"]
    low, high = -80 + 2, 80 - 2  # of voxel centres in the brain, front to back
    assert f"{(high - low - 28 * 4) / 2:.0f} mm" in cropped.notes["T1w"][0].reason


def test_no_slice_with_enough_brain() -> None:
    with pytest.raises(Rejected) as error:
        normalise.conform({"T1w": scan("T1w")}, CHANNELS, **SPEC | {"min_brain": 0.99})
    assert error.value.code == "EMPTY_BRAIN"


def test_otsu_finds_the_head_and_takes_stripped_scans_as_they_are() -> None:
    grid = phantoms.affine((4, 4, 4), SHAPE)
    labels = phantoms.tissues(phantoms.Head(), SHAPE, grid)
    data = phantoms.intensities(labels, "T1w").astype(np.float32)
    data += np.abs(np.random.default_rng(0).normal(0, 10, SHAPE)).astype(np.float32)
    found = normalise.otsu_mask(data)
    head = labels > 0
    assert 2 * np.count_nonzero(found & head) / (found.sum() + head.sum()) > 0.95
    stripped = np.where(labels >= 2, data + 1, 0).astype(np.float32)
    np.testing.assert_array_equal(normalise.otsu_mask(stripped), labels >= 2)
    one = normalise.masked(volume(data, grid), None)
    assert [note.code for note in one.notes] == ["MASK_FALLBACK"]
