"""Changes of slices while a network learns from them, and of the labels drawn on them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cranium.config import Augment
from cranium.dinov2 import intensity


def augment(x: Tensor, spec: Augment, rng: np.random.Generator) -> Tensor:
    """Change `x` [n, C, k, H, W] in 0..1 (a subject's k slices alike): flip, turn, scale, shift, then intensities.

    Its last axis is left to right, as in RAS.
    """
    return _changed(x, _placements(len(x), spec, rng), spec, rng)


def with_labels(x: Tensor, labels: Tensor, spec: Augment, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """`x` [n, C, k, H, W] changed as `augment` does, and its `labels` [n, H, W] uint8 moved with it.

    A label is that of the nearest pixel; what comes in from outside is background.
    """
    placements = _placements(len(x), spec, rng)
    moved = _moved(labels[:, None].to(x.dtype), placements, "nearest")[:, 0]
    return _changed(x, placements, spec, rng), moved.round().to(labels.dtype)


def _placements(n: int, spec: Augment, rng: np.random.Generator) -> Tensor:
    """Where each pixel of a changed picture is taken from: [n, 2, 3], as `affine_grid` reads it."""
    angle = np.deg2rad(spec.rotate) * rng.uniform(-1, 1, n)
    scale = 1 + spec.scale * rng.uniform(-1, 1, n)
    shift = 2 * spec.shift * rng.uniform(-1, 1, (n, 2))
    mirror = np.where(rng.random(n) < spec.flip, -1.0, 1.0)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    rows = [np.stack([mirror * cos, -sin, shift[:, 0]], 1), np.stack([mirror * sin, cos, shift[:, 1]], 1)]
    return torch.from_numpy(np.stack(rows, 1))


def _changed(x: Tensor, placements: Tensor, spec: Augment, rng: np.random.Generator) -> Tensor:
    n, channels = x.shape[:2]
    drawn = rng.random((1, n, intensity.num_draws(channels)))
    moved = _moved(x.flatten(1, 2), placements, "bilinear").view(x.shape)
    return intensity.change(
        moved[None],
        intensity.changes(drawn, channels),
        gamma=spec.gamma,
        contrast=spec.contrast,
        bias_field=spec.bias_field,
        blur=spec.blur,
        noise=spec.noise,
    )[0]


def _moved(x: Tensor, placements: Tensor, mode: str) -> Tensor:
    """Pictures [n, C, H, W], zero outside."""
    grid = functional.affine_grid(placements.to(x.device, x.dtype), list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, mode=mode, padding_mode="zeros", align_corners=False)
