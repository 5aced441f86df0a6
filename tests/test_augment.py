"""Changes of slices: none where none is asked, alike for a subject's slices, and labels that go with the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cranium import augment as changes
from cranium.augment import augment
from cranium.config import Augment

STILL = Augment(flip=0, rotate=0, scale=0, shift=0, gamma=0, contrast=0, bias_field=0, blur=0, noise=0)


def test_no_change_asked_is_no_change_made() -> None:
    x = torch.rand(2, 3, 4, 28, 28)
    torch.testing.assert_close(augment(x, STILL, np.random.default_rng(0)), x, atol=1e-5, rtol=0)


def test_a_flip_is_left_to_right_and_all_slices_of_a_subject_change_alike() -> None:
    x = torch.rand(1, 3, 1, 28, 28).expand(1, 3, 4, 28, 28)
    flipped = augment(x, STILL.model_copy(update={"flip": 1.0}), np.random.default_rng(0))
    torch.testing.assert_close(flipped, x.flip(-1), atol=1e-4, rtol=0)
    moving = Augment(noise=0.0)
    changed = augment(x, moving, np.random.default_rng(0))
    assert not torch.allclose(changed, x, atol=0.05)
    torch.testing.assert_close(changed, changed[:, :, :1].expand_as(changed))


def test_a_shift_and_a_turn_move_the_picture_that_far() -> None:
    x = torch.zeros(1, 1, 1, 28, 28)
    x[..., 10:14, 10:14] = 1.0
    rng = np.random.default_rng(5)
    drawn = np.random.default_rng(5)
    drawn.uniform(-1, 1, 2)  # angle and scale
    dx, dy = 2 * 0.2 * drawn.uniform(-1, 1, (1, 2))[0] * 28 / 2
    moved = augment(x, STILL.model_copy(update={"shift": 0.2}), rng)[0, 0, 0]
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    centre = [float((moved * of).sum() / moved.sum()) for of in (columns, rows)]
    assert centre == pytest.approx([11.5 - dx, 11.5 - dy], abs=0.05)


def test_labels_move_with_the_pixels_that_they_are_drawn_on() -> None:
    """A bright square and its label: after any move the label lies where the square does, and the pixels are the same
    as without labels.
    """
    x, labels = torch.zeros(16, 1, 1, 56, 56), torch.zeros(16, 56, 56, dtype=torch.uint8)
    x[..., 12:24, 30:46], labels[:, 12:24, 30:46] = 1.0, 3
    moving = STILL.model_copy(update={"flip": 0.5, "rotate": 20.0, "scale": 0.2, "shift": 0.1})
    pictures, drawn = changes.with_labels(x, labels, moving, np.random.default_rng(2))
    torch.testing.assert_close(pictures, augment(x, moving, np.random.default_rng(2)), atol=0, rtol=0)
    assert drawn.dtype == torch.uint8 and set(drawn.unique().tolist()) == {0, 3}
    bright = pictures[:, 0, 0] > 0.5
    overlap = (bright & (drawn == 3)).sum((1, 2)) * 2 / (bright.sum((1, 2)) + (drawn == 3).sum((1, 2)))
    assert float(overlap.min()) > 0.97  # a border pixel is nearest to one side or half of it
    assert (bright != (x[:, 0, 0] > 0.5)).any(dim=(1, 2)).all()  # each of them has moved


def test_what_comes_in_from_outside_is_background() -> None:
    x, labels = torch.ones(1, 1, 1, 28, 28), torch.ones(1, 28, 28, dtype=torch.uint8)
    moving = STILL.model_copy(update={"shift": 0.4})
    pictures, drawn = changes.with_labels(x, labels, moving, np.random.default_rng(1))
    assert 0.2 < float((drawn == 0).float().mean()) < 0.9
    assert bool((pictures[0, 0, 0][drawn[0] == 0] < 0.51).all())
