"""A session and a cell of classification -> class probabilities, and a picture of the slices that they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cranium import adapt, embed, finished_cell, new_scans, probing, sessions, tuning
from cranium.config import (
    Adaptation,
    Attention,
    Classification,
    Finetune,
    Knn,
    Lora,
    Machine,
    Probe,
    UserError,
)
from cranium.figures import contact
from cranium.finished_cell import Trained
from cranium.models.attend import AttentionProbe, Bags

Array = NDArray[Any]
# How each adaptation's settings are read from a manifest.
SPECS: Mapping[Adaptation, type[Probe | Knn | Attention | Finetune]] = {
    "linear": Probe,
    "knn": Knn,
    "attention": Attention,
    "finetune": Finetune,
    "lora": Lora,
}


@dataclass(frozen=True)
class Judged:
    """Class probabilities [K] of a session, the places [k] of its slices that were used, and where it attends [k]."""

    probabilities: Array
    used: Array
    attention: Array | None


class Model:
    """What a cell learnt and what it learnt it on, on the device there is."""

    def __init__(self, made: Trained, machine: Machine) -> None:
        self.made, self.task = made, Classification.model_validate(made.manifest["task"])
        head = made.cell.path / adapt.HEAD
        _require_kept(made, head)
        settings = made.manifest.get(
            "settled", made.manifest["spec"]
        )  # settled: by a search, where there was one
        spec = SPECS[made.manifest["cell"]["adaptation"]].model_validate(settings)
        self.head_sha256, self.judge = made.manifest["head_sha256"], self._judge(spec, machine, head)

    def _judge(self, spec: Probe | Knn | Attention | Finetune, machine: Machine, head: Path) -> Judge:
        if isinstance(spec, Finetune):
            return Network(self.made, machine, self.task, spec, head)
        return Features(self.made, machine, self.task, spec, head)

    def predict(self, seen: new_scans.Seen, out: Path) -> dict[str, Any]:
        """Write `<name>_slices.png` into `out`; what the JSON says."""
        found = self.judge(seen)
        named = dict(zip(self.task.classes, found.probabilities.tolist(), strict=True))
        likely = max(named, key=lambda name: named[name])
        picture = out / f"{seen.name}_slices.png"
        contact.write(
            picture,
            seen.stacks[found.used],
            title=f"{seen.name}: " + ", ".join(f"{name} {p:.3f}" for name, p in named.items()),
            channels=self.made.shards["channels"],
            places=found.used + 1,
            total=len(seen.stacks),
            attention=found.attention,
        )
        return {
            "probabilities": named,
            "most_probable": likely,
            "slices": {"of": len(seen.stacks), "used": (found.used + 1).tolist()},
            "attention": None if found.attention is None else found.attention.tolist(),
            "head_sha256": self.head_sha256,
            "files": {"picture": picture.name},
            **finished_cell.provenance(self.made, self.judge.source),
        }


def _require_kept(made: Trained, head: Path) -> None:
    cell, spec = made.manifest["cell"], made.manifest["spec"]
    if cell["init"] in ("covariates", "volumes"):
        raise UserError(
            "NO_HEAD", f"{made.cell.path.name} looks at {cell['init']}, not at slices; name another"
        )
    finished_cell.require_kept(made, head, f"adapt.{cell['adaptation']}.keep" if "keep" in spec else None)


class Features:
    """A probe on the features of a frozen backbone, in batches as `embed` makes them."""

    def __init__(
        self, made: Trained, machine: Machine, task: Classification, spec: Probe | Knn | Attention, head: Path
    ) -> None:
        self.about, self.task, self.source = made.embedded, task, made.embedded["source"]
        self.shown = made.shown
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone = finished_cell.backbone(made, machine).to(self.device).eval()
        self.probe = probing.load(spec, head)

    def __call__(self, seen: new_scans.Seen) -> Judged:
        parts = [
            embed.encode(
                self.backbone,
                seen.filled(stacks, self.about["fill"], self.shown).numpy(),
                self.about["features"],
                self.about["batch_size"],
                self.device,
            )
            for stacks in seen.groups
        ]
        values = np.concatenate(parts)
        every = np.arange(len(values))
        if isinstance(self.probe, AttentionProbe):
            bag = Bags(values, np.zeros(len(values), np.int64))
            return Judged(self.probe.predict(bag)[0], every, self.probe.attention(bag))
        return Judged(self.probe.predict(probing.pool(values, self.task.pool)[None])[0], every, None)


class Network:
    """A network that was trained from the pixels: what it started from, and over it what it learnt."""

    def __init__(
        self, made: Trained, machine: Machine, task: Classification, spec: Finetune, head: Path
    ) -> None:
        self.spec, self.shown = spec, made.shown
        self.start, self.source = finished_cell.start(made, machine)
        self.model, found = tuning.build(
            self.start,
            spec,
            made.shards["shape"],
            pool=task.pool,
            num_classes=len(task.classes),
            seed=made.manifest["cell"]["seed"],
        )
        if self.source:
            finished_cell.require_same(self.source, found)
        tuning.load(self.model, head)

    def __call__(self, seen: new_scans.Seen) -> Judged:
        used = sessions.spread(len(seen.stacks), self.spec.max_slices)
        stacks = seen.filled(seen.stacks[used], self.start.fill, self.shown)
        probabilities, attention = tuning.judged(self.model, stacks, self.spec)
        return Judged(probabilities, used, attention)


Judge = Features | Network
