"""Journals of pretrainings that never ran, for tests of the page on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cranium.config import Experiment
from cranium.course import Course
from cranium.store import Artefact
from shards import shard_set

STEPS, LOGGED = 400, 2


def experiment(asks: str = "") -> Experiment:
    return Experiment.model_validate(
        {
            "name": "tiny",
            "asks": asks,
            "ingest": {"cohorts": ["tiny"]},
            "pretrain": {
                "cohorts": ["tiny"],
                "inits": ["scratch"],
                "arch": "vit_tiny_patch14",
                "steps": STEPS,
                "batch_size": 32,
                "loss": {"prototypes": 512},
                "optimiser": {"lr": 0.004, "momentum": [0.95, 1.0]},
            },
        }
    )


def values(step: int, rng: np.random.Generator) -> dict[str, float]:
    """What a healthy run of this size looks like."""
    decay = np.exp(-step / 120)
    smooth = {
        "train/loss": 7.5 + 5 * decay,
        "train/dino_global": 3.6 + 2.4 * decay,
        "train/dino_local": 3.7 + 2.3 * decay,
        "train/ibot": 3.5 + 2.6 * decay,
        "train/koleo": -0.4 + decay / 2,
        "train/target_entropy": 3.4 + 2.6 * decay,
        "train/prototypes_used": 0.09 - 0.05 * decay,
        "train/feature_std": 0.055 - 0.02 * decay,
        "train/effective_rank": 24 - 14 * decay,
        "train/grad_norm_backbone": 1.1 + 2 * decay,
        "train/grad_norm_dino_head": 0.4 + decay,
    }
    noisy = {name: float(value * (1 + 0.03 * rng.normal())) for name, value in smooth.items()}
    used = {
        "train/lr": 7e-4 * min(1, step / 30),
        "train/weight_decay": 0.04 + 0.36 * step / STEPS,
        "train/momentum": 0.95 + 0.05 * step / STEPS,
        "train/teacher_temperature": min(0.07, 0.04 + 0.03 * step / 96),
    }
    speed = {"sys/stacks_per_second": float(38 + 3 * rng.normal()), "sys/data_wait_share": 0.004}
    return noisy | used | {key: float(value) for key, value in speed.items()}


def attempt(run: Path, number: int, first: int, last: int, changed: dict[str, float] | None = None) -> None:
    """One segment of the journal, steps `first` to `last`; `changed` holds from 10 entries before its end."""
    rng = np.random.default_rng(number)
    lines = [{"resume": first, "attempt": f"a{number}"}]
    for step in range(first, last, LOGGED):
        odd = changed if changed and step >= last - 40 * LOGGED else {}
        moment = 1.7e9 + number * 600 + step
        lines.append(
            {
                "step": step,
                "metrics": values(step, rng) | (odd or {}),
                "time": moment,
                "attempt": f"a{number}",
            }
        )
    (run / "journal").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "journal" / f"{number}-a.jsonl").write_text(text)


def look(run: Path, step: int, found: dict[str, float]) -> None:
    folder = run / "monitor" / "journal"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"resume": step, "attempt": "m"},
        {"step": step, "metrics": found, "time": 1.7e9, "attempt": "m"},
    ]
    (folder / f"{step:08}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def course(
    root: Path,
    changed: dict[str, float] | None = None,
    *,
    asks: str = "",
    stopped: str = "",
    failed: bool = False,
) -> Course:
    """A run of 400 steps that was restarted at step 160, with four looks; `changed` is what its last entries say."""
    run = root / "pretrain" / "scratch-vit_tiny_patch14-0badcafe"
    attempt(run, 1, 0, 200)
    attempt(run, 2, 160, STEPS, changed)
    for step in (0, 100, 200, 400):
        position, patient = 0.42 + 0.25 * (step / 400) ** 0.5, 0.55 + 0.2 * step / 400
        found = {"monitor/knn_position": position, "monitor/knn_contrast": 0.93 + 0.05 * step / 400}
        look(run, step, found | {"monitor/knn_site": patient, "monitor/linear_site": patient + 0.06})
    start = {"init": "random", "name": "random (seed 0)", "arch": "vit_tiny_patch14", "position": "timm"}
    (run / "start.json").write_text(json.dumps(start))
    return Course(Artefact(run), experiment(asks), "scratch", (shard_set(root),), stopped, failed)
