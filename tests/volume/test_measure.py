"""Measures of the quality page against the plain formulas, on every voxel one by one or with NumPy's own."""

from __future__ import annotations

import numpy as np
import pytest

from cranium.volume import measure


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "columns", [slice(3, 20), slice(9, 27)]
)  # nearer to one side of the grid, or to the other
def test_looks_are_those_of_plain_loops(dtype: type, columns: slice) -> None:
    rng = np.random.default_rng(1)
    brain = np.zeros((17, 24, 30), bool)
    brain[2:15, 4:19, columns] = rng.random((13, 15, columns.stop - columns.start)) > 0.2
    volume = np.where(brain, rng.integers(1, np.iinfo(dtype).max, brain.shape), 0).astype(dtype)
    volume[:, :, 14:] //= 3  # so that there is something to tell
    affine = np.array([[0, 1.0, 0, -15], [-1.0, 0, 0, 12], [0, 0, 1.0, -8], [0, 0, 0, 1]])
    native = volume.transpose(2, 1, 0).astype(np.float32), affine[:, [1, 0, 2, 3]]
    found = measure.measures({"a": native}, ("a",), volume[None], brain, affine)
    steps, left, right, inside = [], [], [], []
    for z in range(2, 15, measure.STRIDE):
        seen = volume[z].astype(int)
        for y, x in np.argwhere(seen):
            inside.append(seen[y, x])
            steps += [abs(seen[y, x] - other) for other in (seen[y + 1, x], seen[y, x + 1]) if other]
            if mirror := seen[y, 29 - x]:
                left.append(seen[y, x])
                right.append(mirror)
    looks = found["channels"]["a"]
    assert looks["sharpness"] == pytest.approx(np.mean(steps) / np.std(inside), rel=1e-3)
    assert looks["symmetry"] == pytest.approx(np.corrcoef(left, right)[0, 1], abs=1e-3)
    assert looks["quantiles"] == pytest.approx(np.percentile(volume[brain], measure.PERCENT), rel=1e-3)
    assert looks["cover"] == pytest.approx(np.mean(volume[brain] > 0), rel=1e-3)


def test_channels_are_correlated_where_both_are_seen() -> None:
    rng = np.random.default_rng(2)
    brain = np.zeros((9, 20, 20), bool)
    brain[1:8, 3:17, 5:15] = True
    volumes = np.where(brain, rng.integers(0, 200, (2, *brain.shape)), 0).astype(np.uint8)
    volumes[1] = np.where(brain, volumes[0] // 2 + volumes[1] // 2, 0)
    affine = np.array([[0, 1.0, 0, -10], [-1.0, 0, 0, 10], [0, 0, 1.0, -4], [0, 0, 0, 1]])
    native = {name: (volumes[i].transpose(2, 1, 0), affine[:, [1, 0, 2, 3]]) for i, name in enumerate("ab")}
    found = measure.measures(native, ("a", "b"), volumes, brain, affine)
    both = (volumes > 0).all(axis=0)
    expected = np.corrcoef(volumes[0][both], volumes[1][both])[0, 1]
    assert found["correlation"] == {"a+b": pytest.approx(expected, abs=1e-3)}


def test_a_flat_channel_has_no_looks() -> None:
    brain = np.ones((4, 6, 6), bool)
    affine = np.array([[0, 1.0, 0, -3], [-1.0, 0, 0, 3], [0, 0, 1.0, -2], [0, 0, 0, 1]])
    volumes = np.stack([np.full(brain.shape, 7, np.uint8), np.zeros(brain.shape, np.uint8)])
    native = {name: (volumes[i].transpose(2, 1, 0), affine[:, [1, 0, 2, 3]]) for i, name in enumerate("ab")}
    found = measure.measures(native, ("a", "b"), volumes, brain, affine)
    for channel in found["channels"].values():
        assert channel["sharpness"] is None and channel["symmetry"] is None
    assert found["correlation"] == {"a+b": None}
