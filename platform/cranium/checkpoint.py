"""Weights in and out: where a backbone comes from, what is kept of a finished one, and training state.

`load_backbone` is the only resolver of weights; `models/layouts.py` knows other people's names, `models/weights.py`
refuses what does not fit. `export.py` writes what other programs load.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cranium import store, track
from cranium.config import PRETRAINED_HERE, UserError
from cranium.models import vit, weights
from cranium.models.architectures import PositionRule
from cranium.store import Artefact, require_not_forgotten, sha256

BACKBONE = "backbone.safetensors"
TRAINING = "training.pt"
COMPLETE = "complete.json"  # beside it, written last
MAX_HEADER = 4 << 20  # bytes of a safetensors header; that of ViT-g is 0.1 MB
IN_A_FOLDER = ("model.safetensors", "pytorch_model.bin")  # what transformers' save_pretrained leaves
IMAGENET = {  # DINOv2's architectures -> supervised ImageNet-21k weights, which timm has at patch 16 only
    f"vit_{size}_patch14_{kind}": f"vit_{size}_patch16_224"
    for size in ("small", "base", "large")
    for kind in ("dinov2", "reg4_dinov2")
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
    position: str = ""
    """Rule by which the position table is resampled."""
    mean: tuple[float, ...] = ()
    """Per channel, of inputs in 0..1; taken off before `std` divides."""
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class Located:
    """A file of weights, and what is known of it beforehand."""

    path: Path
    name: str
    licence: str | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and std of RGB where whoever released the weights states them; None: the file's, or the architecture's."""


def architecture(init: str, arch: str, pretrained: Artefact | None = None) -> str:
    """The architecture an initialisation is used in: `imagenet`'s native patch size, a run's own, else `arch`."""
    if init.startswith("run:") and pretrained:
        return str(read_card(pretrained.path)["arch"])
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
    position: PositionRule | None = None,
) -> tuple[vit.Backbone, Source]:
    """A backbone for an initialisation, on the CPU, in eval mode.

    random: a seeded draw; dinov2: `weights_file`, else timm's hub; imagenet: timm's hub; anything made here
    (scratch, brainfound, run:<id>): the `pretrained` artefact. `position` overrides the rule for resampling the
    position table: by default that of our own run, else that of the architecture's released weights. Every tensor
    must load by name and shape, up to the closed list of `weights.load_into`. Raises `UserError(NO_WEIGHTS |
    WEIGHTS_DAMAGED | WEIGHTS_UNSAFE | WEIGHTS_MISFIT)`.
    """
    arch = architecture(init, arch, pretrained)
    if position is None and pretrained and (init in PRETRAINED_HERE or init.startswith("run:")):
        position = read_card(pretrained.path).get("position", "timm")  # the only rule before there was a name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = vit.build(
            arch, in_channels=in_channels, image_size=image_size, drop_path=drop_path, position=position
        )
    backbone.eval()
    if init == "random":
        return backbone, _source(init, backbone, Located(Path(), f"random (seed {seed})"))
    found = locate(init, arch, weights_file, pretrained)
    state = read_tensors(found.path)
    for name, values in zip(("mean", "std"), found.statistics or (), strict=False):
        state.setdefault(name, torch.tensor(values))
    try:
        report = weights.load_into(backbone, state)
    except ValueError as error:
        raise UserError("WEIGHTS_MISFIT", f"{found.path}: {error}") from None
    return backbone, _source(init, backbone, found, str(report))


def _source(init: str, backbone: vit.Backbone, found: Located, report: str = "") -> Source:
    return Source(
        init=init,
        name=found.name,
        arch=backbone.arch,
        sha256=sha256(found.path) if report else None,
        licence=found.licence,
        report=report,
        position=backbone.position,
        mean=tuple(round(float(v), 6) for v in backbone.mean),
        std=tuple(round(float(v), 6) for v in backbone.std),
    )


# ---- where weights are ----------------------------------------------------------------------------------------------


def locate(
    init: str, arch: str, weights_file: Path | None = None, pretrained: Artefact | None = None
) -> Located:
    """The weights an initialisation starts from, downloaded if need be.

    `arch` is that of the initialisation (see `architecture`). Raises `UserError(NO_WEIGHTS)`.
    """
    if init in PRETRAINED_HERE or init.startswith("run:"):
        if pretrained is None:
            raise UserError(
                "NO_WEIGHTS", f"init {init} needs a pretraining run; run `cranium pretrain` first"
            )
        require_not_forgotten(pretrained.path)
        start = pretrained.manifest().get("start", {}) if pretrained.done else {}
        return Located(pretrained.path / BACKBONE, pretrained.id, start.get("licence"))
    if init == "dinov2" and weights_file is not None:
        # DINOv2's releases are Apache-2.0; that this file is one of them is the user's word, and is kept as such.
        licence = "Apache-2.0 (DINOv2's; the file was given by hand)"
        path = weights_file
        if path.is_dir():
            path = next((path / name for name in IN_A_FOLDER if (path / name).is_file()), path)
        return Located(path, weights_file.name, licence, _stated_statistics(weights_file))
    return _from_hub(init, arch)


def _stated_statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Input statistics of a folder that transformers' `save_pretrained` made, where it states them."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    try:
        stated = json.loads(path.read_text())
        mean, std = (tuple(float(v) for v in stated[name]) for name in ("image_mean", "image_std"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("WEIGHTS_DAMAGED", f"{path} states no image_mean and image_std ({error})") from None
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError("WEIGHTS_DAMAGED", f"{path}: image_mean and image_std must be three numbers each")
    return mean, std


def _from_hub(init: str, arch: str) -> Located:
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
    licence = str(configuration.license or "Apache-2.0").capitalize()
    return Located(Path(path), name, licence, (tuple(configuration.mean), tuple(configuration.std)))


def find_run(folder: Path, init: str, tracking: str | None = None) -> Artefact:
    """The finished pretraining in the store `folder` that `run:<id>` names.

    `<id>` is the artefact's name, the eight hex digits at its end, the MLflow run id, or `<model>@<alias>` of
    MLflow's registry at `tracking`. Raises `UserError(NO_RUN)`.
    """
    wanted = init.removeprefix("run:")
    if "@" in wanted:
        model, _, alias = wanted.partition("@")
        try:
            wanted = track.run_of_alias(tracking or "", model, alias)
        except track.TrackingError as error:
            raise UserError("NO_RUN", f"{init}: {error}") from None
    runs = store.find(folder, "pretrain")
    ids = {
        path.stem.removeprefix("pretrain-"): path for path in (folder / "tracked").glob("*/pretrain-*.json")
    }
    tracked = {name for name, path in ids.items() if json.loads(path.read_text()).get("run") == wanted}
    found = [
        made
        for made in runs
        if made.path.name == wanted or made.path.name.endswith(f"-{wanted}") or made.path.name in tracked
    ]
    if len(found) != 1:
        known = ", ".join(made.path.name for made in runs) or "none"
        raise UserError(
            "NO_RUN", f"{init} names {len(found)} finished pretraining runs of {folder}; there are: {known}"
        )
    return found[0]


def identity(path: Path) -> str:
    """What a file of weights is to the identity of work that uses it: its SHA-256, or its name if it is not there."""
    path = next((path / name for name in IN_A_FOLDER if (path / name).is_file()), path)
    if not path.is_file():
        return path.name
    about = path.stat()
    return _sha256(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, changed: int) -> str:
    return sha256(path)


# ---- reading them ---------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a PyTorch file without code (`weights_only`); float32 on the CPU.

    Raises `UserError`: NO_WEIGHTS when there is no file, WEIGHTS_DAMAGED when it is cut, oversized or holds something
    else, WEIGHTS_UNSAFE when reading it would run code.
    """
    if not path.is_file():
        raise UserError(
            "NO_WEIGHTS", f"{path} does not exist; weights=PATH takes a .safetensors or .pth file"
        )
    try:
        with path.open("rb") as file:
            start = file.read(9)
        # By content where it can be told: a PyTorch file is a zip (PK) or a pickle (0x80).
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            _check_header(start, path.stat().st_size)
            state = load_file(path)
        else:
            state = _unwrapped(torch.load(path, map_location="cpu", weights_only=True))
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError("WEIGHTS_DAMAGED", f"{path} could not be read as weights: {reason}") from None
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise UserError(
                "WEIGHTS_UNSAFE", f"{path} holds pickled code, which is never run; convert it to safetensors"
            ) from None
        raise
    return {name: tensor.float() for name, tensor in state.items()}


def _check_header(start: bytes, size: int) -> None:
    """Refuse a header that is longer than the file or than any real one, before it is parsed."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or length + 8 > size:
        raise ValueError(f"the file is cut: {size} bytes, and a header of {length} announced")
    if length > MAX_HEADER:
        raise ValueError(
            f"a header of {length} bytes, more than {MAX_HEADER}: no backbone has that many tensors"
        )


def _unwrapped(content: Any) -> dict[str, Tensor]:
    """The tensors of a PyTorch file: itself, or below `teacher`, `model` or `state_dict`."""
    for _ in range(2):
        if isinstance(content, Mapping):
            below = [k for k in ("teacher", "model", "state_dict") if isinstance(content.get(k), Mapping)]
            content = content[below[0]] if below else content
    if not isinstance(content, Mapping) or not content:
        raise ValueError("it holds no named tensors")
    if other := [str(name) for name, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"it holds more than tensors: {', '.join(sorted(other)[:5])}")
    return {str(name): tensor for name, tensor in content.items()}


# ---- keeping them ---------------------------------------------------------------------------------------------------


def export(folder: Path, backbone: vit.Backbone, card: Mapping[str, Any]) -> None:
    """Write `backbone.safetensors`: every tensor fp32, and how they were made as metadata."""
    state = {
        name: tensor.detach().cpu().float().contiguous() for name, tensor in backbone.state_dict().items()
    }
    form = {"arch": backbone.arch, "in_channels": backbone.in_channels, "dim": backbone.embed_dim}
    form["position"] = backbone.position
    metadata = {"cranium": json.dumps({**form, **card})}
    temporary = folder / f".{BACKBONE}.part"
    save_file(state, temporary, metadata)
    temporary.rename(folder / BACKBONE)


def read_card(folder: Path) -> dict[str, Any]:
    """What `export` wrote beside the tensors: arch, channels, preprocessing hash, config."""
    require_not_forgotten(folder)
    with safe_open(folder / BACKBONE, framework="pt") as file:
        card: dict[str, Any] = json.loads(file.metadata()["cranium"])
    return card


class Damaged(Exception):
    """Training state that was cut, changed or never finished; an older one may be whole."""


def save_training(folder: Path, state: Mapping[str, Any]) -> None:
    """Training state as plain tensors and numbers, so that loading it can never run code; its SHA-256 written last."""
    torch.save(dict(state), folder / TRAINING)
    (folder / COMPLETE).write_text(json.dumps({"step": state["step"], "sha256": sha256(folder / TRAINING)}))


def require_whole(folder: Path) -> None:
    """Raises `Damaged` unless every byte of a checkpoint is as `save_training` wrote it."""
    try:
        marker = json.loads((folder / COMPLETE).read_text())
        whole = sha256(folder / TRAINING) == marker["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder} is not a finished checkpoint ({error})") from None
    if not whole:
        raise Damaged(f"{folder / TRAINING} has other bytes than were written")


def load_training(folder: Path) -> dict[str, Any]:
    """What `save_training` wrote. Raises `Damaged` unless it is whole."""
    require_whole(folder)
    state: dict[str, Any] = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    return state
