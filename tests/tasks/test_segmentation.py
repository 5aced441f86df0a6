from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cranium.tasks import metrics, segmentation
from cranium.tasks.metrics import Undefined

CARD = ("necrosis", "oedema", "nonenhancing", "enhancing")


def how(**more: float) -> segmentation.Fit:
    fields = {"steps": 20, "batch_size": 4, "weight_decay": 0.0, "warmup": 0.1, "foreground": 0.5, "seed": 0}
    return segmentation.Fit(**(fields | more))  # type: ignore[arg-type]


def test_a_tasks_classes_are_unions_of_the_cards() -> None:
    table = segmentation.lookup({"core": ("necrosis", "enhancing"), "oedema": ("oedema",)}, CARD)
    assert table[:5].tolist() == [0, 1, 2, 0, 1] and not table[5:].any()
    with pytest.raises(ValueError, match="'edema' is no class of the card; it has necrosis, oedema"):
        segmentation.lookup({"edema": ("edema",)}, CARD)
    with pytest.raises(ValueError, match="'oedema' is in 'a' and in 'b'"):
        segmentation.lookup({"a": ("oedema",), "b": ("oedema", "necrosis")}, CARD)


def test_batches_hold_foreground_as_declared_and_every_row_once_a_round() -> None:
    foreground = np.zeros(100, bool)
    foreground[:10] = True
    drawn = list(segmentation.batches(foreground, how(steps=45, batch_size=4, foreground=0.5)))
    assert [int(foreground[rows].sum()) for rows in drawn] == [2] * 45
    flat = np.concatenate(drawn)
    assert sorted(flat[flat >= 10]) == list(range(10, 100))  # 90 draws of 90 rows
    assert np.bincount(flat[flat < 10]).tolist() == [9] * 10
    third = [foreground[r].sum() for r in segmentation.batches(foreground, how(steps=8, foreground=1 / 3))]
    assert sum(third) == 11 and set(third) == {1, 2}  # 8 x 4 / 3
    again = segmentation.batches(foreground, how(steps=45, batch_size=4, foreground=0.5))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_where_every_row_has_foreground_all_are_drawn_and_none_is_refused() -> None:
    rows = np.concatenate(list(segmentation.batches(np.ones(8, bool), how(steps=2, batch_size=4))))
    assert sorted(rows) == list(range(8))
    with pytest.raises(ValueError, match="no slice of the training subjects"):
        next(segmentation.batches(np.zeros(8, bool), how()))


def test_the_loss_is_dice_of_the_batch_and_cross_entropy() -> None:
    """The first step's loss against the formulas: nothing has moved yet."""
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(size=(4, 3, 6, 6)).astype(np.float32))
    labels = rng.integers(0, 3, (4, 6, 6)).astype(np.uint8)
    offset = torch.zeros(3, requires_grad=True)
    (first,) = segmentation.fit(
        lambda _, rows: (scores[rows] + offset[:, None, None], torch.from_numpy(labels[rows])),
        np.ones(4, bool),
        [{"params": [offset], "lr": 1e-3}],
        how(steps=1, batch_size=4),
    )
    p = np.exp(scores.numpy()) / np.exp(scores.numpy()).sum(1, keepdims=True)
    entropy = -np.log(np.take_along_axis(p, labels[:, None].astype(int), 1)).mean()
    dices = [2 * (p[:, k] * (labels == k)).sum() / (p[:, k].sum() + (labels == k).sum()) for k in (1, 2)]
    assert first == pytest.approx(1 - np.mean(dices) + entropy, abs=1e-5)


def test_a_fit_learns_and_its_rate_ends_near_zero() -> None:
    torch.manual_seed(0)
    labels = np.zeros((6, 8, 8), np.uint8)
    labels[:3, 2:5, 2:5] = 1
    inputs = torch.from_numpy(labels.astype(np.float32))[:, None]
    layer = torch.nn.Conv2d(1, 2, 1)
    losses = segmentation.fit(
        lambda _, rows: (layer(inputs[rows]), torch.from_numpy(labels[rows])),
        labels.any(axis=(1, 2)),
        [{"params": list(layer.parameters()), "lr": 0.3}],
        how(steps=60),
    )
    assert np.mean(losses[-5:]) < 0.25 * losses[0]
    rates = [segmentation.schedule(step, 100, 0.1) for step in range(100)]
    assert max(rates) == rates[10] == 1.0 and rates[0] == pytest.approx(1 / 11) and rates[-1] < 1e-3
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_surface_dice_in_closed_form_and_against_monai() -> None:
    """Two planes of voxels two apart along an axis of 1.5 mm: 3 mm, in or out of the tolerance."""
    a, b = np.zeros((9, 6, 6), bool), np.zeros((9, 6, 6), bool)
    a[2], b[4] = True, True
    assert metrics.surface_dice(a, b, (1.5, 1, 1), 3.0) == 1.0
    assert metrics.surface_dice(a, b, (1.5, 1, 1), 2.9) == 0.0
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    rng = np.random.default_rng(1)
    spacing = (3.0, 1.0, 0.5)
    for tolerance in (0.5, 1.0, 2.0):
        x, y = rng.random((8, 9, 10)) > 0.6, rng.random((8, 9, 10)) > 0.8
        x[:2], y[:, :3] = False, False  # the union does not fill the image
        one, other = (torch.from_numpy(m)[None, None].float() for m in (x, y))
        theirs = compute_surface_dice(one, other, [tolerance], include_background=True, spacing=spacing)
        assert metrics.surface_dice(x, y, spacing, tolerance) == pytest.approx(float(theirs), abs=1e-6)
        far = compute_hausdorff_distance(one, other, include_background=True, percentile=95, spacing=spacing)
        assert metrics.hd95(x, y, spacing) == pytest.approx(float(far), rel=1e-6)


def test_a_subject_is_scored_by_class_and_by_union_and_a_miss_stays_in() -> None:
    truth, found = np.zeros((10, 10, 4), np.uint8), np.zeros((10, 10, 4), np.uint8)
    truth[1:3, 1:3, 1], truth[5:7, 5:7, 1] = 1, 2
    found[1:3, 1:3, 1] = 2  # the right place, the wrong class
    affine = np.diag([2.0, 2.0, 5.0, 1.0])
    rows = segmentation.scored(truth, found, {"a": (1,), "b": (2,), "c": (3,), "all": (1, 2)}, affine, 2.0)
    a, b, c, whole = rows
    diagonal = float(np.sqrt(18**2 + 18**2 + 15**2))
    assert (a["dice"], a["surface_dice"], a["missed"]) == (0.0, 0.0, True)
    assert a["hd95_mm"] == pytest.approx(diagonal)
    assert a["truth_ml"] == pytest.approx(4 * 20 / 1000) and a["predicted_ml"] == 0
    assert b["dice"] == 0.0 and not b["missed"]
    assert c["dice"] is None and "nothing to find" in c["undefined"] and not c["missed"]
    assert whole["dice"] == pytest.approx(2 * 4 / 12) and whole["undefined"] == ""


def test_all_metrics_at_once_are_the_single_ones() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.random((6, 7, 8)) > 0.7, rng.random((6, 7, 8)) > 0.7
    spacing = (1.0, 2.0, 0.7)
    assert metrics.segmentation_metrics(x, y, spacing, 1.0) == {
        "dice": metrics.dice(x, y),
        "hd95_mm": metrics.hd95(x, y, spacing),
        "surface_dice": metrics.surface_dice(x, y, spacing, 1.0),
    }
    empty = np.zeros_like(x)
    assert all(
        isinstance(v, Undefined) for v in metrics.segmentation_metrics(empty, empty, spacing, 1.0).values()
    )
