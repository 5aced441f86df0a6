"""Foreign weights into a backbone: every tensor must fit, up to a short printed list of exceptions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from cranium.models import layouts, positions
from cranium.models.architectures import ARCHITECTURES
from cranium.models.vit import Backbone

_HEAD = re.compile(r"^(head|head_dist|fc_norm|pre_logits|classifier|linear_head|dino_head|ibot_head)\.")


@dataclass(frozen=True)
class LoadReport:
    """`loaded` of the backbone's `total` tensors fit; `exceptions` says what was changed on the way."""

    loaded: int
    total: int
    exceptions: tuple[str, ...] = ()
    layout: str = "cranium"
    """Whose names the file used."""

    def __str__(self) -> str:
        loaded = f"{self.loaded} of {self.total} tensors loaded ({self.layout} names)"
        return "; ".join([loaded, *self.exceptions])


def inflate_patch_embedding(weight: Tensor, in_channels: int) -> Tensor:
    """Spread an RGB patch embedding [D, 3, p, p] over `in_channels` inputs: [D, in_channels, p, p].

    Input k gets the RGB weights k, k + n, k + 2n, ... (mod 3, over a common cycle of 3 and n = in_channels),
    divided by the number of times each RGB channel is used. So n = 3 changes nothing, n = 6 repeats RGB at
    half weight, n = 1 sums RGB; a replicated (normalised) input always gives the RGB model's embedding.
    """
    if weight.ndim != 4 or weight.shape[1] != 3:
        raise ValueError(f"an RGB patch embedding is [D, 3, p, p], got {tuple(weight.shape)}")
    cycle = math.lcm(3, in_channels)
    inflated = weight.new_zeros(weight.shape[0], in_channels, *weight.shape[2:])
    for index in range(cycle):
        inflated[:, index % in_channels] += weight[:, index % 3]
    return inflated * (3 / cycle)


def fold_statistics(
    weight: Tensor, bias: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The same patch embedding for other input statistics: W' (x - m') / s' + b' = W (x - m) / s + b.

    `old` and `new` are (mean [3], std [3]); exact because a patch embedding has no padding.
    """
    (mean, std), (new_mean, new_std) = old, new
    shift = torch.einsum("dcij,c->d", weight, (new_mean - mean) / std)
    return weight * (new_std / std)[:, None, None], bias + shift


def load_into(backbone: Backbone, state: dict[str, Tensor]) -> LoadReport:
    """Copy `state`, in any layout that `layouts.in_timms_names` knows, into `backbone` in place.

    Every tensor of the backbone must be in `state` with its shape. The only exceptions, each reported: heads are
    dropped, the position table is resampled by the backbone's rule, the patch embedding is inflated, the mask token
    is absent (it keeps its zeros). Input statistics (`mean` and `std`, of RGB or of every channel) absent from a
    file stay those of the architecture. Raises ValueError naming every missing, unexpected, mis-shaped or
    non-finite tensor; the backbone is then unchanged.
    """
    target = backbone.state_dict()
    layout, named = layouts.in_timms_names(state)
    exceptions = []
    if dropped := sorted(name for name in named if _HEAD.match(name)):
        parts = sorted({name.split(".")[0] for name in dropped})
        exceptions.append(f"head dropped: {', '.join(parts)} ({len(dropped)} tensors)")
    given = _ours({name: tensor for name, tensor in named.items() if name not in dropped}, backbone)
    exceptions += _resample(given, backbone)
    exceptions += _inflate(given, backbone)
    found = len(target.keys() & given.keys())
    if "mask_token" not in given:
        exceptions.append("mask_token absent: kept at zero")
        given["mask_token"] = torch.zeros_like(target["mask_token"])
    ruled = [name for name in ("mean", "std") if name not in given]
    given |= {name: target[name] for name in ruled}
    _check(given, target)
    backbone.load_state_dict(given)
    # Statistics that are the architecture's by rule count as loaded.
    return LoadReport(found + len(ruled), len(target), tuple(exceptions), layout)


def _ours(named: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """Our names and shapes for timm's."""
    ours = {name if name in ("mask_token", "mean", "std") else f"vit.{name}": t for name, t in named.items()}
    if "mask_token" in ours:
        ours["mask_token"] = ours["mask_token"].reshape(-1)
    table, cls = ours.get("vit.pos_embed"), ours.get("vit.cls_token")
    if backbone.vit.no_embed_class and table is not None and cls is not None and table.ndim == 3:
        side = math.isqrt(table.shape[1])
        if side * side + 1 == table.shape[1]:
            # The official table has a CLS entry; with registers timm adds it to the CLS token: the same sum.
            ours["vit.cls_token"] = cls + table[:, :1]
            ours["vit.pos_embed"] = table[:, 1:]
    return ours


def _resample(given: dict[str, Tensor], backbone: Backbone) -> list[str]:
    table, own = given.get("vit.pos_embed"), backbone.vit.pos_embed
    if table is None or table.shape == own.shape or table.ndim != 3 or table.shape[-1] != own.shape[-1]:
        return []
    height, width = backbone.vit.patch_embed.grid_size
    given["vit.pos_embed"] = positions.resample(
        table, backbone.num_prefix, (height, width), backbone.position
    )
    before, after = table.shape[1] - backbone.num_prefix, height * width
    return [f"position table resampled: {before} to {after} patches, rule {backbone.position}"]


def _inflate(given: dict[str, Tensor], backbone: Backbone) -> list[str]:
    key = "vit.patch_embed.proj.weight"
    weight, channels = given.get(key), backbone.in_channels
    if weight is None or weight.ndim != 4 or weight.shape[1] != 3 or channels == 3:
        return []
    rgb = [torch.tensor(values) for values in ARCHITECTURES[backbone.arch].statistics]
    mean, std = given.pop("mean", rgb[0]).to(weight), given.pop("std", rgb[1]).to(weight)
    bias_key = "vit.patch_embed.proj.bias"
    if channels % 3 and bias_key in given:
        grey = mean.mean().repeat(3), std.mean().repeat(3)
        weight, given[bias_key] = fold_statistics(weight, given[bias_key], (mean, std), grey)
        given["mean"], given["std"] = grey[0][:1].repeat(channels), grey[1][:1].repeat(channels)
    else:
        given["mean"], given["std"] = mean.repeat(channels // 3), std.repeat(channels // 3)
    given[key] = inflate_patch_embedding(weight, channels)
    return [f"patch embedding inflated: 3 to {channels} channels"]


def _check(given: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    problems = [f"missing {name}" for name in sorted(target.keys() - given.keys())]
    problems += [f"unexpected {name}" for name in sorted(given.keys() - target.keys())]
    for name in sorted(target.keys() & given.keys()):
        if given[name].shape != target[name].shape:
            shapes = f"{tuple(given[name].shape)} given, {tuple(target[name].shape)} wanted"
            problems.append(f"mis-shaped {name}: {shapes}")
        elif not given[name].isfinite().all():
            problems.append(f"not finite {name}")
    if problems:
        raise ValueError(
            "these weights do not fit the backbone; choose the architecture they were made for: "
            + "; ".join(problems)
        )
