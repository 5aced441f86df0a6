"""Levels: the percentiles of NumPy to the last bit, and what becomes of the intensities between them."""

from __future__ import annotations

import numpy as np
import pytest

from cranium.volume import levels
from cranium.volume.quality import Rejected


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000, 70_001])
def test_percentiles_are_those_of_numpy_to_the_last_bit(count: int) -> None:
    rng = np.random.default_rng(count)
    for values in (rng.gamma(2, 100, count), rng.normal(0, 1e6, count), rng.integers(-40, 40, count)):
        given = values.astype(np.float32)
        for percent in (0, 0.5, 2, 25, 50, 99.5, 99.9, 100, *rng.uniform(0, 100, 20).tolist()):
            assert levels.percentile(given, percent) == np.percentile(given, (percent,))[0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_levels_are_the_share_of_the_way_between_the_percentiles_of_the_brain_alone(dtype: type) -> None:
    rng = np.random.default_rng(0)
    values = rng.gamma(2, 100, (50, 40, 40)).astype(np.float32)
    brain = rng.random(values.shape) > 0.5
    values[~brain] = 1e6  # whatever lies outside must not matter
    inside, top = values[brain], np.iinfo(dtype).max
    assert inside.size > levels.CHUNK
    low, high = np.percentile(inside, (2, 98))
    expected = np.rint(1 + (top - 1) * np.clip((inside.astype(np.float64) - low) / (high - low), 0, 1))
    result = levels.to_levels(values, brain, (2, 98), dtype)
    assert result.dtype == dtype and not result[~brain].any()
    np.testing.assert_array_equal(result[brain], expected)
    assert expected.min() == 1 and expected.max() == top
    louder = levels.to_levels(values * 4, brain, (2, 98), dtype)
    np.testing.assert_array_equal(louder, result)  # gain does not matter


@pytest.mark.parametrize("brain", [np.ones((4, 4, 4), bool), np.zeros((4, 4, 4), bool)])
def test_constant_brains_are_rejected(brain: np.ndarray) -> None:
    with pytest.raises(Rejected) as error:
        levels.to_levels(np.full((4, 4, 4), 3, np.float32), brain, (0.5, 99.5))
    assert error.value.code == "EMPTY_BRAIN"
