"""Global and local views of slice stacks, made for a whole batch at once on the device that trains.

`sample` draws, on the CPU, all that is random from (seed, step, global row); `apply` is then deterministic.
Geometry is the same for all channels of a view; intensities change per contrast. Background stays exactly
zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cranium.dinov2 import intensity
from cranium.dinov2.draw import Rows, uniforms

Array = NDArray[Any]
_ATTEMPTS = 8
_SHRINKS = 2.0 ** (-np.arange(8) / 2)
"""Sides of the boxes around a foreground pixel that are tried when no random box holds enough foreground."""
_GLOBAL_FOREGROUND = 0.01
"""Share of foreground below which a global view counts as blank."""
_AT_ONCE = 4
"""Rows that a CPU works on together: their views stay in its cache."""
_SMALLEST = 4
"""Pixels a side, below which such a box does not shrink."""


@dataclass(frozen=True)
class CropSpec:
    """Views and their variation. Sizes in pixels, scales as shares of the area; a strength of 0 is off."""

    num_global: int = 2
    global_size: int = 224
    global_scale: tuple[float, float] = (0.32, 1.0)
    num_local: int = 8
    local_size: int = 98
    local_scale: tuple[float, float] = (0.05, 0.32)
    flip_probability: float = 0.5
    gamma: float = 0.3
    """Exponent within exp(+-gamma)."""
    contrast: float = 0.2
    """Distance from the foreground's mean scaled by 1 +- contrast."""
    bias_field: float = 0.2
    """Largest coefficient of a smooth log field."""
    blur: float = 1.0
    """Largest sigma, pixels of the view; on half of the views."""
    noise: float = 0.02
    """Largest standard deviation, of the full range; on half of the contrasts."""
    contrast_dropout: float = 0.1
    """Probability that a view loses a contrast; never its last one."""
    min_foreground: float = 0.3
    """Share of foreground that a local view holds at least; of any foreground at all, a view is never blank."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class ViewParams:
    """Draws for the V views of one size, for B rows and C contrasts."""

    boxes: Array
    """[V, B, attempts, 4] int64: top, left, height, width of candidates; the first acceptable one is used."""
    pixel: Array
    """[V, B] in [0, 1): which foreground pixel to centre on when no candidate is acceptable."""
    flip: Array
    """[V, B] bool: mirror left and right."""
    drop: Array
    """[V, B, C] in [0, 1): a contrast is lost below `contrast_dropout`; the greatest present one never is."""
    changes: intensity.Changes

    def of(self, rows: slice) -> ViewParams:
        """Those of some rows of the batch."""
        boxes, pixel, flip, drop = (a[:, rows] for a in (self.boxes, self.pixel, self.flip, self.drop))
        return ViewParams(boxes, pixel, flip, drop, self.changes.of(rows))


@dataclass(frozen=True)
class CropParams:
    """Draws for one batch."""

    global_views: ViewParams
    local_views: ViewParams


def sample(
    rows: Rows,
    step: int,
    seed: int,
    spec: CropSpec,
    *,
    contrasts: int = 3,
    size: tuple[int, int] = (224, 224),
) -> CropParams:
    """Draw the views of the global row numbers `rows` [B] at `step`; `size` is the slices' (H, W).

    Each row's draws depend on (seed, step, row) only.
    """
    per_view = 4 * _ATTEMPTS + 2 + contrasts + intensity.num_draws(contrasts)
    views = spec.num_global + spec.num_local
    drawn = uniforms(rows, step, seed, "crop", views * per_view)
    drawn = drawn.reshape(len(rows), views, per_view).transpose(1, 0, 2)
    parts = drawn[: spec.num_global], drawn[spec.num_global :]
    return CropParams(
        _view_params(parts[0], spec, spec.global_scale, 1, contrasts, size),
        _view_params(parts[1], spec, spec.local_scale, _ATTEMPTS, contrasts, size),
    )


def apply(stacks: Tensor, present: Tensor, params: CropParams, spec: CropSpec) -> tuple[Tensor, Tensor]:
    """Views [V_g, B, C*S, g, g] and [V_l, B, C*S, l, l], float32 in 0..1, of `stacks` [B, C, S, H, W] uint8.

    `present` [B, C] bool says which contrasts a row has; the others stay zero in all views.
    """
    if stacks.dtype != torch.uint8 or stacks.ndim != 5:
        raise ValueError(f"stacks must be uint8 [B, C, S, H, W], got {stacks.dtype} {tuple(stacks.shape)}")
    present, batch = present.to(stacks.device), len(stacks)
    at_once = _AT_ONCE if stacks.device.type == "cpu" else batch
    asked = (
        (params.global_views, spec.global_size, _GLOBAL_FOREGROUND),
        (params.local_views, spec.local_size, spec.min_foreground),
    )
    channels = stacks.shape[1] * stacks.shape[2]
    made = [
        torch.empty(len(views.pixel), batch, channels, size, size, device=stacks.device)
        for views, size, _ in asked
    ]
    with torch.no_grad(), torch.autocast(stacks.device.type, enabled=False):
        for start in range(0, batch, at_once):
            rows = slice(start, start + at_once)
            pixels = stacks[rows].float().mul_(present[rows, :, None, None, None].float() / 255)
            foreground = survey(pixels.flatten(1, 2).amax(dim=1) > 0)
            for out, (views, size, least) in zip(made, asked, strict=True):
                if len(out):
                    out[:, rows] = _views(
                        pixels, present[rows], foreground, views.of(rows), spec, size, least
                    )
    return made[0], made[1]


def _view_params(
    drawn: Array,
    spec: CropSpec,
    scale: tuple[float, float],
    attempts: int,
    contrasts: int,
    size: tuple[int, int],
) -> ViewParams:
    cuts = np.cumsum([4 * _ATTEMPTS, 1, 1, contrasts])
    boxes, pixel, flip, drop, rest = np.split(drawn, cuts, axis=2)
    boxes = boxes.reshape(*boxes.shape[:2], _ATTEMPTS, 4)[:, :, :attempts]
    return ViewParams(
        boxes=_boxes(boxes, scale, spec.aspect, size),
        pixel=pixel[..., 0],
        flip=flip[..., 0] < spec.flip_probability,
        drop=drop,
        changes=intensity.changes(rest, contrasts),
    )


def _boxes(u: Array, scale: tuple[float, float], aspect: tuple[float, float], size: tuple[int, int]) -> Array:
    """Boxes [..., 4] of whole pixels from uniforms [..., 4]: area even in `scale`, log ratio in `aspect`."""
    limit = np.array(size)
    area = (scale[0] + (scale[1] - scale[0]) * u[..., 0]) * limit.prod()
    ratio = np.exp(math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * u[..., 1])
    sides = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=-1)
    sides = np.clip(np.rint(sides).astype(np.int64), 1, limit)
    corners = (u[..., 2:] * (limit - sides + 1)).astype(np.int64)
    return np.concatenate([corners, sides], axis=-1)


def _views(
    pixels: Tensor,
    present: Tensor,
    foreground: Foreground,
    params: ViewParams,
    spec: CropSpec,
    size: int,
    min_foreground: float,
) -> Tensor:
    batch, contrasts, slices = pixels.shape[:3]
    num_views = len(params.pixel)
    device = pixels.device
    boxes = torch.from_numpy(params.boxes).to(device)
    pixel = torch.from_numpy(params.pixel).to(device)
    box = choose_boxes(foreground, boxes, pixel, min_foreground)
    views = resize(pixels.flatten(1, 2), box, torch.from_numpy(params.flip).to(device), size)
    views = views.view(num_views, batch, contrasts, slices, size, size)
    drop = torch.from_numpy(params.drop).to(device)
    # A contrast that is blank in this view can't stand for those that are dropped.
    seen = present & (views.flatten(3).amax(dim=-1) > 0)
    kept = keep_contrasts(seen, drop, spec.contrast_dropout)
    views.mul_(kept[..., None, None, None].to(views.dtype))
    intensity.change(
        views,
        params.changes,
        gamma=spec.gamma,
        contrast=spec.contrast,
        bias_field=spec.bias_field,
        blur=spec.blur,
        noise=spec.noise,
    )
    return views.flatten(2, 3)


def keep_contrasts(present: Tensor, drop: Tensor, probability: float) -> Tensor:
    """Contrasts [V, B, C] bool that remain: `present` [V, B, C] or [B, C], not dropped, always one of the present."""
    drop = torch.where(present, drop, -1.0)
    luckiest = F.one_hot(drop.argmax(dim=-1), drop.shape[-1]).bool()
    return present & ((drop >= probability) | luckiest)


class Foreground(NamedTuple):
    """Where there is something to see in B slices, in the forms that answer quickly."""

    table: Tensor
    """[B, H + 1, W + 1] int32: pixels above and left of a corner (a summed-area table)."""
    running: Tensor
    """[B, H * W] int32: pixels up to and with this one."""


def survey(foreground: Tensor) -> Foreground:
    """Of `foreground` [B, H, W] bool."""
    table = foreground.int().cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    running = foreground.flatten(1).int().cumsum(1, dtype=torch.int32)
    return Foreground(F.pad(table, (1, 0, 1, 0)), running)


def choose_boxes(foreground: Foreground, boxes: Tensor, pixel: Tensor, min_foreground: float) -> Tensor:
    """The first of the candidates [V, B, A, 4] that holds enough foreground: [V, B, 4].

    With none, boxes around a foreground pixel picked by `pixel` [V, B], moved inside the slice: of the last
    candidate's size, then ever smaller, until one holds enough; if even the smallest does not, the one that holds
    the largest share. So no box is blank, unless the slice is.
    """
    height, width = foreground.table.shape[1] - 1, foreground.table.shape[2] - 1
    place = _pick(foreground.running, pixel)
    tries = torch.cat([boxes, _around(place, boxes[:, :, -1], (height, width))], dim=2)
    share = _share(foreground.table, tries)
    good = share >= min_foreground
    best = torch.where(good.any(dim=-1), good.int().argmax(dim=-1), share.argmax(dim=-1))
    return tries.gather(2, best[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]


def _pick(running: Tensor, pixel: Tensor) -> Tensor:
    """Flat index [V, B] of a foreground pixel, even over them; anything on an empty slice."""
    count = running[:, -1]
    rank = (pixel * count).int().clamp(max=(count - 1).clamp(min=0)) + 1
    place = torch.searchsorted(running, rank.T.contiguous()).T
    return place.clamp(max=running.shape[1] - 1)


def _around(place: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """Ever smaller boxes [V, B, n, 4] of the shape of `box` [V, B, 4], about the pixel `place` [V, B]."""
    sides = box[..., None, 2:] * torch.from_numpy(_SHRINKS).to(box.device)[:, None]
    sides = torch.minimum(sides.round().long().clamp(min=_SMALLEST), box[..., None, 2:])
    centre = torch.stack([place // size[1], place % size[1]], dim=-1)[..., None, :]
    room = torch.tensor(size, device=box.device) - sides
    corners = torch.minimum((centre - sides // 2).clamp(min=0), room)
    return torch.cat([corners, sides], dim=-1)


def _share(table: Tensor, boxes: Tensor) -> Tensor:
    """Share [V, B, A] of foreground in boxes [V, B, A, 4]."""
    top, left, tall, wide = boxes.unbind(-1)
    row = torch.arange(len(table), device=boxes.device)[None, :, None].expand_as(top)
    inside = table[row, top + tall, left + wide] - table[row, top, left + wide]
    inside = inside - table[row, top + tall, left] + table[row, top, left]
    return inside / (tall * wide)


def resize(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Antialiased bilinear resize of boxes [V, B, 4] of `images` [B, K, H, W]: [V, B, K, size, size].

    The numbers of torch's `interpolate(crop, size, mode="bilinear", antialias=True)`: on a CPU by it, box by box; else
    as two batched matrix products.
    """
    if images.device.type == "cpu":
        return _interpolated(images, boxes, flip, size)
    return _multiplied(images, boxes, flip, size)


def _interpolated(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    views = images.new_empty(*boxes.shape[:2], images.shape[1], size, size)
    for into, row_boxes, row_flips in zip(views, boxes.tolist(), flip.tolist(), strict=True):
        for out, image, (top, left, tall, wide), mirrored in zip(
            into, images, row_boxes, row_flips, strict=True
        ):
            crop = image[None, :, top : top + tall, left : left + wide]
            view = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
            out.copy_(view[0].flip(-1) if mirrored else view[0])
    return views


def _multiplied(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    batch, channels, height, width = images.shape
    views = len(boxes)
    down = _resize_matrix(boxes[..., 0], boxes[..., 2], height, size)
    across = _resize_matrix(boxes[..., 1], boxes[..., 3], width, size)
    across = torch.where(flip[..., None, None], across.flip(2), across)
    flat = images.transpose(1, 2).reshape(batch, height, channels * width)
    x = torch.bmm(down.transpose(0, 1).reshape(batch, views * size, height), flat)
    x = x.view(batch * views, size * channels, width)
    x = torch.bmm(x, across.transpose(0, 1).reshape(batch * views, size, width).transpose(1, 2))
    return x.view(batch, views, size, channels, size).permute(1, 0, 3, 2, 4).contiguous()


def _resize_matrix(start: Tensor, length: Tensor, size_in: int, size_out: int) -> Tensor:
    """Triangle weights [..., size_out, size_in] that take [start, start + length) to `size_out` pixels."""
    start, length = start.float()[..., None, None], length.float()[..., None, None]
    scale = length / size_out
    support = scale.clamp(min=1.0)
    out = torch.arange(size_out, device=start.device, dtype=torch.float32)[:, None]
    source = torch.arange(size_in, device=start.device, dtype=torch.float32)
    weights = (1.0 - ((source + 0.5 - start) - (out + 0.5) * scale).abs() / support).clamp(min=0.0)
    weights = weights * ((source >= start) & (source < start + length))
    return weights / weights.sum(dim=-1, keepdim=True)
