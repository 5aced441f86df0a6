"""Light decoders: from a vision transformer's patch tokens to class scores of every pixel.

Neither sees the image itself, so what they find is what the tokens hold. Tokens come as [L, B, N, D]: L depths of the
transformer, N = rows x columns of a square grid of patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Kind = Literal["linear", "conv"]
STAGES = 2  # of the convolutional decoder: each doubles the resolution; the rest of the way is bilinear


def depths(count: int, num_blocks: int) -> tuple[int, ...]:
    """`count` blocks (from 1) spread evenly, the last among them: of 12 blocks 1 is (12,), 4 are (3, 6, 9, 12)."""
    if not 1 <= count <= num_blocks:
        raise ValueError(f"{num_blocks} blocks have no {count} depths")
    return tuple(round(num_blocks * k / count) for k in range(1, count + 1))


def build(kind: Kind, *, dim: int, num_depths: int, num_classes: int, width: int) -> nn.Module:
    """A decoder of `num_depths` x `dim` features to `num_classes` scores; `width` is that of `conv`."""
    if num_classes < 2:
        raise ValueError(f"a decoder needs two classes, background being one, got {num_classes}")
    if kind == "linear":
        return LinearDecoder(dim * num_depths, num_classes)
    return ConvDecoder(dim, num_depths, num_classes, width)


class LinearDecoder(nn.Module):
    """Batch norm and a 1x1 convolution over the depths' features, then bilinear upsampling: DINOv2's linear
    segmentation head (Oquab et al. 2023, arXiv 2304.07193, section 7.4). The norm has no weights of its own: what they
    can say the convolution says, and a product of two starts with a saddle at 0 in which a rare class got stuck.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, affine=False)
        self.classify = nn.Conv2d(dim, num_classes, 1)

    def forward(self, tokens: Tensor, size: int) -> Tensor:
        """Scores [B, K, size, size] of `tokens` [L, B, N, D]."""
        maps = as_maps(tokens)
        return upsample(self.classify(self.norm(maps.transpose(0, 1).flatten(1, 2))), size)


class ConvDecoder(nn.Module):
    """Multi-level aggregation with progressive upsampling (SETR, Zheng et al. 2021, arXiv 2012.15840): each depth is
    projected and refined, then they are added from the deepest to the shallowest, and convolutions between doublings
    of the resolution draw finer borders than a patch.
    """

    def __init__(self, dim: int, num_depths: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(dim, affine=False), nn.Conv2d(dim, width, 1))
            for _ in range(num_depths)
        )
        self.refine = nn.ModuleList(_convolution(width, width) for _ in range(num_depths))
        widths = [max(8, width >> stage) for stage in range(STAGES + 1)]
        self.stages = nn.ModuleList(_convolution(widths[k], widths[k + 1]) for k in range(STAGES))
        self.classify = nn.Conv2d(widths[-1], num_classes, 1)

    def forward(self, tokens: Tensor, size: int) -> Tensor:
        """Scores [B, K, size, size] of `tokens` [L, B, N, D]."""
        maps = as_maps(tokens)
        x: Tensor | None = None
        for project, refine, level in reversed(list(zip(self.project, self.refine, maps, strict=True))):
            own = project(level)
            x = refine(own if x is None else x + own)
        assert x is not None
        for stage in self.stages:
            x = stage(functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
        return upsample(self.classify(x), size)


def start_at(decoder: nn.Module, shares: Sequence[float]) -> None:
    """Let every pixel start with the classes' shares as its probabilities (Lin et al. 2017, arXiv 1708.02002, section
    3.3): a bias that has to travel there at a decoder's rate is most of what a short training does.
    """
    classify = decoder.classify
    assert isinstance(classify, nn.Conv2d) and classify.bias is not None
    with torch.no_grad():
        classify.weight.zero_()
        classify.bias.copy_(torch.tensor(shares).clamp(min=1e-4).log())


def as_maps(tokens: Tensor) -> Tensor:
    """[L, B, N, D] -> [L, B, D, rows, columns]. Raises ValueError when N is no square."""
    depths, batch, count, dim = tokens.shape
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{count} patches are no square grid")
    return tokens.transpose(2, 3).reshape(depths, batch, dim, side, side)


def upsample(scores: Tensor, size: int) -> Tensor:
    """Bilinear to `size` x `size` pixels; a score belongs to the centre of its square."""
    return functional.interpolate(scores, (size, size), mode="bilinear", align_corners=False)


def _convolution(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.GELU())
