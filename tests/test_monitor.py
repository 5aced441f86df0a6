"""What a look at the teacher reads: position and contrast where they are there to be read, subjects held out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from cranium import monitor
from cranium.config import Experiment, Monitor
from shards import shard_set


class Reader(nn.Module):
    """A "backbone" whose CLS token is the second pixel of the first channel (the slice) and channel means."""

    patch_size = 14
    sees: bool = True

    def forward(self, x: Tensor) -> Any:
        slices = x[:, 0, 0, 1] if self.sees else torch.zeros(len(x))
        return SimpleNamespace(cls=torch.stack([slices * 255, torch.ones(len(x)) * 5], 1), patches=x[:, :1])


def test_position_is_read_when_features_hold_it_and_not_otherwise(tmp_path: Path) -> None:
    made = shard_set(tmp_path)
    spec = Monitor(cohort="tiny", stacks=240)
    reader = Reader()
    seen = monitor.measure(reader, made.path, spec)  # type: ignore[arg-type]
    assert seen["monitor/knn_position"] > 0.9
    assert seen["monitor/knn_contrast"] == pytest.approx(1 / 3, abs=0.15)  # the pixels are noise
    reader.sees = False
    assert monitor.measure(reader, made.path, spec)["monitor/knn_position"] == pytest.approx(0.2, abs=0.05)  # type: ignore[arg-type]


def test_rows_are_spread_over_sessions_and_bounded(tmp_path: Path) -> None:
    made = shard_set(tmp_path)
    rows = monitor._rows(made.path, made.manifest(), 60, 1)
    assert len(rows["stacks"]) == 60 and len(set(rows["subject"].tolist())) == 12
    assert rows["position"].min() < 0.2 and rows["position"].max() > 0.8
    few = monitor._rows(made.path, made.manifest(), 6, 1)
    assert len(set(few["subject"].tolist())) == len(few["stacks"]) == 6
    assert len(set(few["position"].tolist())) == 6  # not the lowest slice of each
    deep = monitor._rows(made.path, made.manifest(), 32, 8)
    assert Counter(deep["subject"].tolist()) == dict.fromkeys(("000", "004", "007", "011"), 8)


def test_rows_are_those_that_the_shards_hold(tmp_path: Path) -> None:
    """The first pixel says the session, the second the slice; a session lies in several row groups."""
    made = shard_set(tmp_path, group_rows=7)
    rows = monitor._rows(made.path, made.manifest(), 120, 1)
    assert [f"{n:03d}" for n in rows["stacks"][:, 0, 0, 0, 0].tolist()] == rows["subject"].tolist()
    assert rows["stacks"][:, 0, 0, 0, 1].tolist() == pytest.approx((rows["position"] * 20).tolist())
    assert Counter(rows["subject"].tolist()) == {f"{n:03d}": 10 for n in range(12)}


def test_each_present_contrast_alone_in_every_channel() -> None:
    stacks = np.arange(2 * 3).reshape(2, 3, 1, 1, 1).astype(np.uint8)
    (alone, index), channel = monitor._single_contrasts(stacks, np.array([0b111, 0b101]), 10)
    assert index.tolist() == [0, 1, 2, 3, 5] and channel.tolist() == [0, 1, 2, 0, 2]
    assert alone[:, :, 0, 0, 0].tolist() == [[v] * 3 for v in (0, 1, 2, 3, 5)]


def test_labels_by_subject_with_subjects_held_out(tmp_path: Path) -> None:
    subjects = [f"{n:02d}" for n in range(20)]
    table = {"subject": subjects, "session": [""] * 20, "dx": ["ill" if n % 2 else "well" for n in range(20)]}
    pd.DataFrame(table).to_parquet(tmp_path / "sessions.parquet")
    label = {"column": "dx", "classes": {"well": ["well"], "ill": ["ill"]}}
    (tmp_path / "manifest.json").write_text(
        json.dumps(
            {"schema_version": 1, "cohort": "tiny", "card": {"labels": {"dx": label}, "matched": None}}
        )
    )
    manifest = {"cohort": "tiny", "card": {"labels": {"dx": label}}}
    rng = np.random.default_rng(0)
    signal = np.array([n % 2 for n in range(20)]).repeat(3)
    cls = np.stack([signal + 0.1 * rng.normal(size=60), rng.normal(size=60)], 1)
    rows = {"subject": np.repeat(subjects, 3)}
    found = monitor._labels(cls, rows, tmp_path, manifest, "dx")
    assert found["monitor/linear_dx"] == 1.0 and found["monitor/knn_dx"] > 0.8
    pd.DataFrame({**table, "dx": [None] * 20}).to_parquet(tmp_path / "sessions.parquet")
    assert monitor._labels(cls, rows, tmp_path, manifest, "dx") == {}
    pd.DataFrame(table).to_parquet(tmp_path / "sessions.parquet")
    few = np.flatnonzero(np.isin(rows["subject"], subjects[:9]))  # five and four: one class is too few
    assert monitor._labels(cls[few], {"subject": rows["subject"][few]}, tmp_path, manifest, "dx") == {}


def test_a_tested_cohort_is_not_looked_at() -> None:
    content = {
        "name": "x",
        "ingest": {"cohorts": ["a", "b"]},
        "pretrain": {"cohorts": ["a"], "compute": {"monitor": {"cohort": "b"}}},
        "adapt": {
            "tasks": [
                {"task": "classification", "name": "t", "cohort": "b", "label": "dx", "classes": ["p", "q"]}
            ]
        },
    }
    with pytest.raises(ValueError, match="chosen on the test"):
        Experiment.model_validate(content)
    content["ingest"]["cohorts"] = ["a", "b", "c"]  # type: ignore[index]
    content["pretrain"]["compute"]["monitor"]["cohort"] = "c"  # type: ignore[index]
    assert Experiment.model_validate(content).pretrain
