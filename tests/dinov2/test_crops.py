"""Views: keyed by row, equal to torchvision's resize, zero stays zero, brain in every local view."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cranium.dinov2 import crops, intensity
from cranium.dinov2.crops import CropSpec

SPEC = CropSpec(num_local=3, global_size=56, local_size=28)
PLAIN = dataclasses.replace(
    SPEC,
    gamma=0.0,
    contrast=0.0,
    bias_field=0.0,
    blur=0.0,
    noise=0.0,
    contrast_dropout=0.0,
    flip_probability=0.0,
)
SIZE = (64, 80)


def _stacks(batch: int = 8, slices: int = 1) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    stacks = torch.zeros(batch, 3, slices, *SIZE, dtype=torch.uint8)
    stacks[..., 16:48, 20:60] = torch.randint(1, 256, (batch, 3, slices, 32, 40), generator=random).byte()
    return stacks, torch.ones(batch, 3, dtype=torch.bool)


def test_a_batch_in_two_halves_gives_the_same_views() -> None:
    stacks, present = _stacks()
    rows = np.arange(1000, 1008)
    whole = crops.apply(stacks, present, crops.sample(rows, 5, 7, SPEC, size=SIZE), SPEC)
    for half in (slice(0, 4), slice(4, 8)):
        part = crops.apply(stacks[half], present[half], crops.sample(rows[half], 5, 7, SPEC, size=SIZE), SPEC)
        for got, expected in zip(part, whole, strict=True):
            torch.testing.assert_close(got, expected[:, half], rtol=0, atol=1e-6)
    other = crops.apply(stacks, present, crops.sample(rows, 6, 7, SPEC, size=SIZE), SPEC)
    assert not torch.allclose(other[0], whole[0])
    assert whole[0].shape == (2, 8, 3, 56, 56) and whole[1].shape == (3, 8, 3, 28, 28)
    assert whole[0].dtype == torch.float32


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("resize", [crops.resize, crops._multiplied])
def test_resize_is_that_of_interpolate(resize: Callable[..., Tensor], flip: bool) -> None:
    images = torch.rand(3, 2, *SIZE)
    spec = dataclasses.replace(PLAIN, global_scale=(0.02, 1.0))
    boxes = torch.from_numpy(crops.sample(np.arange(3), 0, 0, spec, size=SIZE).global_views.boxes[:, :, 0])
    got = resize(images, boxes, torch.full(boxes.shape[:2], flip), 28)
    for view in range(2):
        for row in range(3):
            top, left, height, width = boxes[view, row].tolist()
            crop = images[[row], :, top : top + height, left : left + width]
            crop = crop.flip(-1) if flip else crop
            expected = torch.nn.functional.interpolate(crop, (28, 28), mode="bilinear", antialias=True)
            torch.testing.assert_close(got[view, row], expected[0], rtol=0, atol=2e-6)


def test_views_on_a_cpu_are_those_of_the_batched_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, resized box by box, blurred by neighbours: as matrix products give it, at full size."""
    stacks, present = _stacks(6)
    spec = dataclasses.replace(SPEC, global_size=224, blur=1.5)
    params = crops.sample(np.arange(6), 0, 0, spec, size=SIZE)
    got = crops.apply(stacks, present, params, spec)
    monkeypatch.setattr(crops, "_AT_ONCE", 6)
    monkeypatch.setattr(crops, "resize", crops._multiplied)
    monkeypatch.setattr(intensity, "_SPARSE", 1000)
    for ours, batched in zip(got, crops.apply(stacks, present, params, spec), strict=True):
        apart = (ours - batched).abs() > 2e-5
        # At an edge a weight of zero and one of 1e-8 part foreground from background.
        assert apart.float().mean() < 1e-4
        assert ((ours > 0) != (batched > 0))[apart].all()


def test_blur_by_neighbours_is_blur_by_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(3, 2, 1, 90, 90)
    sigma = np.array([0.6, -1.0, 1.0])
    near, dense = x.clone(), x.clone()
    monkeypatch.setattr(intensity, "_SPARSE", 1)
    intensity._blur(near, sigma)
    monkeypatch.setattr(intensity, "_SPARSE", 1000)
    intensity._blur(dense, sigma)
    torch.testing.assert_close(near, dense, rtol=0, atol=2e-6)
    assert torch.equal(near[1], x[1]) and not torch.allclose(near[0], x[0], atol=1e-2)


def test_a_whole_unchanged_view_is_the_slice() -> None:
    stacks, present = _stacks()
    square = stacks[..., :64, :64]
    spec = dataclasses.replace(PLAIN, global_size=64, global_scale=(1.0, 1.0), aspect=(1.0, 1.0))
    views, _ = crops.apply(square, present, crops.sample(np.arange(8), 0, 0, spec, size=(64, 64)), spec)
    torch.testing.assert_close(views[0], square[:, :, 0] / 255)


def test_channels_are_contrast_then_slice() -> None:
    stacks, present = _stacks(2, slices=2)
    stacks[:, 1] = 0
    stacks[:, :, 1] //= 2
    spec = dataclasses.replace(PLAIN, global_scale=(1.0, 1.0), aspect=(1.25, 1.25))
    views, _ = crops.apply(stacks, present, crops.sample(np.arange(2), 0, 0, spec, size=SIZE), spec)
    means = views.mean(dim=(0, 1, 3, 4))
    assert (means[[2, 3]] == 0).all()
    assert 0.45 < means[1] / means[0] < 0.55 and 0.45 < means[5] / means[4] < 0.55


def test_a_contrast_is_dropped_with_all_its_neighbours() -> None:
    """A slow loop over views and rows: what is lost is what the draws say, three slices at a time."""
    stacks, present = _stacks(32, slices=3)
    present[::4, 1] = False
    spec = dataclasses.replace(PLAIN, contrast_dropout=0.5)
    params = crops.sample(np.arange(32), 0, 0, spec, size=SIZE)
    views, _ = crops.apply(stacks, present, params, spec)
    kept = views.view(2, 32, 3, 3, -1).amax(dim=-1) > 0
    lost = 0
    for view in range(2):
        for row in range(32):
            drop = params.global_views.drop[view, row]
            there = [c for c in range(3) if present[row, c]]
            expected = [c for c in there if drop[c] >= 0.5] or [max(there, key=lambda c: drop[c])]
            assert [c for c in range(3) if kept[view, row, c].all()] == expected
            assert [c for c in range(3) if kept[view, row, c].any()] == expected
            lost += len(there) - len(expected)
    assert lost > 20


def test_boxes_keep_to_the_slice_the_scale_and_the_aspect() -> None:
    params = crops.sample(np.arange(300), 0, 0, CropSpec(), size=SIZE)
    top, left, height, width = np.moveaxis(params.local_views.boxes, -1, 0)
    assert top.min() >= 0 and left.min() >= 0
    assert (top + height).max() == 64 and (left + width).max() == 80
    share = height * width / (64 * 80)
    assert 0.045 < share.min() < 0.06 and 0.3 < share.max() < 0.335
    assert abs(share.mean() - 0.185) < 0.005
    assert 1.25 < (width / height).max() < 1.45 and 0.7 < (width / height).min() < 0.8
    flips = params.local_views.flip.mean()
    assert 0.46 < flips < 0.54


def test_zero_stays_exactly_zero_and_values_stay_in_range_under_every_change() -> None:
    stacks, present = _stacks(16)
    stacks[:, 0, :, 20:30, 30:40] = 0  # a hole in one contrast
    strong = dataclasses.replace(SPEC, gamma=1.0, contrast=0.9, bias_field=1.0, blur=3.0, noise=0.5)
    still = dataclasses.replace(strong, gamma=0, contrast=0, bias_field=0, blur=0, noise=0)
    params = crops.sample(np.arange(16), 0, 0, strong, size=SIZE)
    changed, plain = crops.apply(stacks, present, params, strong), crops.apply(stacks, present, params, still)
    for got, before in zip(changed, plain, strict=True):
        assert (before == 0).float().mean() > 0.1
        assert (got[before == 0] == 0).all()
        assert got.isfinite().all() and got.min() >= 0 and got.max() <= 1
        assert not torch.allclose(got, before)


@pytest.mark.parametrize("change", ["gamma", "contrast", "bias_field", "blur", "noise"])
def test_each_change_acts_alone_and_differs_between_contrasts(change: str) -> None:
    stacks, present = _stacks(4)
    stacks[:, 1:] = stacks[:, :1]
    spec = dataclasses.replace(PLAIN, **{change: 0.5})
    params = crops.sample(np.arange(4), 0, 0, spec, size=SIZE)
    got, plain = crops.apply(stacks, present, params, spec)[0], crops.apply(stacks, present, params, PLAIN)[0]
    assert not torch.allclose(got, plain)
    # Blur is a property of the view, the rest of the contrast.
    assert torch.equal(got[:, :, 0], got[:, :, 1]) == (change == "blur")


def test_gamma_and_contrast_by_hand() -> None:
    views = torch.tensor([0.0, 0.25, 0.75, 0.5]).view(1, 1, 1, 1, 2, 2)
    draws = intensity.changes(np.full((1, 1, intensity.num_draws(1)), 1.0), 1)
    got = intensity.change(views.clone(), draws, gamma=0.5, contrast=0, bias_field=0, blur=0, noise=0)
    torch.testing.assert_close(got, views ** np.exp(0.5))
    got = intensity.change(views.clone(), draws, gamma=0, contrast=0.4, bias_field=0, blur=0, noise=0)
    torch.testing.assert_close(got.flatten(), torch.tensor([0.0, 0.15, 0.85, 0.5]))


def test_blur_is_a_gaussian() -> None:
    views = torch.full((1, 1, 1, 1, 31, 31), 0.5)
    views[..., 15, 15] = 1.0
    draws = intensity.changes(np.full((1, 1, intensity.num_draws(1)), 1.0), 1)
    got = (
        intensity.change(views, draws, gamma=0, contrast=0, bias_field=0, blur=2.0, noise=0)[0, 0, 0, 0] - 0.5
    )
    place = torch.arange(31.0) - 15
    line = torch.exp(-(place**2) / 8)
    line /= line.sum()
    torch.testing.assert_close(got, 0.5 * line[:, None] * line, rtol=0, atol=1e-6)


def test_noise_has_the_declared_strength_and_changes_with_the_row() -> None:
    views = torch.full((1, 40, 2, 3, 64, 64), 0.5)
    drawn = np.random.default_rng(0).random((1, 40, intensity.num_draws(2)))
    draws = intensity.changes(drawn, 2)
    got = intensity.change(views, draws, gamma=0, contrast=0, bias_field=0, blur=0, noise=0.1) - 0.5
    sigma = np.clip(2 * draws.noise[0, :, :, 0] - 1, 0, None) * 0.1
    measured = got.std(dim=(3, 4, 5))[0].numpy()
    np.testing.assert_allclose(measured[sigma > 0.01], sigma[sigma > 0.01], rtol=0.06)
    assert (measured[sigma == 0] == 0).all()
    row = int(np.argmax(sigma[:, 0]))
    assert torch.corrcoef(got[0, row, 0].flatten(1)).triu(1).abs().max() < 0.1  # slices are not copies


def test_a_missing_contrast_stays_zero_and_the_last_one_is_never_dropped() -> None:
    stacks, present = _stacks(64)
    present[:] = torch.tensor([True, False, True])
    present[:8, 0] = False
    spec = dataclasses.replace(PLAIN, contrast_dropout=0.9)
    for views in crops.apply(stacks, present, crops.sample(np.arange(64), 0, 0, spec, size=SIZE), spec):
        shown = views.flatten(3).any(dim=-1)
        assert not shown[:, :, 1].any()
        assert shown[:, :8, 2].all()
        assert shown.any(dim=-1).all()
        assert 0.4 < shown[:, 8:, 0].float().mean() < 0.6  # nearly always exactly one of two is left


def test_dropout_keeps_its_probability() -> None:
    drop = torch.from_numpy(np.random.default_rng(0).random((10, 500, 3)))
    kept = crops.keep_contrasts(torch.ones(500, 3, dtype=torch.bool), drop, 0.2)
    assert abs(1 - kept.double().mean().item() - (0.2 - 0.2**3 / 3)) < 0.01
    assert not crops.keep_contrasts(torch.zeros(500, 3, dtype=torch.bool), drop, 0.2).any()


def _shares(foreground: Tensor, boxes: Tensor) -> list[float]:
    return [
        foreground[top : top + height, left : left + width].float().mean().item()
        for top, left, height, width in boxes.tolist()
    ]


def test_local_views_hold_brain() -> None:
    foreground = torch.zeros(50, *SIZE, dtype=torch.bool)
    foreground[:, 8:24, 50:70] = True
    boxes = torch.from_numpy(crops.sample(np.arange(50), 0, 0, CropSpec(), size=SIZE).local_views.boxes)
    pixel = torch.rand(8, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen = crops.choose_boxes(crops.survey(foreground), boxes, pixel, 0.3007)
    fallbacks, short = 0, 0
    for view in range(8):
        for row in range(50):
            shares = _shares(foreground[row], boxes[view, row])
            first = next((i for i, share in enumerate(shares) if share >= 0.3007), None)
            if first is not None:
                assert torch.equal(chosen[view, row], boxes[view, row, first])
                continue
            fallbacks += 1
            top, left, height, width = chosen[view, row].tolist()
            assert [height, width] <= boxes[view, row, -1, 2:].tolist()
            assert 0 <= top <= 64 - height and 0 <= left <= 80 - width
            # About a pixel at the corner of the structure even the smallest box may hold little over a quarter.
            share = _shares(foreground[row], chosen[view, row][None])[0]
            short += share < 0.3007
            assert share >= 0.25
    assert 20 < fallbacks < 380 and short <= fallbacks / 50


def _near_empty() -> Tensor:
    """Slices with as little brain as ingest lets through (5 %), and with less: discs, a ring, lines, one pixel."""
    y, x = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")

    def disc(row: int, column: int, radius: float) -> Tensor:
        return (y - row) ** 2 + (x - column) ** 2 < radius**2

    slices = [disc(112, 112, 28), disc(12, 210, 28), disc(30, 30, 14) | disc(190, 200, 14), disc(100, 100, 5)]
    slices += [disc(112, 112, 60) & ~disc(112, 112, 55), (x == 3) | (y == 220), disc(0, 0, 1)]
    return torch.stack(slices)


def test_near_empty_slices_give_the_declared_share_where_it_can_be_had_and_never_a_blank() -> None:
    foreground = _near_empty().repeat_interleave(20, dim=0)
    rows = np.arange(len(foreground))
    boxes = torch.from_numpy(crops.sample(rows, 0, 0, CropSpec()).local_views.boxes)
    pixel = torch.rand(8, len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen = crops.choose_boxes(crops.survey(foreground), boxes, pixel, 0.3)
    shares = np.array([[_shares(foreground[r], chosen[v, r][None])[0] for r in rows] for v in range(8)])
    assert shares.min() > 0
    assert shares[:, : 20 * 5].min() >= 0.3  # thinner than the smallest box: the last two can't
    sides = chosen[:, :, 2:]
    assert sides.min() >= 4 and (sides.float().mean(dim=(0, 2))[:20] > 30).all()  # no smaller than need be


def test_no_view_of_a_near_empty_slice_is_blank() -> None:
    stacks = _near_empty().repeat_interleave(6, dim=0)[:, None, None].expand(-1, 3, 1, -1, -1).byte() * 200
    spec = dataclasses.replace(SPEC, num_local=8, contrast_dropout=0.5)
    params = crops.sample(np.arange(len(stacks)), 0, 0, spec)
    for views in crops.apply(stacks, torch.ones(len(stacks), 3, dtype=torch.bool), params, spec):
        assert views.flatten(2).any(dim=-1).all()


def test_a_view_is_blank_in_no_contrast_that_is_left() -> None:
    """Contrasts with brain in different places: what dropout leaves must be seen in the view."""
    stacks = torch.zeros(40, 3, 1, 64, 64, dtype=torch.uint8)
    stacks[:, 0, :, 4:20, 4:20] = 100
    stacks[:, 1, :, 40:60, 40:60] = 100
    present = torch.ones(40, 3, dtype=torch.bool)
    spec = dataclasses.replace(SPEC, contrast_dropout=0.9, num_local=8)
    for views in crops.apply(stacks, present, crops.sample(np.arange(40), 0, 0, spec, size=(64, 64)), spec):
        assert views.flatten(2).any(dim=-1).all()
        assert not views[:, :, 2].any()


def test_left_and_right_may_change_places_up_and_down_may_not() -> None:
    """Rows of a stack run from front to back, columns from side to side (`volume/slices.py`)."""
    stacks = torch.zeros(64, 1, 1, 64, 64, dtype=torch.uint8)
    stacks[:, 0, 0, 8:24, 10:54] = 100  # in front
    stacks[:, 0, 0, 8:56, 10:20] = 200  # on one side
    spec = dataclasses.replace(PLAIN, global_scale=(1.0, 1.0), aspect=(1.0, 1.0), flip_probability=0.5)
    params = crops.sample(np.arange(64), 0, 0, spec, contrasts=1, size=(64, 64))
    views, _ = crops.apply(stacks, torch.ones(64, 1, dtype=torch.bool), params, spec)
    halves = views[:, :, 0]
    assert (halves[:, :, :28].sum(dim=(2, 3)) > halves[:, :, 28:].sum(dim=(2, 3))).all()
    flipped = halves[..., 28:].sum(dim=(2, 3)) > halves[..., :28].sum(dim=(2, 3))
    assert 0.35 < flipped.float().mean() < 0.65
    assert np.array_equal(flipped.numpy(), params.global_views.flip)


def test_an_empty_slice_gives_empty_views() -> None:
    stacks, present = _stacks(2)
    stacks[:] = 0
    for views in crops.apply(stacks, present, crops.sample(np.arange(2), 0, 0, SPEC, size=SIZE), SPEC):
        assert not views.any()


def test_no_local_views_and_wrong_stacks() -> None:
    stacks, present = _stacks(2)
    spec = dataclasses.replace(SPEC, num_local=0)
    params = crops.sample(np.arange(2), 0, 0, spec, size=SIZE)
    assert crops.apply(stacks, present, params, spec)[1].shape == (0, 2, 3, 28, 28)
    with pytest.raises(ValueError, match="uint8"):
        crops.apply(stacks.float(), present, params, spec)
