"""A session and a cell of segmentation -> a label map on the scan's own voxels, a picture, ml of each class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from cranium import (
    finished_cell,
    frozen_decoder,
    new_scans,
    restitch,
    segmenting,
    tokens,
    tuned_decoder,
    tuning,
)
from cranium.config import Cell, Decoder, Machine
from cranium.figures import overlay
from cranium.finished_cell import Trained

BATCH = 16  # slices in one forward pass


class Model:
    """What a cell learnt and what it learnt it on, on the device there is."""

    def __init__(self, made: Trained, machine: Machine) -> None:
        self.made, head = made, made.cell.path / segmenting.DECODER
        tuned = made.manifest.get("start") is not None
        finished_cell.require_kept(made, head, "adapt.decoder.tuned.keep" if tuned else None)
        self.judge: Judge = (Network if tuned else Tokens)(made, machine, head)

    def predict(self, seen: new_scans.Seen, out: Path) -> dict[str, Any]:
        """Write `<name>_dseg.nii.gz` and its PNG into `out`; what its JSON says."""
        probabilities = frozen_decoder.probabilities(self.judge(seen), seen.stacks.shape[-1])
        at = restitch.place(seen.row)
        classes = at.to_native(probabilities)
        path = out / f"{seen.name}_dseg.nii.gz"
        restitch.write(path, classes, at.affine, f"cranium {self.made.cell.path.name}")
        here = probabilities.argmax(0).astype(np.uint8)
        picture = out / f"{seen.name}_dseg.png"
        overlay.write(picture, seen.stacks, np.zeros_like(here), here)
        voxel = float(abs(np.linalg.det(at.affine[:3, :3]))) / 1000
        numbers = {name: k for k, name in enumerate(self.made.segmentation.classes, 1)}
        return {
            "labels": numbers,
            "ml": {name: round(float((classes == k).sum()) * voxel, 3) for name, k in numbers.items()},
            "on_voxels_of": at.channel,
            "head_sha256": self.made.manifest["head_sha256"],
            "files": {"map": path.name, "picture": picture.name},
            **finished_cell.provenance(self.made, self.judge.source),
        }


class Tokens:
    """A decoder on the tokens of a frozen backbone."""

    def __init__(self, made: Trained, machine: Machine, head: Path) -> None:
        about, cell = made.embedded, Cell.model_validate(made.manifest["cell"])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone = finished_cell.backbone(made, machine).to(self.device)
        self.source, self.depths, self.fill = about["source"], about["depths"], about["fill"]
        self.pixels, shape = int(about["pixels"]), about["shape"]
        self.decoder = frozen_decoder.build(
            Decoder.model_validate(made.manifest["decoder"]),
            cell.adaptation,
            dim=shape[3],
            num_depths=shape[1],
            num_classes=len(made.segmentation.classes) + 1,
            seed=cell.seed,
        )
        self.decoder.load_state_dict(load_file(head))
        self.decoder.to(self.device).eval()

    def __call__(self, seen: new_scans.Seen) -> Iterator[torch.Tensor]:
        """Class scores of a session's slices, part by part."""
        stacks = seen.filled(seen.stacks, self.fill).numpy()
        found = tokens.encode(self.backbone, stacks, self.depths, BATCH, self.device)
        for begin in range(0, len(found), BATCH):
            part = torch.from_numpy(found[begin : begin + BATCH]).to(self.device).float()
            with torch.inference_mode():
                yield self.decoder(part.transpose(0, 1), self.pixels)


class Network:
    """A network that was trained from the pixels: what it started from, and over it what it learnt."""

    def __init__(self, made: Trained, machine: Machine, head: Path) -> None:
        cell = Cell.model_validate(made.manifest["cell"])
        self.spec = Decoder.model_validate(made.manifest["decoder"])
        self.start, self.source = finished_cell.start(made, machine)
        self.model, found = tuned_decoder.build(
            self.start,
            self.spec,
            cell.adaptation,
            made.shards["shape"],
            num_classes=len(made.segmentation.classes) + 1,
            seed=cell.seed,
        )
        if self.source:
            finished_cell.require_same(self.source, found)
        tuning.load(self.model, head)
        self.model.eval()

    def __call__(self, seen: new_scans.Seen) -> Iterator[torch.Tensor]:
        """Class scores of a session's slices, part by part."""
        return tuned_decoder.scores(self.model, seen.filled(seen.stacks, self.start.fill), self.spec)


Judge = Tokens | Network
