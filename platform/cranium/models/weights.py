"""Foreign weights into a backbone: every tensor must fit, up to a short printed list of exceptions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from cranium.models.vit import ARCHITECTURES, Backbone

_HEAD = re.compile(r"^(head|head_dist|fc_norm|pre_logits)\.")


@dataclass(frozen=True)
class LoadReport:
    """`loaded` of the backbone's `total` tensors fit; `exceptions` says what was changed on the way."""

    loaded: int
    total: int
    exceptions: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join([f"{self.loaded} of {self.total} tensors loaded", *self.exceptions])


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


def resample_position_table(table: Tensor, num_prefix: int, new_grid: tuple[int, int]) -> Tensor:
    """Resample a table [1, num_prefix + h*w, D] of a square grid to `new_grid` (bicubic, antialiased)."""
    side = math.isqrt(table.shape[1] - num_prefix)
    if side * side + num_prefix != table.shape[1]:
        raise ValueError(f"{table.shape[1]} positions are not {num_prefix} prefix entries and a square grid")
    if (side, side) == new_grid:
        return table
    resampled: Tensor = resample_abs_pos_embed(
        table, new_size=list(new_grid), old_size=[side, side], num_prefix_tokens=num_prefix
    )
    return resampled


def load_into(backbone: Backbone, state: dict[str, Tensor]) -> LoadReport:
    """Copy `state` into `backbone` in place: our own export, timm's names, or the official DINOv2 names.

    Every tensor of the backbone must be in `state` with its shape. The only exceptions, each reported: a
    classifier head is dropped, the position table is resampled, the patch embedding is inflated, the mask
    token is absent (it keeps its zeros). Input statistics absent from a foreign file stay those of the
    architecture. Raises ValueError naming every missing, unexpected or mis-shaped tensor; the backbone is
    then unchanged.
    """
    target = backbone.state_dict()
    given = _rename(state, backbone)
    exceptions = []
    dropped = sorted(name for name in given if _HEAD.match(name.removeprefix("vit.")))
    if dropped:
        exceptions.append(f"head dropped: {', '.join(name.removeprefix('vit.') for name in dropped)}")
        given = {name: tensor for name, tensor in given.items() if name not in dropped}
    exceptions += _resample(given, backbone)
    exceptions += _inflate(given, backbone)
    found = len(target.keys() & given.keys())
    if "mask_token" not in given:
        exceptions.append("mask_token absent: kept at zero")
        given["mask_token"] = torch.zeros_like(target["mask_token"])
    for name in ("mean", "std"):
        given.setdefault(name, target[name])
    _check(given, target)
    backbone.load_state_dict(given)
    # Statistics that are the architecture's by rule count as loaded.
    return LoadReport(
        found + sum(name not in state for name in ("mean", "std")), len(target), tuple(exceptions)
    )


def _rename(state: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """Our names and layouts for timm's and the official ones."""
    own = any(name.startswith("vit.") for name in state)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "mask_token":
            renamed[name] = tensor.reshape(-1)
        elif own or name in ("mean", "std"):
            renamed[name] = tensor
        else:
            renamed["vit." + name.replace("register_tokens", "reg_token")] = tensor
    table, cls = renamed.get("vit.pos_embed"), renamed.get("vit.cls_token")
    if backbone.vit.no_embed_class and table is not None and cls is not None:
        side = math.isqrt(table.shape[1])
        if side * side + 1 == table.shape[1]:
            # The official table has a CLS entry; with registers timm adds it to the CLS token: the same sum.
            renamed["vit.cls_token"] = cls + table[:, :1]
            renamed["vit.pos_embed"] = table[:, 1:]
    return renamed


def _resample(given: dict[str, Tensor], backbone: Backbone) -> list[str]:
    table, own = given.get("vit.pos_embed"), backbone.vit.pos_embed
    prefix = 0 if backbone.vit.no_embed_class else backbone.vit.num_prefix_tokens
    if table is None or table.shape == own.shape or table.ndim != 3 or table.shape[-1] != own.shape[-1]:
        return []
    height, width = backbone.vit.patch_embed.grid_size
    given["vit.pos_embed"] = resample_position_table(table, prefix, (height, width))
    return [f"position table resampled: {table.shape[1] - prefix} to {height * width} patches"]


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
    if problems:
        raise ValueError(
            "these weights do not fit the backbone; choose the architecture they were made for: "
            + "; ".join(problems)
        )
