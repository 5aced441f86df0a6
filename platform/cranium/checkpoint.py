"""Weights in and out: where a backbone comes from, how it is exported, and training state that survives a kill.

`load_backbone` is the only resolver of weights; `models/weights.py` maps the tensors and refuses what does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cranium.config import PRETRAINED_HERE, UserError
from cranium.models import vit, weights
from cranium.store import Artefact, sha256

BACKBONE = "backbone.safetensors"
TRAINING = "training.pt"
COMPLETE = "complete.json"  # beside it, written last
IMAGENET = {  # DINOv2's architectures -> supervised ImageNet-21k weights, which timm has at patch 16 only
    "vit_small_patch14_dinov2": "vit_small_patch16_224",
    "vit_base_patch14_dinov2": "vit_base_patch16_224",
    "vit_large_patch14_dinov2": "vit_large_patch16_224",
}


@dataclass(frozen=True)
class Source:
    """Where weights came from; stands in manifests, runs and reports."""

    init: str
    name: str
    arch: str
    sha256: str | None = None
    licence: str | None = None
    report: str = ""


def architecture(init: str, arch: str) -> str:
    """The architecture an initialisation is used in: its native patch size for `imagenet`, else `arch`."""
    if init != "imagenet":
        return arch
    if arch not in IMAGENET:
        raise UserError(
            "NO_WEIGHTS",
            f"there are no supervised ImageNet-21k weights for {arch}; drop `imagenet` from sweep.init",
        )
    return IMAGENET[arch]


def load_backbone(
    init: str,
    *,
    arch: str,
    in_channels: int,
    image_size: int,
    drop_path: float = 0.0,
    seed: int = 0,
    weights_file: Path | None = None,
    pretrained: Artefact | None = None,
) -> tuple[vit.Backbone, Source]:
    """A backbone for an initialisation, on the CPU, in eval mode.

    random: a seeded draw; dinov2: `weights_file`, else timm's hub; imagenet: timm's hub; anything made here
    (scratch, brainfound, run:<id>): the `pretrained` artefact. Every tensor must load by name and shape, up to the
    closed list of `weights.load_into`. Raises `UserError(NO_WEIGHTS | WEIGHTS_MISFIT)`.
    """
    arch = architecture(init, arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = vit.build(arch, in_channels=in_channels, image_size=image_size, drop_path=drop_path)
    backbone.eval()
    if init == "random":
        return backbone, Source(init, f"random (seed {seed})", arch)
    path, name, licence = locate(init, arch, weights_file, pretrained)
    try:
        report = weights.load_into(backbone, read_tensors(path))
    except ValueError as error:
        raise UserError("WEIGHTS_MISFIT", f"{path}: {error}") from None
    return backbone, Source(init, name, arch, sha256(path), licence, str(report))


def locate(
    init: str, arch: str, weights_file: Path | None = None, pretrained: Artefact | None = None
) -> tuple[Path, str, str | None]:
    """File, name and licence of the weights an initialisation starts from, downloaded if need be.

    `arch` is that of the initialisation (see `architecture`). Raises `UserError(NO_WEIGHTS)`.
    """
    if init in PRETRAINED_HERE or init.startswith("run:"):
        if pretrained is None:
            raise UserError(
                "NO_WEIGHTS", f"init {init} needs a pretraining run; run `cranium pretrain` first"
            )
        return pretrained.path / BACKBONE, pretrained.id, None
    if init == "dinov2" and weights_file is not None:
        return weights_file, weights_file.name, "Apache-2.0"
    return _from_hub(init, arch)


def _from_hub(init: str, arch: str) -> tuple[Path, str, str]:
    """Download (or find in the hub's cache) timm's weights for `dinov2` or `imagenet`."""
    import timm
    from huggingface_hub import hf_hub_download

    tag = {"dinov2": "lvd142m", "imagenet": "augreg_in21k"}.get(init)
    name = f"{arch}.{tag}"
    configuration = timm.models.get_pretrained_cfg(name) if tag else None
    if configuration is None or not configuration.hf_hub_id:
        raise UserError(
            "NO_WEIGHTS", f"there are no released weights {init} for {arch}; use init random or scratch"
        )
    try:
        path = hf_hub_download(configuration.hf_hub_id, "model.safetensors")
    except Exception as error:  # the hub raises many kinds; to the user they are all one
        raise UserError(
            "NO_WEIGHTS",
            f"the weights {name} could not be had from timm's hub ({type(error).__name__}); connect to it once, "
            "or give a file with weights=PATH (safetensors)",
        ) from error
    return Path(path), name, "Apache-2.0"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a PyTorch file without code (`weights_only`); float32 on the CPU."""
    if not path.is_file():
        raise UserError(
            "NO_WEIGHTS", f"{path} does not exist; weights=PATH takes a .safetensors or .pth file"
        )
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("model", state.get("teacher", state))
    except (SafetensorError, RuntimeError, EOFError, AttributeError, ValueError) as error:
        raise UserError("NO_WEIGHTS", f"{path} could not be read as weights: {error}") from None
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise UserError(
                "NO_WEIGHTS", f"{path} holds pickled code, which is never run; convert it to safetensors"
            ) from None
        raise
    return {name: tensor.float() for name, tensor in state.items()}


def export(folder: Path, backbone: vit.Backbone, card: Mapping[str, Any]) -> None:
    """Write `backbone.safetensors`: every tensor fp32, and how they were made as metadata."""
    state = {
        name: tensor.detach().cpu().float().contiguous() for name, tensor in backbone.state_dict().items()
    }
    form = {"arch": backbone.arch, "in_channels": backbone.in_channels, "dim": backbone.embed_dim}
    metadata = {"cranium": json.dumps({**form, **card})}
    temporary = folder / f".{BACKBONE}.part"
    save_file(state, temporary, metadata)
    temporary.rename(folder / BACKBONE)


def read_card(folder: Path) -> dict[str, Any]:
    """What `export` wrote beside the tensors: arch, channels, preprocessing hash, config."""
    with safe_open(folder / BACKBONE, framework="pt") as file:
        card: dict[str, Any] = json.loads(file.metadata()["cranium"])
    return card


class Damaged(Exception):
    """Training state that was cut, changed or never finished; an older one may be whole."""


def save_training(folder: Path, state: Mapping[str, Any]) -> None:
    """Training state as plain tensors and numbers, so that loading it can never run code; its SHA-256 written last."""
    torch.save(dict(state), folder / TRAINING)
    (folder / COMPLETE).write_text(json.dumps({"step": state["step"], "sha256": sha256(folder / TRAINING)}))


def load_training(folder: Path) -> dict[str, Any]:
    """What `save_training` wrote. Raises `Damaged` unless every byte is as it was written."""
    try:
        marker = json.loads((folder / COMPLETE).read_text())
        whole = sha256(folder / TRAINING) == marker["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder} is not a finished checkpoint ({error})") from None
    if not whole:
        raise Damaged(f"{folder / TRAINING} has other bytes than were written")
    state: dict[str, Any] = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    return state
