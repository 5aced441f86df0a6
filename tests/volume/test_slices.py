from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

import phantoms
from cranium.volume import nifti, slices

SHAPE = (44, 52, 40)
RAS = phantoms.affine((4, 4, 4), SHAPE)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def brain(grid: np.ndarray, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return phantoms.tissues(phantoms.Head(), shape, grid) >= 2


def test_bounding_box_equals_a_slow_loop() -> None:
    grid = phantoms.affine((4, 3, 5), SHAPE, (10, -7, 20), (3, 2, 1))
    mask = np.random.default_rng(0).random(SHAPE) > 0.999
    world = np.array([grid[:3, :3] @ index + grid[:3, 3] for index in np.argwhere(mask)])
    low, high = slices.bounding_box(mask, grid)
    np.testing.assert_allclose(low, world.min(axis=0))
    np.testing.assert_allclose(high, world.max(axis=0))
    with pytest.raises(ValueError, match="empty"):
        slices.bounding_box(np.zeros(SHAPE, bool), grid)


def test_session_grid_is_centred_and_has_its_spacing() -> None:
    mask = brain(RAS)
    low, high = slices.bounding_box(mask, RAS)
    grid = slices.session_grid(mask, RAS, 56, 3.0, 2.0)
    assert grid.shape == (int(np.ceil((high[2] - low[2]) / 2)) + 1, 56, 56)
    middle = grid.affine @ [27.5, 27.5, (grid.shape[0] - 1) / 2, 1]
    np.testing.assert_allclose(middle[:3], (low + high) / 2)
    np.testing.assert_allclose(grid.affine @ [1, 0, 0, 0], [0, -3, 0, 0])  # a row down is 3 mm to the back
    np.testing.assert_allclose(grid.affine @ [0, 1, 0, 0], [3, 0, 0, 0])  # a column on is 3 mm to the right
    np.testing.assert_allclose(grid.affine @ [0, 0, 1, 0], [0, 0, 2, 0])


def test_resampling_a_ramp_is_exact() -> None:
    """A linear function of the world survives linear interpolation; outside the field of view there is nothing."""
    grid = slices.session_grid(brain(RAS), RAS, 60, 4.0, 4.0)
    slope = np.array([0.5, -0.25, 2.0])
    for degrees in ((0, 0, 0), (8, -5, 12)):
        source = phantoms.affine((4, 4, 4), SHAPE, degrees)
        world = np.tensordot(source[:3, :3], np.indices(SHAPE), 1) + source[:3, 3, None, None, None]
        values = np.tensordot(slope, world, 1).astype(np.float32)
        result = slices.onto_grid(values, source, grid)
        z, h, w = np.indices(grid.shape)
        points = np.stack([h, w, z, np.ones_like(z)]).reshape(4, -1)
        expected = (slope @ (grid.affine @ points)[:3]).reshape(grid.shape)
        index = (np.linalg.inv(source) @ grid.affine @ points)[:3].reshape(3, *grid.shape)
        limits = np.array(SHAPE)[:, None, None, None] - 1
        inside = ((index >= 0) & (index <= limits)).all(axis=0)
        far = ((index < -0.51) | (index > limits + 0.51)).any(axis=0)
        np.testing.assert_allclose(result[inside], expected[inside], atol=2e-3)
        assert np.isnan(result[far]).all() and far.any()


def test_tilted_and_flipped_headers_give_the_same_stack() -> None:
    """The same world on other voxels. Axis flips are exact; a tilt costs only interpolation."""
    data = phantoms.intensities(phantoms.tissues(phantoms.Head(), SHAPE, RAS), "T1w").astype(np.float32)
    grid = slices.session_grid(brain(RAS), RAS, 56, 3.5, 4.5)
    expected = slices.onto_grid(data, RAS, grid)
    for axes in ("LAS", "LPS", "PIR", "SRA"):
        turned, affine = nifti.to_ras(*phantoms.turned(data, RAS, axes))
        np.testing.assert_array_equal(slices.onto_grid(turned, affine, grid), expected)
    fine = (88, 104, 80)
    straight, tilted = (phantoms.affine((2, 2, 2), fine, degrees) for degrees in ((0, 0, 0), (7, -5, 9)))
    seen = [slices.onto_grid(brain(a, fine).astype(np.float32), a, grid) > 0.5 for a in (straight, tilted)]
    assert dice(*seen) > 0.98


def test_coarser_grids_are_antialiased() -> None:
    """A pattern that alternates from voxel to voxel must vanish at three times the spacing, not fold into stripes."""
    shape = (60, 60, 60)
    source = phantoms.affine((1, 1, 1), shape)
    stripes = np.broadcast_to((np.arange(60) % 2).astype(np.float32)[:, None, None], shape)
    grid = slices.session_grid(np.ones(shape, bool), source, 16, 2.9, 3.0)
    result = slices.onto_grid(stripes, source, grid)[5:15, 2:14, 2:14]
    assert np.abs(result - 0.5).max() < 0.05
    fine = slices.session_grid(np.ones(shape, bool), source, 60, 1.0, 1.0)
    np.testing.assert_array_equal(slices.onto_grid(stripes, source, fine)[0, 0], stripes[:, 0, 0])


def test_labels_take_the_nearest_voxel() -> None:
    labels = np.random.default_rng(0).integers(0, 5, SHAPE).astype(np.uint8)
    grid = slices.session_grid(brain(RAS), RAS, 56, 3.1, 2.9)
    step = np.linalg.inv(RAS) @ grid.affine_xyz
    expected = ndimage.affine_transform(
        labels, step[:3, :3], step[:3, 3], grid.shape[::-1], order=0, mode="constant", cval=0
    )
    np.testing.assert_array_equal(
        slices.onto_grid(labels, RAS, grid, labels=True), expected.transpose(2, 1, 0)
    )


def test_a_place_just_between_two_voxels_takes_the_same_side_everywhere() -> None:
    """Half a voxel off: the resampler's own rounding would repeat one voxel of a line and leave out another."""
    shape = (240, 5, 5)
    source = phantoms.affine((1, 1, 1), shape)
    ramp = np.broadcast_to(np.arange(240, dtype=np.uint8)[:, None, None], shape)
    middle = np.zeros(shape, bool)
    middle[8:231] = True  # 223 voxels: their centre is a voxel's, the grid's lies between two pixels
    grid = slices.session_grid(middle, source, 224, 1.0, 1.0)
    for row in slices.onto_grid(ramp, source, grid, labels=True)[2, 110:114]:
        np.testing.assert_array_equal(np.diff(row.astype(int)), 1)


@pytest.mark.parametrize("degrees", [(0, 0, 0), (9, -6, 12)])
def test_a_part_of_a_grid_is_cut_out_of_the_whole(degrees: tuple[float, float, float]) -> None:
    source = phantoms.affine((3, 4, 5), SHAPE, degrees, (3.7, -8, 2))
    data = np.random.default_rng(0).normal(300, 90, SHAPE).astype(np.float32)
    grid = slices.session_grid(brain(RAS), RAS, 80, 2.3, 3.1)
    whole = slices.onto_grid(data, source, grid)
    for part in (np.s_[0:9, 60:80, 3:4], np.s_[5:30, 11:70, 20:61]):
        cut = slices.onto_grid(data, source, grid, part=part)
        np.testing.assert_array_equal(np.isnan(cut), np.isnan(whole[part]))
        np.testing.assert_array_max_ulp(np.nan_to_num(cut), np.nan_to_num(whole[part]), 1)
    assert np.isnan(whole).any()


@pytest.mark.parametrize("corner", [(0, 0, 0), (20, 25, 18), (43, 51, 39)])
def test_a_small_label_is_found_wherever_it_lies(corner: tuple[int, int, int]) -> None:
    """Only cells near what is set are looked at; a slow search for the nearest voxel looks at all."""
    source = phantoms.affine((4, 3, 5), SHAPE, (9, -6, 12))
    labels = np.zeros(SHAPE, np.uint8)
    labels[corner] = 7
    grid = slices.session_grid(np.ones(SHAPE, bool), source, 150, 1.9, 2.1)
    found = slices.onto_grid(labels, source, grid, labels=True)
    cells = np.stack([*np.indices(grid.shape)[[1, 2, 0]].reshape(3, -1), np.ones(found.size)])
    nearest = np.rint(np.linalg.inv(source) @ (grid.affine @ cells))[:3].astype(int)
    there = (nearest == np.array(corner)[:, None]).all(axis=0).reshape(grid.shape)
    assert there.any() and set(np.unique(found[there])) == {7}
    np.testing.assert_array_equal(found > 0, there)
    assert slices.box(there) == slices.box(found > 0)


def test_a_label_beyond_the_grid_is_not_there() -> None:
    labels = np.zeros(SHAPE, np.uint8)
    grid = slices.session_grid(brain(RAS), RAS, 20, 4.0, 4.0)
    assert not slices.onto_grid(labels, RAS, grid, labels=True).any()
    labels[0, 0, 0] = 1
    assert not slices.onto_grid(labels, RAS, grid, labels=True).any()


def test_box_of_a_mask() -> None:
    mask = np.zeros((5, 6, 7), bool)
    assert slices.box(mask) == np.s_[0:1, 0:1, 0:1]
    mask[1, 2, 5] = mask[3, 4, 0] = True
    assert slices.box(mask) == np.s_[1:4, 2:5, 0:6]


@pytest.mark.parametrize("degrees", [(0, 0, 0), (8, -6, 10)])
def test_label_maps_return_to_the_scan(degrees: tuple[float, float, float]) -> None:
    shape = (88, 104, 36)
    native = phantoms.affine((2, 2, 5), shape, degrees)
    mask = brain(native, shape)
    grid = slices.session_grid(mask, native, 180, 1.0, 1.0)
    conformed = slices.onto_grid(mask.astype(np.uint8), native, grid, labels=True)
    back = slices.to_native(conformed, grid, shape, native)
    assert back.dtype == np.uint8 and dice(back > 0, mask) > 0.99


def test_kept_is_one_run_from_the_first_to_the_last_slice_with_enough_brain() -> None:
    shares = [0, 0.04, 0.06, 0.5, 0.01, 0.3, 0.05, 0.049, 0]
    masks = np.zeros((len(shares), 20, 50), bool)
    for mask, share in zip(masks, shares, strict=True):
        mask.flat[: round(share * 1000)] = True
    assert slices.kept(masks, 0.05) == range(2, 7)
    assert slices.kept(masks, 0.6) == range(0)
    assert slices.kept(masks, 0.0) == range(1, 8)  # a slice without brain at all is never kept


def test_the_range_of_the_paper_and_every_nth() -> None:
    """BrainFound keeps the indices 10 to 10 + min(140, n - 10) - 1."""
    rule = slices.Kept("range")
    for n in (30, 150, 189):
        brain = np.ones((n, 4, 4), bool)
        assert slices.kept(brain, 0.05, rule) == range(10, 10 + min(140, n - 10))
    assert slices.kept(np.ones((8, 4, 4), bool), 0.05, rule) == range(0)
    assert slices.kept(np.zeros((150, 4, 4), bool), 0.0, rule) == range(0)  # no brain, no slice
    assert list(slices.kept(np.ones((9, 4, 4), bool), 0.05, slices.Kept(every=4))) == [0, 4, 8]


@pytest.mark.parametrize("run", [range(2, 9, 3), range(1, 8, 2)])
def test_stacks_with_a_step_and_back(run: range) -> None:
    volumes = np.random.default_rng(0).integers(1, 256, (2, 9, 6, 7), np.uint16)
    stacks = slices.to_stacks(volumes, run)
    np.testing.assert_array_equal(stacks[:, :, 0].transpose(1, 0, 2, 3), volumes[:, list(run)])
    back = slices.from_stacks(stacks, run, 9)
    np.testing.assert_array_equal(back[:, list(run)], volumes[:, list(run)])
    assert not np.delete(back, list(run), axis=1).any() and back.dtype == np.uint16


def test_stacks_and_back_are_bit_equal() -> None:
    volumes = np.random.default_rng(0).integers(0, 256, (3, 9, 6, 7), np.uint8)
    run = range(2, 8)
    stacks = slices.to_stacks(volumes, run)
    assert stacks.shape == (6, 3, 1, 6, 7)
    for i, z in enumerate(run):
        np.testing.assert_array_equal(stacks[i, :, 0], volumes[:, z])
    back = slices.from_stacks(stacks, run, 9)
    np.testing.assert_array_equal(back[:, 2:8], volumes[:, 2:8])
    assert not back[:, :2].any() and not back[:, 8:].any()


@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("contrasts", [1, 3])
@pytest.mark.parametrize("run", [range(7), range(2, 6), range(1, 7, 2)])
def test_a_stack_is_its_slice_between_its_neighbours_in_every_contrast(
    depth: int, contrasts: int, run: range
) -> None:
    """By a slow loop, and as the stacks of single slices laid side by side; zero beyond the ends of the volume."""
    volumes = np.random.default_rng(0).integers(1, 256, (contrasts, 7, 4, 6), np.uint8)
    stacks = slices.to_stacks(volumes, run, depth)
    assert stacks.shape == (len(run), contrasts, depth, 4, 6) and stacks.flags.c_contiguous
    for row, z in enumerate(run):
        for c in range(contrasts):
            for s in range(depth):
                at = z + s - depth // 2
                np.testing.assert_array_equal(stacks[row, c, s], volumes[c, at] if 0 <= at < 7 else 0)
    reach = depth // 2
    wide = np.concatenate([np.zeros_like(volumes)] * 3, axis=1)
    wide[:, 7:14] = volumes
    moved = [
        slices.to_stacks(wide, range(run.start + 7 + by, run.stop + 7 + by, run.step))[:, :, 0]
        for by in range(-reach, reach + 1)
    ]
    np.testing.assert_array_equal(stacks, np.stack(moved, axis=2))
    back = slices.from_stacks(stacks, run, 7)
    np.testing.assert_array_equal(back[:, list(run)], volumes[:, list(run)])
    assert not np.delete(back, list(run), axis=1).any()


def test_a_stack_has_a_middle_slice() -> None:
    with pytest.raises(ValueError, match="no middle one"):
        slices.to_stacks(np.zeros((1, 5, 4, 4), np.uint8), range(5), 4)
