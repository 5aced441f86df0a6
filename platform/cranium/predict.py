"""Scans and a finished cell of segmentation -> a label map on each scan's own voxels, a picture, and where it is from.

A scan goes the way of ingest with the preprocessing that the cell was trained on, so there is no other it could have.
What the cell does not fit is refused: another choice of contrasts, weights that are no longer those it learnt with.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file

import cranium
from cranium import cards, checkpoint, cohort, conform, provisions, restitch, segmenting, store, tokens
from cranium.config import Cell, Decoder, Frozen, Ingest, Machine, Segmentation, UserError
from cranium.figures import overlay
from cranium.store import Artefact
from cranium.volume import shard

BATCH = 16  # slices in one forward pass


class Spec(Frozen):
    """What `cranium predict` takes beside the cell and machine facts."""

    scan: dict[str, Path] = Field(default_factory=dict)  # contrast -> file, of one session
    mask: Path | None = None  # of its brain, on one of the scans' voxels; None: as the preprocessing finds it
    bids: Path | None = None  # or a BIDS tree: every session that has the contrasts
    out: Path = Path("predictions")


@dataclass(frozen=True)
class Trained:
    """A finished cell with what it was made from."""

    cell: Artefact
    shards: dict[str, Any]  # manifests
    tokens: dict[str, Any]

    @property
    def task(self) -> Segmentation:
        manifest = self.cell.manifest()
        classes = {name: manifest["task"]["classes"][name] for name in manifest["classes"]}  # in their order
        return Segmentation.model_validate(manifest["task"] | {"classes": classes})

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.shards["channels"])


def find(folder: Path, run: str) -> Trained:
    """The finished cell of the store `folder` with this name, or with the eight hex digits at its end."""
    wanted = run.removeprefix("run:")
    cells = [made for made in store.find(folder, "adapt") if made.path.name.endswith(wanted)]
    if len(cells) != 1:
        raise UserError(
            "NO_RUN", f"{run} names {len(cells)} finished cells of {folder / 'adapt'}; give a folder's name"
        )
    manifest = cells[0].manifest()
    if manifest["task"]["task"] != "segmentation":
        raise UserError(
            "NO_RUN", f"{run} is a {manifest['task']['task']}; only segmentations keep what predicts"
        )
    (shards, made), *_ = manifest["inputs"]
    return Trained(
        cells[0],
        store.read_manifest(folder / "ingest" / shards),
        store.read_manifest(folder / "embed" / made),
    )


def predict(machine: Machine, trained: Trained, spec: Spec) -> list[Path]:
    """Label maps of every session asked for, each with a PNG and a JSON of the same name. Raises `UserError`."""
    model = _Model(machine, trained)
    sessions = _sessions(trained, spec)
    with tempfile.TemporaryDirectory() as work:
        return [_session(model, trained, session, spec.out, Path(work)) for session in sessions]


def _sessions(trained: Trained, spec: Spec) -> list[dict[str, Any]]:
    """What a task of ingest is handed, for each session."""
    ingest = _ingest(trained)
    if bool(spec.scan) == bool(spec.bids):
        raise UserError("USAGE", "give either scan.<contrast>=FILE or bids=FOLDER")
    source = {channel: conform.source(ingest, channel) for channel in trained.channels}
    if spec.bids:
        table = cohort.scan(cards.load_card("bids"), spec.bids)
        whole = [s for s in table.sessions if set(source.values()) <= set(s.scans)]
        if not whole:
            raise UserError("CONTRASTS", f"no session of {spec.bids} has all of {', '.join(source.values())}")
        wanted = [conform.wanted(s, ingest, {}) for s in whole]
        for one in wanted:
            scans = one["scans"].items()
            one["scans"] = {
                c: (k, str(table.root / p), m and str(table.root / m), n) for c, (k, p, m, n) in scans
            }
        return [one | {"segmentation": None, "values": {}, "sizes": {}} for one in wanted]
    if set(spec.scan) != set(source.values()):
        given, asked = ", ".join(sorted(spec.scan)), ", ".join(f"scan.{c}=FILE" for c in source.values())
        raise UserError(
            "CONTRASTS", f"{trained.cell.path.name} looks at other contrasts than {given}; give {asked}"
        )
    mask = spec.mask and str(spec.mask.expanduser().absolute())
    files = {c: (k, str(spec.scan[k].expanduser().absolute()), mask, None) for c, k in source.items()}
    name = Path(next(iter(files.values()))[1]).name.removesuffix(".gz").removesuffix(".nii")
    return [{"subject": name, "session": "", "scans": files, "values": {}, "segmentation": None, "sizes": {}}]


def _ingest(trained: Trained) -> Ingest:
    return Ingest(**trained.shards["preprocessing"])


class _Model:
    """Backbone and decoder of a cell, on the device there is."""

    def __init__(self, machine: Machine, trained: Trained) -> None:
        source, manifest = trained.tokens["source"], trained.cell.manifest()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        channels, slices, size, _ = trained.shards["shape"]
        here = source["init"] not in ("random", "dinov2", "imagenet")
        backbone, found = checkpoint.load_backbone(
            source["init"],
            arch=source["arch"],
            in_channels=channels * slices,
            image_size=size,
            seed=trained.tokens["seed"],
            weights_file=machine.weights,
            pretrained=Artefact(machine.store / source["name"]) if here else None,
        )
        if found.sha256 != source["sha256"]:
            raise UserError(
                "WEIGHTS", f"the cell learnt with the weights {source['sha256']}, these are {found.sha256}"
            )
        shape = trained.tokens["shape"]
        self.backbone, self.depths = backbone.to(self.device), trained.tokens["depths"]
        self.pixels, self.machine = int(trained.tokens["pixels"]), machine
        cell, spec = Cell.model_validate(manifest["cell"]), Decoder.model_validate(manifest["decoder"])
        self.decoder = segmenting.build(spec, cell, trained.task, dim=shape[3], num_depths=shape[1])
        self.decoder.load_state_dict(load_file(trained.cell.path / segmenting.DECODER))
        self.decoder.to(self.device).eval()

    def __call__(self, stacks: np.ndarray) -> np.ndarray:
        """Class probabilities [K, n, H, W] of stacks [n, C, S, H, W]."""
        found = tokens.encode(self.backbone, stacks, self.depths, BATCH, self.device)

        def parts() -> Any:
            for begin in range(0, len(found), BATCH):
                part = torch.from_numpy(found[begin : begin + BATCH]).to(self.device).float()
                with torch.inference_mode():
                    yield self.decoder(part.transpose(0, 1), self.pixels)

        return segmenting.probabilities(parts(), stacks.shape[-1])


def _session(model: _Model, trained: Trained, session: Mapping[str, Any], out: Path, work: Path) -> Path:
    """Ingest one session into `work`, predict it, and write what came out."""
    ingest, card = _ingest(trained), trained.shards["card"]
    supplied = all(mask for _, _, mask, _ in session["scans"].values())
    ways = provisions.mask_ways(ingest.mask, stripped=card["stripped"], all_supplied=supplied)
    needs = provisions.provide(ingest, ways, model.machine, work / "provisions")
    job = conform.Job("predict", Path("/"), work, ingest, {}, needs)
    job_work = Path(str(job.work))
    job_work.mkdir(parents=True, exist_ok=True)
    conform.session({"index": 0, "session": json.dumps(session)}, job)
    record = json.loads(Path(str(job.record(0))).read_text())
    if record["rejected"] or not record["row_groups"]:
        told = "; ".join(
            f"{contrast}: {code}, {reason}" for *_, contrast, _, code, reason in record["rejected"]
        )
        raise UserError("REJECTED", f"{session['subject']} cannot be used: {told}", 3)
    groups = [shard.read_row_group(Path(str(job.part(0))), i) for i in range(len(record["row_groups"]))]
    stacks = np.concatenate([shard.pixels(group) for group in groups])
    probabilities = model(stacks)
    at = restitch.place(record["session"])
    classes = at.to_native(probabilities)
    name = segmenting.name(session["subject"], session["session"]).removeprefix("sub-")
    path = out / f"{name}_dseg.nii.gz"
    restitch.write(path, classes, at.affine, f"cranium {trained.cell.path.name}")
    here = probabilities.argmax(0).astype(np.uint8)
    overlay.write(out / f"{name}_dseg.png", stacks, np.zeros_like(here), here)
    voxel = float(abs(np.linalg.det(at.affine[:3, :3]))) / 1000
    about = {
        "run": trained.cell.path.name,
        "task": trained.task.model_dump(mode="json"),
        "labels": {name: k for k, name in enumerate(trained.task.classes, 1)},
        "ml": {
            name: round(float((classes == k).sum()) * voxel, 3)
            for k, name in enumerate(trained.task.classes, 1)
        },
        "scans": json.loads(record["session"]["sources"]),
        "on_voxels_of": at.channel,
        "warnings": json.loads(record["session"]["warnings"]),
        "preprocessing": trained.shards["preprocessing_hash"],
        "weights": trained.tokens["source"],
        "decoder_sha256": store.sha256(trained.cell.path / segmenting.DECODER),
        "code_version": cranium.__version__,
        "note": "made for research; not a medical device",
    }
    store.write_atomic(out / f"{name}_dseg.json", json.dumps(about, indent=1))
    return path
