"""A finished cell and what it was made from: enough to judge a scan that it has never seen, as it judges its own."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

import cranium
from cranium import adapt, checkpoint, sessions, store, tuning
from cranium.config import Ingest, Machine, Segmentation, UserError
from cranium.models.vit import Backbone
from cranium.store import Artefact

LIBRARIES = ("torch", "timm", "numpy", "nibabel", "SimpleITK")


@dataclass(frozen=True)
class Trained:
    """A finished cell in the store `home`, the shard set of its cohort, the features or tokens it was learnt on."""

    home: Path
    cell: Artefact

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        return self.cell.manifest()

    @functools.cached_property
    def shards(self) -> dict[str, Any]:
        """Manifest of its cohort's shard set."""
        return store.read_manifest(self.shard_set)

    @functools.cached_property
    def embedded(self) -> dict[str, Any]:
        """Manifest of the features or tokens of its cohort. A network that was trained has none: `start` instead."""
        (_, made), *_ = self.manifest["inputs"]
        return store.read_manifest(self.home / "embed" / made)

    @property
    def shard_set(self) -> Path:
        (name, _), *_ = self.manifest["inputs"]
        return self.home / "ingest" / str(name)

    @property
    def segmentation(self) -> Segmentation:
        classes = {name: self.manifest["task"]["classes"][name] for name in self.manifest["classes"]}
        return Segmentation.model_validate(self.manifest["task"] | {"classes": classes})  # in their order

    @property
    def ingest(self) -> Ingest:
        return Ingest(**self.shards["preprocessing"])

    @property
    def shown(self) -> int:
        """The contrasts that it learnt from: bits of `present`."""
        return sessions.bits(self.manifest["cell"]["contrasts"], self.shards["channels"])

    @functools.cached_property
    def patterns(self) -> frozenset[int]:
        """Which of these its cohort's sessions have together."""
        return frozenset(bits & self.shown for bits in self._sessions(self.shard_set)["present"].tolist()) - {
            0
        }

    def known(self, sources: Mapping[str, Mapping[str, Any]]) -> dict[str, str] | None:
        """The subject of the cell's own cohorts whose file one of these scans is, by content; and its part."""
        hashes = {scan["sha256"] for scan in sources.values()}
        for name, _ in self.manifest["inputs"]:
            for row in self._sessions(self.home / "ingest" / name).to_dict("records"):
                if hashes & {scan["sha256"] for scan in json.loads(row["sources"]).values()}:
                    who = {key: str(row[key]) for key in ("cohort", "subject", "session")}
                    judged = pd.read_parquet(self.cell.path / adapt.PREDICTIONS)
                    mine = judged[(judged["cohort"] == who["cohort"]) & (judged["subject"] == who["subject"])]
                    return who | {"part": "training" if mine.empty else str(mine["role"].iloc[0])}
        return None

    @staticmethod
    def _sessions(shard_set: Path) -> pd.DataFrame:
        columns = ["cohort", "subject", "session", "present", "sources"]
        return pd.read_parquet(shard_set / "sessions.parquet", columns=columns)


def find(folder: Path, run: str) -> Trained:
    """The finished cell of the store `folder` with this name, or with the eight hex digits at its end."""
    wanted = run.removeprefix("run:")
    cells = [made for made in store.find(folder, "adapt") if made.path.name.endswith(wanted)]
    if len(cells) != 1:
        raise UserError(
            "NO_RUN", f"{run} names {len(cells)} finished cells of {folder / 'adapt'}; give a folder's name"
        )
    return Trained(folder, cells[0])


def backbone(trained: Trained, machine: Machine) -> Backbone:
    """The frozen backbone that a cell's features or tokens are of."""
    source = trained.embedded["source"]
    channels, slices, size, _ = trained.shards["shape"]
    made, found = checkpoint.load_backbone(
        source["init"],
        arch=source["arch"],
        in_channels=channels * slices,
        image_size=size,
        seed=trained.embedded["seed"],
        weights_file=machine.weights,
        pretrained=pretrained(trained, source),
    )
    require_same(source, found)
    return made


def pretrained(trained: Trained, source: Mapping[str, Any]) -> Artefact | None:
    """The pretraining of this store that weights come from, if they do."""
    if source["init"] in ("random", "dinov2", "imagenet"):
        return None
    made = Artefact(trained.home / source["name"])
    if not made.done:
        raise UserError("NO_WEIGHTS", f"{made.id}, whose weights the cell learnt with, is not in this store")
    return made


def start(trained: Trained, machine: Machine) -> tuple[tuning.Start, dict[str, Any] | None]:
    """Where a network that was trained started, and what is written down of the weights it started from."""
    facts = trained.manifest["start"]
    source: dict[str, Any] | None = facts["source"]
    before = pretrained(trained, source) if source else None
    return tuning.again(facts, machine.weights, before.path if before else None), source


def require_kept(trained: Trained, head: Path, key: str | None) -> None:
    """Raises `UserError` where a cell has not kept what it learnt (NO_HEAD), which `key` asks for, or it changed."""
    name, sha256 = trained.cell.path.name, trained.manifest.get("head_sha256")
    if sha256 is None:
        mend = f"run its sweep with {key}=true" if key else "run its sweep again"
        raise UserError("NO_HEAD", f"{name} has not kept what it learnt; {mend}")
    if not head.is_file() or store.sha256(head) != sha256:
        raise UserError("WEIGHTS_DAMAGED", f"{head} is not what the cell kept; remove the cell, sweep again")


def require_same(source: Mapping[str, Any], found: checkpoint.Source | None) -> None:
    """Raises `UserError(WEIGHTS)` unless these are the weights that the cell learnt with."""
    sha256 = found and found.sha256
    if sha256 != source["sha256"]:
        raise UserError("WEIGHTS", f"the cell learnt with the weights {source['sha256']}, these are {sha256}")


def provenance(trained: Trained, source: Mapping[str, Any] | None) -> dict[str, Any]:
    """What stands beside every prediction of where it is from."""
    task = trained.manifest["task"]
    return {
        "run": trained.cell.path.name,
        "run_manifest_sha256": store.sha256(trained.cell.path / store.MANIFEST),
        "cell": trained.manifest["cell"],
        "task": task,
        "weights": source,
        "shard_set": trained.shard_set.name,
        "shard_set_manifest_sha256": store.sha256(trained.shard_set / store.MANIFEST),
        "shard_set_recipe": trained.shards["recipe"],
        "preprocessing": trained.shards["preprocessing"],
        "preprocessing_hash": trained.shards["preprocessing_hash"],
        "code_version": cranium.__version__,
        "versions": {name: version(name) for name in LIBRARIES},
        "note": "made for research; not a medical device",
    }
