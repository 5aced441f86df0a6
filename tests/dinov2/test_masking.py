"""Masks: keyed by row, half of the views, the declared share of patches, in blocks."""

from __future__ import annotations

import numpy as np
import pytest

from cranium.dinov2 import draw, masking


def test_rows_do_not_depend_on_their_batch() -> None:
    rows = np.arange(100, 108)
    whole = masking.sample(rows, 3, 1, 8)
    parts = [masking.sample(part, 3, 1, 8) for part in (rows[:4], rows[4:])]
    assert np.array_equal(whole, np.concatenate(parts, axis=1))
    assert not np.array_equal(whole, masking.sample(rows, 4, 1, 8))
    assert not np.array_equal(whole, masking.sample(rows, 3, 2, 8))


def test_exactly_half_of_two_views_and_shares_spread_over_the_interval() -> None:
    masks = masking.sample(np.arange(400), 0, 0, 16)
    assert masks.shape == (2, 400, 256)
    assert (masks.any(axis=2).sum(axis=0) == 1).all()
    assert 150 < masks[0].any(axis=1).sum() < 250
    shares = masks.mean(axis=2)[masks.any(axis=2)]
    assert shares.min() >= 0.1 - 0.5 / 256 and shares.max() <= 0.5 + 0.5 / 256
    assert np.histogram(shares, bins=4, range=(0.1, 0.5))[0].min() > 70
    assert masking.sample(np.arange(50), 0, 0, 8, probability=0.0).sum() == 0
    assert masking.sample(np.arange(50), 0, 0, 8, probability=1.0).any(axis=2).all()


@pytest.mark.parametrize("count", [1, 3, 4, 20, 63, 64])
def test_blocks_hide_exactly_the_count(count: int) -> None:
    assert masking.draw_blocks(np.random.default_rng(0), 8, count).sum() == count


def test_masks_are_blocks_not_dust() -> None:
    random = np.random.default_rng(0)
    neighbours = []
    for _ in range(50):
        mask = masking.draw_blocks(random, 16, 64)
        padded = np.pad(mask, 1)
        around = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        neighbours.append(around[mask].mean())
    # Single random patches at this density have a neighbour with probability 1 - 0.75 ** 4 = 0.68.
    assert np.mean(neighbours) > 0.95


def test_an_impossible_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="mask ratio"):
        masking.sample(np.arange(2), 0, 0, 8, ratio=(0.5, 0.1))


def test_streams_differ_by_purpose_and_depth_keeps_its_rate() -> None:
    rows = np.arange(64)
    assert not np.allclose(draw.uniforms(rows, 0, 0, "crop", 8), draw.uniforms(rows, 0, 0, "mask", 8))
    keep = draw.keep_rows(rows, 0, 0, num_blocks=12, rate=0.3, views=10)
    assert keep.shape == (10, 24, 64)
    assert abs(keep.float().mean().item() - 0.7) < 0.02
    part = draw.keep_rows(rows[10:13], 0, 0, num_blocks=12, rate=0.3, views=10)
    assert (part == keep[:, :, 10:13]).all()
    assert draw.keep_rows(rows, 0, 0, num_blocks=2, rate=0.0, views=1).all()
