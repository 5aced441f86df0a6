"""Vision transformers: timm's, with input statistics, a mask token and explicit stochastic depth."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cranium.models import positions
from cranium.models.architectures import ARCHITECTURES, PositionRule


class Tokens(NamedTuple):
    """A backbone's normed output: `cls` [B, D] and `patches` [B, N, D], row by row from the top left."""

    cls: Tensor
    patches: Tensor


def build(
    arch: str,
    *,
    in_channels: int = 3,
    image_size: int = 224,
    drop_path: float = 0.0,
    position: PositionRule | None = None,
) -> Backbone:
    """Build a randomly initialised backbone; nothing is downloaded.

    `in_channels` is C * S. `image_size` (pixels) sizes the position table of the architectures that have no
    fixed one; any size that the patch size divides may be given to `forward`. `drop_path` is the
    stochastic-depth rate, the same in all blocks. `position` is the rule by which the position table is
    resampled; None: the one the architecture's released weights were made with. Raises ValueError for an unknown
    architecture or an impossible size.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; choose one of {', '.join(ARCHITECTURES)}")
    if in_channels < 1:
        raise ValueError(f"in_channels must be at least 1, got {in_channels}")
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
    spec = ARCHITECTURES[arch]
    table_size = spec.table_size or image_size
    if table_size % spec.patch_size:
        raise ValueError(
            f"image_size {table_size} is not a multiple of {arch}'s patch size {spec.patch_size}"
        )
    options = {"in_chans": in_channels, "img_size": table_size, "num_classes": 0, "dynamic_img_size": True}
    if spec.registers:
        options |= {"reg_tokens": spec.registers, "no_embed_class": True}
    if spec.timm_name is None:
        options |= {"patch_size": spec.patch_size, "embed_dim": spec.dim, "depth": spec.depth}
        vit = VisionTransformer(num_heads=spec.heads, init_values=spec.layer_scale, **options)
    else:
        vit = timm.create_model(spec.timm_name, pretrained=False, **options)
    return Backbone(
        vit, arch=arch, in_channels=in_channels, drop_path=drop_path, position=position or spec.position
    )


class Backbone(nn.Module):
    """A timm vision transformer with what self-distillation needs around it.

    `mean` and `std` [C*S] belong to the weights and are applied to the input; `mask_token` [D] replaces the
    embedding of masked patches (iBOT).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vit: VisionTransformer,
        *,
        arch: str,
        in_channels: int,
        position: PositionRule,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.vit = vit
        self.arch = arch
        self.in_channels = in_channels
        self.drop_path = drop_path
        self.position = position
        self.embed_dim = int(vit.embed_dim)
        self.num_blocks = len(vit.blocks)
        self.patch_size = ARCHITECTURES[arch].patch_size
        self.mask_token = nn.Parameter(torch.zeros(self.embed_dim))
        mean, std = input_statistics(arch, in_channels)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def num_patches(self, size: int) -> int:
        """Number of patches of a square image `size` pixels wide. ValueError if they do not tile it."""
        if size % self.patch_size:
            raise ValueError(f"image size {size} is not a multiple of the patch size {self.patch_size}")
        return int(size // self.patch_size) ** 2

    def forward(self, x: Tensor, masks: Tensor | None = None, keep: Tensor | None = None) -> Tokens:
        """Tokens of `x` [B, C*S, H, W], float in 0..1.

        `masks` [B, N] bool: patches whose embedding is replaced by the mask token. `keep` [2 * num_blocks, B]
        bool (best on the CPU): which rows pass through each residual branch, attention and MLP in turn; a
        kept branch is divided by 1 - drop_path (stochastic depth, Huang et al., 2016). None keeps all and
        divides by nothing.
        """
        x = self._blocks(self.embed(x, masks), range(self.num_blocks), keep)
        return self._tokens(x)

    def at_depths(self, x: Tensor, depths: Sequence[int], keep: Tensor | None = None) -> list[Tokens]:
        """Tokens after each of the blocks `depths` (rising, from 1), all through the last norm, as DINOv2's own
        `get_intermediate_layers` gives them. Blocks after the last one asked for are not run. See `forward`.
        """
        if (
            not depths
            or list(depths) != sorted(set(depths))
            or not 1 <= depths[0] <= depths[-1] <= self.num_blocks
        ):
            raise ValueError(f"depths must rise within 1 to {self.num_blocks}, got {list(depths)}")
        x, found = self.embed(x, None), []
        for first, last in itertools.pairwise((0, *depths)):
            x = self._blocks(x, range(first, last), keep)
            found.append(self._tokens(x))
        return found

    def _blocks(self, x: Tensor, indices: range, keep: Tensor | None) -> Tensor:
        for index in indices:
            block = self.vit.blocks[index]
            first, second = (None, None) if keep is None else (keep[2 * index], keep[2 * index + 1])
            x = self._add(x, lambda y, b=block: b.ls1(b.attn(b.norm1(y))), first)  # type: ignore[misc]
            x = self._add(x, lambda y, b=block: b.ls2(b.mlp(b.norm2(y))), second)  # type: ignore[misc]
        return x

    def _tokens(self, x: Tensor) -> Tokens:
        x = self.vit.norm(x)
        return Tokens(x[:, 0], x[:, self.vit.num_prefix_tokens :])

    def embed(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens [B, prefix + N, D] that enter the first block; `x` and `masks` as in `forward`."""
        x = (x - self.mean[:, None, None]) / self.std[:, None, None]
        x = self.vit.patch_embed(x)
        if masks is not None:
            token = self.mask_token.to(x.dtype)
            x = torch.where(masks.view(*x.shape[:3], 1), token, x)
        embedded: Tensor = self.vit.norm_pre(self._with_positions(x))
        return embedded

    @property
    def num_prefix(self) -> int:
        """Entries of the position table before those of the patches."""
        return 0 if self.vit.no_embed_class else int(self.vit.num_prefix_tokens)

    def _with_positions(self, x: Tensor) -> Tensor:
        """Patches [B, rows, columns, D] with their positions, after the CLS token and the registers."""
        vit, grid = self.vit, (int(x.shape[1]), int(x.shape[2]))
        table = positions.resample(vit.pos_embed, self.num_prefix, grid, self.position)
        prefix = [t.expand(len(x), -1, -1) for t in (vit.cls_token, vit.reg_token) if t is not None]
        x = x.flatten(1, 2)
        if vit.no_embed_class:
            return torch.cat([*prefix, x + table], dim=1)
        return torch.cat([*prefix, x], dim=1) + table

    def _add(self, x: Tensor, branch: Callable[[Tensor], Tensor], keep: Tensor | None) -> Tensor:
        """Add a residual branch to the kept rows only: dropped rows cost nothing."""
        if keep is None or bool(keep.all()):
            scale = 1.0 if keep is None else 1.0 / (1.0 - self.drop_path)
            return x + branch(x) * scale if scale != 1.0 else x + branch(x)
        rows = keep.nonzero()[:, 0].to(x.device)
        if not len(rows):
            # One row at weight zero: the branch's parameters still get a (zero) gradient, as data parallelism
            # needs.
            return x + 0.0 * branch(x[:1])
        return x.index_add(0, rows, branch(x[rows]).to(x.dtype), alpha=1.0 / (1.0 - self.drop_path))


def input_statistics(arch: str, in_channels: int) -> tuple[Tensor, Tensor]:
    """Mean and std [in_channels] that go with `weights.inflate_patch_embedding`.

    A multiple of three channels repeats the RGB statistics; any other number uses their grey average.
    """
    mean, std = (torch.tensor(values) for values in ARCHITECTURES[arch].statistics)
    if in_channels % 3:
        return mean.mean().repeat(in_channels), std.mean().repeat(in_channels)
    return mean.repeat(in_channels // 3), std.repeat(in_channels // 3)
