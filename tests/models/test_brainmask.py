"""The brain-mask recipe with stand-in networks; the real ones only where the demo's cache has them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from cranium.models import brainmask


def bright(volume: torch.Tensor) -> torch.Tensor:
    """Stands in for a network: what lies above the mean is brain."""
    return torch.stack([volume[:, 0] <= 0.5, volume[:, 0] > 0.5], 1).float()


@pytest.fixture
def networks() -> brainmask.Networks:
    return brainmask.Networks(bright, bright)


@pytest.fixture
def head() -> np.ndarray:
    volume = np.full((40, 48, 36), 10, np.float32)
    volume[10:30, 12:38, 9:27] = 100
    volume[18:22, 20:26, 15:20] = 10  # a hole: the ventricles
    volume[2:4, 2:4, 2:4] = 100  # not connected: fat
    return volume


def test_mask_is_one_piece_without_holes(head: np.ndarray, networks: brainmask.Networks) -> None:
    expected = np.zeros(head.shape, bool)
    expected[10:30, 12:38, 9:27] = True
    np.testing.assert_array_equal(brainmask.segment(head, np.eye(4), networks), expected)


@pytest.mark.parametrize("axes", ["LAS", "LIA", "PSR"])
def test_mask_lies_on_the_input_grid(head: np.ndarray, networks: brainmask.Networks, axes: str) -> None:
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
    )
    turned = nib.orientations.apply_orientation(head, turn)
    affine = np.eye(4) @ nib.orientations.inv_ornt_aff(turn, head.shape)
    expected = nib.orientations.apply_orientation(brainmask.segment(head, np.eye(4), networks), turn)
    np.testing.assert_array_equal(brainmask.segment(turned, affine, networks), expected)


def test_intensity_scale_does_not_matter(head: np.ndarray, networks: brainmask.Networks) -> None:
    first, second = (brainmask.segment(v, np.eye(4), networks) for v in (head, 37 * head + 5))
    np.testing.assert_array_equal(first, second)


def test_no_brain_is_an_error(networks: brainmask.Networks) -> None:
    nothing = brainmask.Networks(lambda v: torch.zeros(1, 2, *v.shape[2:]), bright)
    with pytest.raises(ValueError, match="no brain"):
        brainmask.segment(np.random.default_rng(0).random((20, 20, 20)), np.eye(4), nothing)
    with pytest.raises(ValueError, match="3-D"):
        brainmask.segment(np.zeros((4, 4, 4, 2)), np.eye(4), networks)


def test_foreign_script_is_refused_unread(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Identity()).save(str(tmp_path / "model.pt"))
    with pytest.raises(ValueError, match="SHA-256"):
        brainmask.load(tmp_path / "model.pt", tmp_path / "model.pt")
