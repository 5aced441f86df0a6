"""A session and a cell of segmentation -> a label map on the scan's own voxels, a picture, ml of each class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from cranium import finished_cell, new_scans, restitch, segmenting, store, tokens
from cranium.config import Cell, Decoder, Machine
from cranium.figures import overlay
from cranium.finished_cell import Trained

BATCH = 16  # slices in one forward pass


class Model:
    """Backbone and decoder of a cell, on the device there is."""

    def __init__(self, made: Trained, machine: Machine) -> None:
        self.made, manifest = made, made.manifest
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone = finished_cell.backbone(made, machine).to(self.device)
        shape, self.depths = made.embedded["shape"], made.embedded["depths"]
        self.pixels = int(made.embedded["pixels"])
        cell, spec = Cell.model_validate(manifest["cell"]), Decoder.model_validate(manifest["decoder"])
        self.decoder = segmenting.build(spec, cell, made.segmentation, dim=shape[3], num_depths=shape[1])
        self.decoder.load_state_dict(load_file(made.cell.path / segmenting.DECODER))
        self.decoder.to(self.device).eval()

    def predict(self, seen: new_scans.Seen, out: Path) -> dict[str, Any]:
        """Write `<name>_dseg.nii.gz` and its PNG into `out`; what its JSON says."""
        probabilities = self.probabilities(seen)
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
            "head_sha256": store.sha256(self.made.cell.path / segmenting.DECODER),
            "files": {"map": path.name, "picture": picture.name},
            **finished_cell.provenance(self.made, self.made.embedded["source"]),
        }

    def probabilities(self, seen: new_scans.Seen) -> NDArray[np.float32]:
        """Class probabilities [K, n, H, W] of a session's slices."""
        stacks = seen.filled(seen.stacks, self.made.embedded["fill"]).numpy()
        found = tokens.encode(self.backbone, stacks, self.depths, BATCH, self.device)

        def parts() -> Iterator[torch.Tensor]:
            for begin in range(0, len(found), BATCH):
                part = torch.from_numpy(found[begin : begin + BATCH]).to(self.device).float()
                with torch.inference_mode():
                    yield self.decoder(part.transpose(0, 1), self.pixels)

        return segmenting.probabilities(parts(), stacks.shape[-1])
