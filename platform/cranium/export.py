"""A backbone others can load: `<name>.safetensors` that plain timm reads, and `<name>.md`, which says how.

The features are ours to 1e-5: where our rule for position tables is not timm's, the table is baked at the size the
export is made for, and the card says that other sizes are then timm's business.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from cranium import __version__, checkpoint, store
from cranium.config import NAME, Frozen, Stack, UserError
from cranium.models import positions, vit
from cranium.models.architectures import ARCHITECTURES
from cranium.store import Artefact

TINY = "vit_tiny_patch16_224"  # timm's model that our own small ones are made of, by its arguments


class Spec(Frozen):
    """`cranium export WHAT key=value ...`"""

    init: str | None = None  # which of an experiment's pretrainings; the only one if not given
    stack: Stack | None = None  # and of which kind of stack, where it compares several
    out: Path = Path()  # folder
    name: str | None = Field(None, pattern=NAME)
    size: int | None = Field(None, ge=14)  # pixels a side; that of the training if not given
    licence: str | None = None  # of these weights: only whoever trained them can say


@dataclass(frozen=True)
class Exported:
    weights: Path
    card: Path
    sha256: str
    facts: dict[str, Any]


def export(made: Artefact, spec: Spec) -> Exported:
    """Write the weights of a finished pretraining and their card into `spec.out`. Raises `UserError`."""
    manifest, ours = made.manifest(), checkpoint.read_card(made.path)
    backbone, source = checkpoint.load_backbone(
        f"run:{made.path.name}",
        arch=ours["arch"],
        in_channels=ours["in_channels"],
        image_size=ours["image_size"],
        pretrained=made,
    )
    size = spec.size or ours["image_size"] // backbone.patch_size * backbone.patch_size
    if size % backbone.patch_size:
        raise UserError("USAGE", f"size={size} is no multiple of the patch size {backbone.patch_size}")
    state, call = in_timm(backbone, size)
    name = spec.name or made.path.name.replace("-", "_")
    facts = {
        "name": name,
        "arch": backbone.arch,
        "timm": call,
        "channels": ours["channels"],
        "slices": ours["in_channels"] // len(ours["channels"]),
        "size": size,
        "input": "uint8 stacks divided by 255, less mean, over std, per channel",
        "mean": list(source.mean),
        "std": list(source.std),
        "position": {"rule": backbone.position, "baked_at": None if call["dynamic_img_size"] else size},
        "preprocessing_hash": manifest["preprocessing_hash"],
        "preprocessing": _preprocessing(made, manifest),
        "corpus": manifest["cohorts"],
        "shard_sets": manifest["shard_sets"],
        "made": f"DINOv2 self-distillation, {manifest['steps']} steps, the teacher's weights; {made.id}",
        "start": manifest["start"],
        "config": ours.get("config"),
        "weights_sha256": manifest["weights_sha256"],
        "licence": spec.licence or "not stated",
        "cranium": __version__,
    }
    spec.out.mkdir(parents=True, exist_ok=True)
    path, card = spec.out / f"{name}.safetensors", spec.out / f"{name}.md"
    part = spec.out / f".{name}.part"
    save_file(state, part, {"format": "pt", "cranium": json.dumps(facts, sort_keys=True)})
    part.rename(path)
    digest = store.sha256(path)
    store.write_atomic(card, _card(facts, digest))
    return Exported(path, card, digest, facts)


def in_timm(backbone: vit.Backbone, size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in timm's names for images of `size`, and the arguments of `timm.create_model` they fit."""
    arch = ARCHITECTURES[backbone.arch]
    state = {name: t.detach().cpu().float().contiguous() for name, t in backbone.vit.state_dict().items()}
    grid, own = (size // backbone.patch_size,) * 2, tuple(backbone.vit.patch_embed.grid_size)
    dynamic = backbone.position == "timm"
    if not dynamic:
        table = positions.resample(state["pos_embed"], backbone.num_prefix, grid, backbone.position)
        state["pos_embed"] = table.contiguous()
        own = grid
    call: dict[str, Any] = {
        "model_name": arch.timm_name or TINY,
        "in_chans": backbone.in_channels,
        "img_size": own[0] * backbone.patch_size,
        "dynamic_img_size": dynamic,
        "num_classes": 0,
    }
    if arch.timm_name is None:
        call |= {"patch_size": arch.patch_size, "embed_dim": arch.dim, "depth": arch.depth}
        call |= {"num_heads": arch.heads, "init_values": arch.layer_scale}
        if arch.registers:
            call |= {"reg_tokens": arch.registers, "no_embed_class": True}
    return state, call


def _preprocessing(made: Artefact, manifest: dict[str, Any]) -> Any:
    """How scans became stacks: kept with the weights, or else by a shard set the run was trained on."""
    if kept := checkpoint.read_card(made.path).get("preprocessing"):
        return kept
    for shard_set in manifest["shard_sets"]:
        found = Artefact(made.path.parents[1] / shard_set)
        if found.done:
            return found.manifest().get("preprocessing")
    return None


# ---- the card --------------------------------------------------------------------------------------------------------


def timm_code(facts: dict[str, Any]) -> str:
    """Python that reproduces our features with timm alone: `features(stacks)` in the export's folder."""
    arguments = ", ".join(f"{k}={v!r}" for k, v in facts["timm"].items() if k != "model_name")
    shape = f"[B, {len(facts['channels'])}, {facts['slices']}, {facts['size']}, {facts['size']}]"
    return f'''\
import timm
import torch

model = timm.create_model(
    {facts["timm"]["model_name"]!r}, checkpoint_path={facts["name"] + ".safetensors"!r},
    {arguments},
).eval()
mean = torch.tensor({facts["mean"]})[:, None, None]
std = torch.tensor({facts["std"]})[:, None, None]


@torch.inference_mode()
def features(stacks):
    """CLS token and patch tokens of uint8 stacks {shape}: contrasts {", ".join(facts["channels"])}, then slices."""
    tokens = model.forward_features((stacks.flatten(1, 2).float() / 255 - mean) / std)
    return tokens[:, 0], tokens[:, model.num_prefix_tokens :]
'''


def _card(facts: dict[str, Any], digest: str) -> str:
    start, rule = facts["start"], facts["position"]
    baked = (
        f"rule `{rule['rule']}`, which timm does not have: the table is baked, for {facts['size']} pixels only"
        if rule["baked_at"]
        else "rule `timm`: other sizes than this may be used too"
    )
    rows = {
        "architecture": f"{facts['arch']} (timm: `{facts['timm']['model_name']}`)",
        "input": f"{', '.join(facts['channels'])}; {facts['slices']} slice(s) each; {facts['size']} pixels a side",
        "trained on": f"{', '.join(facts['corpus'])} (names only; no data is here)",
        "how": facts["made"],
        "started from": f"{start['name']}, licence {start.get('licence') or 'none'}, SHA-256 {start.get('sha256')}",
        "licence of these weights": facts["licence"],
        "SHA-256 of the file": f"`{digest}`",
        "preprocessing": f"hash `{facts['preprocessing_hash']}`",
        "positions": baked,
        "left out": "the mask token and the projection heads, which timm has no place for",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    spec = json.dumps(facts["preprocessing"], indent=1)
    return textwrap.dedent("""\
        # {name}

        | | |
        |---|---|
        {table}

        Features equal to Cranium's, to 1e-5, with timm alone; run beside the file:

        ```python
        {code}```

        How scans become such stacks:

        ```json
        {spec}
        ```

        A research model. It was not tested for any clinical use.
        """).format(name=facts["name"], table=table, code=timm_code(facts), spec=spec)
