"""Attention over sequences of several lengths in one matrix, and the row operations beside it."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

unbind = torch.unbind


class BlockDiagonalMask:
    """Which tokens of one long row belong together: `groups` of (sequences, tokens in one)."""

    def __init__(self, groups: Sequence[tuple[int, int]]) -> None:
        self.groups = list(groups)
        self._batch_sizes = None  # set by dinov2

    @classmethod
    def from_seqlens(cls, lengths: Sequence[int]) -> BlockDiagonalMask:
        groups: list[tuple[int, int]] = []
        for length in lengths:
            if groups and groups[-1][1] == length:
                groups[-1] = (groups[-1][0] + 1, length)
            else:
                groups.append((1, length))
        return cls(groups)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        joined = torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], 1)
        return cls([(x.shape[0], x.shape[1]) for x in tensors]), joined

    def split(self, x: Tensor) -> list[Tensor]:
        parts = x.split([count * length for count, length in self.groups], 1)
        return [part.reshape(*group, *x.shape[2:]) for part, group in zip(parts, self.groups, strict=True)]


def memory_efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: BlockDiagonalMask | None = None
) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    if attn_bias is None:
        return attend(q, k, v)
    parts = zip(*(attn_bias.split(x) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*part).reshape(1, -1, *q.shape[2:]) for part in parts], 1)


def index_select_cat(tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    return torch.cat([x[index].flatten() for x, index in zip(tensors, indices, strict=True)])


def scaled_index_add(
    x: Tensor, index: Tensor, source: Tensor, scaling: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    return torch.index_add(x, 0, index, source if scaling is None else source * scaling, alpha=alpha)


fmha = types.ModuleType("xformers.ops.fmha")
fmha.BlockDiagonalMask = BlockDiagonalMask  # type: ignore[attr-defined]
sys.modules["xformers.ops.fmha"] = fmha
