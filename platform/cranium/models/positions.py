"""Position tables at other grids. Popular codes differ, so the rule has a name and travels with the weights.

| rule | by | bicubic with |
|---|---|---|
| `dinov2` | the official models without registers | no antialiasing, scale factors of (patches + 0.1) / side |
| `timm` | timm; the official models with registers; transformers' with registers | antialiasing |
| `transformers` | transformers' `Dinov2Model` | neither |
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cranium.models.architectures import PositionRule

OFFSET = 0.1
"""Patches that the official code adds against rounding in the scale; the released features depend on it."""


def resample(table: Tensor, num_prefix: int, grid: tuple[int, int], rule: PositionRule) -> Tensor:
    """A table [1, num_prefix + side**2, D] at `grid` (rows, columns): [1, num_prefix + rows * columns, D].

    The prefix entries stay as they are; at the table's own grid so does all of it. Computed in fp32 or better.
    Raises ValueError when the entries are not a prefix and a square.
    """
    side = math.isqrt(max(table.shape[1] - num_prefix, 0))
    if side < 1 or side * side + num_prefix != table.shape[1]:
        raise ValueError(f"{table.shape[1]} positions are not {num_prefix} prefix entries and a square grid")
    if (side, side) == grid:
        return table
    precise = torch.promote_types(table.dtype, torch.float32)
    image = table[:, num_prefix:].to(precise).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    match rule:
        case "dinov2":
            scale = [(count + OFFSET) / side for count in grid]
            image = F.interpolate(image, scale_factor=scale, mode="bicubic")
        case "timm":
            image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
        case "transformers":
            image = F.interpolate(image, size=grid, mode="bicubic")
    patches = image.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
    return torch.cat([table[:, :num_prefix], patches.to(table.dtype)], dim=1)
