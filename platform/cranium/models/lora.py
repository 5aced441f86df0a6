"""Low-rank updates of a transformer's attention (Hu et al. 2021): its own weights stay as they are."""

from __future__ import annotations

import math
from typing import cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class LowRank(nn.Module):
    """A frozen linear layer plus `alpha / rank` times B A; B starts at zero, so the layer starts as it was."""

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.scale = alpha / rank
        self.down = nn.Parameter(frozen.weight.new_empty(rank, frozen.in_features))
        self.up = nn.Parameter(frozen.weight.new_zeros(frozen.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        update = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        out: Tensor = self.frozen(x) + self.scale * update
        return out


def add(vit: VisionTransformer, rank: int, alpha: float, seed: int = 0) -> None:
    """Freeze `vit` and let low-rank updates of `qkv` and `proj` of every block be learnt."""
    vit.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in vit.blocks:
            for name in ("qkv", "proj"):
                layer = cast(nn.Linear, getattr(block.attn, name))
                setattr(block.attn, name, LowRank(layer, rank, alpha))
