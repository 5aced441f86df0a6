"""What other people call the tensors of a DINOv2 vision transformer, in timm's names plus `mask_token`.

Names only: whether every tensor is there and fits is for `weights.load_into` to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]

_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
_REST_OF_TRAINING = ("student.", "dino_loss.", "ibot_patch_loss.")
_LAYER = re.compile(r"^encoder\.layer\.(\d+)\.(.+)\.([^.]+)$")
_IN_LAYER = {  # transformers -> timm; both spellings of the attention are in use
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = (
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
)
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


def in_timms_names(state: State) -> tuple[str, State]:
    """What the layout of `state` is called, and its tensors in timm's names.

    Known are our own export, timm, the official DINOv2 code (plain, chunked, and the teacher of a training
    checkpoint) and transformers' `Dinov2Model` and `Dinov2WithRegistersModel`. A name that has no counterpart stays
    as it is.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if any(name.startswith("vit.") for name in state):
        return "cranium", {name.removeprefix("vit."): tensor for name, tensor in state.items()}
    if before := [
        n.removesuffix("embeddings.cls_token") for n in state if n.endswith("embeddings.cls_token")
    ]:
        return "transformers", _from_transformers(_without(before[0], state))
    if "teacher.backbone.cls_token" in state:
        kept = {n: t for n, t in state.items() if not n.startswith(_REST_OF_TRAINING)}
        return "official training checkpoint, its teacher", _official(_without("teacher.", kept))
    if "backbone.cls_token" in state:
        return "official teacher", _official(state)
    official = "register_tokens" in state or "mask_token" in state or any(map(_CHUNKED.match, state))
    return ("official", _official(state)) if official else ("timm", state)


def _without(prefix: str, state: State) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _official(state: State) -> State:
    def rename(name: str) -> str:
        name = _CHUNKED.sub(r"blocks.\1.", name.removeprefix("backbone."))
        return name.replace("register_tokens", "reg_token")

    return _renamed(state, rename)


def _from_transformers(state: State) -> State:
    def rename(name: str) -> str:
        if name in _OUTSIDE:
            return _OUTSIDE[name]
        if not (found := _LAYER.match(name)):
            return name
        layer, inside, kind = found.groups()
        known = _IN_LAYER.get(inside)
        kind = "gamma" if kind == "lambda1" else kind
        return f"blocks.{layer}.{known}.{kind}" if known else name

    return _renamed(_joined(state), rename)


def _renamed(state: State, rename: Callable[[str], str]) -> State:
    new = {rename(name): tensor for name, tensor in state.items()}
    if len(new) != len(state):
        raise ValueError("two of the tensors have the same name in timm's spelling")
    return new


def _joined(state: State) -> State:
    """Query, key and value of each layer as timm's one matrix, in this order."""
    joined = dict(state)
    for name in state:
        for first, second, third in _QKV:
            if f".{first}." not in name:
                continue
            names = [name.replace(first, part) for part in (first, second, third)]
            found = _LAYER.match(name)
            if found and all(n in joined for n in names):
                parts = torch.cat([joined.pop(n) for n in names])
                joined[f"blocks.{found.group(1)}.attn.qkv.{found.group(3)}"] = parts
    return joined
