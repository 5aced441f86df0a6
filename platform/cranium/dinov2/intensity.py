"""MRI intensity changes of views: blur, gamma, bias field, contrast, noise. Zero stays exactly zero."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
_ORDER = 3
_TILE = 512
_REACH = 5.5
"""Standard deviations, beyond which a Gaussian is below 3e-7 of its peak."""
_SPARSE = 20
"""Pixels of a view for each one of reach, above which neighbours are gathered rather than multiplied."""


@dataclass(frozen=True)
class Changes:
    """Uniform draws for V views, B rows, C contrasts; the strengths come with `change`."""

    blur: Array
    """[V, B]"""
    gamma: Array
    """[V, B, C]"""
    contrast: Array
    """[V, B, C]"""
    noise: Array
    """[V, B, C, 3]: strength, and place in the noise tile."""
    bias: Array
    """[V, B, C, 3, 3]: coefficients of cosines."""

    def of(self, rows: slice) -> Changes:
        """Those of some rows of the batch."""
        return Changes(*(a[:, rows] for a in (self.blur, self.gamma, self.contrast, self.noise, self.bias)))


def num_draws(contrasts: int) -> int:
    """Uniform numbers that one view of one row needs."""
    return 1 + contrasts * (5 + _ORDER * _ORDER)


def changes(drawn: Array, contrasts: int) -> Changes:
    """Lay out uniform draws [V, B, num_draws]."""
    each = drawn[..., 1:].reshape(*drawn.shape[:2], contrasts, 5 + _ORDER * _ORDER)
    return Changes(
        blur=drawn[..., 0],
        gamma=each[..., 0],
        contrast=each[..., 1],
        noise=each[..., 2:5],
        bias=each[..., 5:].reshape(*each.shape[:3], _ORDER, _ORDER),
    )


def change(
    views: Tensor,
    drawn: Changes,
    *,
    gamma: float,
    contrast: float,
    bias_field: float,
    blur: float,
    noise: float,
) -> Tensor:
    """Change `views` [V, B, C, S, g, g] in 0..1 in place, a contrast's slices alike; return them."""
    foreground = views.sign()  # 0 or 1, at a tenth of a comparison's cost on a CPU
    x = views

    def draws(values: Array) -> Tensor:
        return torch.from_numpy(values).to(views.device, torch.float32)

    if blur:
        _blur(x.flatten(0, 1), (2.0 * drawn.blur.ravel() - 1.0) * blur)
        x.mul_(foreground)
    if gamma or bias_field:
        exponent = torch.exp((2.0 * draws(drawn.gamma) - 1.0) * gamma)[..., None, None, None]
        field = _bias_field((2.0 * draws(drawn.bias) - 1.0) * bias_field, views.shape[-1])[:, :, :, None]
        # x ** exponent * exp(field). Zeros are lifted first, as log(0) is many times slower, and so is a power too
        # small for a normal number; they are masked at the end.
        x.clamp_(min=1e-12).log_().mul_(exponent).add_(field).exp_()
    if contrast:
        factor = (1.0 + (2.0 * draws(drawn.contrast) - 1.0) * contrast)[..., None, None, None]
        mean = x.sum(dim=(3, 4, 5), keepdim=True) / foreground.sum(dim=(3, 4, 5), keepdim=True).clamp(min=1.0)
        x.mul_(factor).add_(mean * (1.0 - factor))
    if noise:
        sigma = (2.0 * draws(drawn.noise[..., 0]) - 1.0).clamp(min=0.0) * noise
        x.addcmul_(_noise(draws(drawn.noise[..., 1:]), x.shape[3], x.shape[-1]), sigma[..., None, None, None])
    return x.clamp_(0.0, 1.0).mul_(foreground)


def _blur(x: Tensor, sigma: Array) -> None:
    """Gaussian blur of `x` [n, C, S, g, g], in place, where `sigma` [n] (pixels) is positive."""
    rows = np.flatnonzero(sigma > 0)
    if not len(rows):
        return
    index = torch.from_numpy(rows).to(x.device)
    width = torch.from_numpy(sigma[rows].astype(np.float32)).to(x.device).clamp(min=1e-3)
    reach = math.ceil(_REACH * sigma.max())
    if x.device.type == "cpu" and x.shape[-1] > _SPARSE * reach:
        x.index_copy_(0, index, _tapped(x.index_select(0, index), width, reach))
        return
    place = torch.arange(x.shape[-1], device=x.device, dtype=torch.float32)
    kernel = torch.exp(-(place[:, None] - place).square() / (2.0 * width.square())[:, None, None])
    kernel = kernel / kernel.sum(dim=-1, keepdim=True)
    size = x.shape[-1]
    y = torch.bmm(x.index_select(0, index).view(len(rows), -1, size), kernel.transpose(1, 2))
    y = torch.matmul(kernel[:, None], y.view(len(rows), -1, size, size))
    x.index_copy_(0, index, y.view(len(rows), *x.shape[1:]))


def _tapped(x: Tensor, width: Tensor, reach: int) -> Tensor:
    """The same from `reach` neighbours on either side: cheaper than a product with a matrix of nearly all zeros."""
    offsets = torch.arange(reach + 1, dtype=torch.float32)
    taps = torch.exp(-offsets.square() / (2.0 * width.square())[:, None]).view(-1, reach + 1, 1, 1, 1, 1)
    size = x.shape[-1]
    for axis in (3, 4):
        ones = F.pad(torch.ones(len(x), size), (reach, reach))
        padded = F.pad(x, (reach, reach) if axis == 4 else (0, 0, reach, reach))
        total, weight = x * taps[:, 0], torch.ones(len(x), size)
        for k in range(1, reach + 1):
            near, far = (padded.narrow(axis, reach + side, size) for side in (-k, k))
            total.addcmul_(near + far, taps[:, k])
            inside = ones.narrow(1, reach - k, size) + ones.narrow(1, reach + k, size)
            weight.addcmul_(inside, taps[:, k].view(-1, 1))
        # At the edge, weights that fall outside are shared by the rest.
        x = total.div_(weight.view(-1, 1, 1, *((1, size) if axis == 4 else (size, 1))))
    return x


def _bias_field(coefficients: Tensor, size: int) -> Tensor:
    """Log field [V, B, C, g, g]: a sum of low cosines less the constant, coefficients [V, B, C, 3, 3]."""
    place = (torch.arange(size, device=coefficients.device, dtype=torch.float32) + 0.5) / size
    order = torch.arange(_ORDER, device=coefficients.device, dtype=torch.float32)
    basis = torch.cos(torch.pi * order[:, None] * place)
    varying = coefficients.clone()
    varying[..., 0, 0] = 0.0
    # Nine terms: the range is kept near the largest coefficient.
    return basis.T @ (varying / _ORDER) @ basis


def _noise(offsets: Tensor, slices: int, size: int) -> Tensor:
    """Standard normal noise [V, B, C, S, g, g]: windows of a fixed tile at `offsets` [V, B, C, 2] in [0, 1).

    A tile, as drawing millions of keyed numbers per step on the host would cost more than the rest of the
    views.
    """
    room = _TILE - size + 1
    lines = _tile(offsets.device).view(-1).unfold(0, size, 1)
    start = (offsets * room).long().clamp(max=room - 1)
    shift = torch.arange(slices, device=offsets.device) * (room // slices)
    top = (start[..., 0:1] + shift) % room
    place = (top[..., None] + torch.arange(size, device=offsets.device)) * _TILE + start[..., 1:2, None]
    return lines.index_select(0, place.flatten()).view(*place.shape, size)


@functools.cache
def _tile(device: torch.device) -> Tensor:
    random = np.random.Generator(np.random.Philox(key=0))
    return torch.from_numpy(random.standard_normal((_TILE, _TILE), dtype=np.float32)).to(device)
