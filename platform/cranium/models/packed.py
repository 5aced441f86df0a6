"""A backbone over views of all sizes at once, up to the tokens that are wanted.

The numbers of `Backbone.forward`, at less cost: all tokens are rows of one matrix, so a layer is one product;
LayerScale is a factor of the weights, not of every token; and in the last block, what is not wanted goes no further
than attention. Another order of the same sums, so equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cranium.models.vit import Backbone

Sizes = list[tuple[int, int]]
"""Of each view size: sequences, and tokens in one."""


def tokens(
    backbone: Backbone,
    images: Sequence[Tensor],
    masks: Tensor | None,
    keep: Sequence[Tensor | None],
    wanted: Tensor,
) -> Tensor:
    """Normed tokens [n, D] of `images`, each [B, C*S, H, W]: the rows `wanted` [n] of all their tokens in turn.

    An image's tokens are its prefix (CLS first), then its patches. `masks` are those of the first size; `keep` has one
    entry a size. Both as in `Backbone.forward`.
    """
    embedded = [backbone.embed(x, masks if i == 0 else None) for i, x in enumerate(images)]
    sizes = [(x.shape[0], x.shape[1]) for x in embedded]
    x = torch.cat([part.flatten(0, 1) for part in embedded])
    blocks, scale = backbone.vit.blocks, 1.0 / (1.0 - backbone.drop_path)
    for index, block in enumerate(blocks[:-1]):
        rows, kept = _kept(sizes, keep, 2 * index, x.device)
        x = _added(x, rows, _attention(block, x if rows is None else x[rows], kept), scale)
        rows, _ = _kept(sizes, keep, 2 * index + 1, x.device)
        x = _added(x, rows, _mlp(block, x if rows is None else x[rows]), scale)
    last, x_wanted = blocks[-1], x[wanted]
    first, second = (_weights(sizes, keep, branch, scale, wanted, x.dtype) for branch in (-2, -1))
    attended = _projected(last, _attended(last, x, sizes)[wanted])
    x = x_wanted + (attended if first is None else attended * first)
    x = x + (_mlp(last, x) if second is None else _mlp(last, x) * second)
    normed: Tensor = backbone.vit.norm(x)
    return normed


def _attention(block: Block, x: Tensor, sizes: Sizes) -> Tensor:
    return _projected(block, _attended(block, x, sizes))


def _attended(block: Block, x: Tensor, sizes: Sizes) -> Tensor:
    """What every token [T, D] gathers from those of its own sequence, before the projection."""
    qkv = block.attn.qkv(block.norm1(x))
    heads, head_dim, out = block.attn.num_heads, block.attn.head_dim, []
    for part, (count, length) in zip(qkv.split([b * n for b, n in sizes]), sizes, strict=True):
        q, k, v = part.view(count, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out.append(attend(q, k, v).transpose(1, 2).reshape(count * length, heads * head_dim))
    return torch.cat(out)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v over [B, heads, N, d].

    Written out for bf16 on a CPU, where torch's fused form reaches a fifth of what its matrix products do.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def _projected(block: Block, x: Tensor) -> Tensor:
    return _scaled(block.attn.proj, block.ls1, x)


def _mlp(block: Block, x: Tensor) -> Tensor:
    return _scaled(block.mlp.fc2, block.ls2, block.mlp.act(block.mlp.fc1(block.norm2(x))))


def _scaled(linear: nn.Linear, scale: nn.Module, x: Tensor) -> Tensor:
    """`scale(linear(x))`."""
    gamma = getattr(scale, "gamma", None)
    if gamma is None:  # a network without LayerScale
        return F.linear(x, linear.weight, linear.bias)
    return F.linear(x, linear.weight * gamma[:, None], linear.bias * gamma)


def _added(x: Tensor, rows: Tensor | None, branch: Tensor, scale: float) -> Tensor:
    return x + branch if rows is None else x.index_add(0, rows, branch.to(x.dtype), alpha=scale)


def _kept(
    sizes: Sizes, keep: Sequence[Tensor | None], branch: int, device: torch.device
) -> tuple[Tensor | None, Sizes]:
    """Rows of the tokens whose sequence passes a branch, and how many sequences of each size do.

    None: all, unscaled.
    """
    if all(k is None for k in keep):
        return None, sizes
    rows, kept, start = [], [], 0
    for (count, length), k in zip(sizes, keep, strict=True):
        assert k is not None
        first = start + length * k[branch].nonzero()
        rows.append((first + torch.arange(length)).flatten())
        kept.append((len(first), length))
        start += count * length
    return torch.cat(rows).to(device, non_blocking=True), kept


def _weights(
    sizes: Sizes, keep: Sequence[Tensor | None], branch: int, scale: float, wanted: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Of the last block's branch for each wanted token [n, 1]: `scale` where its sequence is kept, else 0."""
    parts = [
        k[branch].repeat_interleave(length)
        for k, (_, length) in zip(keep, sizes, strict=True)
        if k is not None
    ]
    if not parts:
        return None
    return (torch.cat(parts).to(wanted.device, dtype) * scale)[wanted, None]
