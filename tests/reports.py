"""Inputs of a report that no experiment made: drawn heads, predictions of a known strength, a journal."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cranium import report
from cranium.tasks import metrics
from cranium.volume import shard

CHANNELS = ("T1w", "T2w", "FLAIR")
EVIL = "<script>alert(1)</script>"
SOURCE = "simulated from 4 source volumes (3 persons, 1 template)"


def head_picture(rng: np.random.Generator, size: int, channel: int) -> np.ndarray:
    """An ellipse with two darker or brighter holes: enough to look at."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    skull = (x / 0.72) ** 2 + (y / 0.9) ** 2
    picture = np.where(skull < 1, 120 + 40 * np.cos(9 * skull + channel), 0.0)
    for side in (-1, 1):
        hole = ((x - side * 0.16) / 0.1) ** 2 + (y / 0.32) ** 2
        picture = np.where(hole < 1, (50, 220, 20)[channel], picture)
    return np.clip(picture + rng.normal(0, 5, picture.shape) * (skull < 1), 0, 255).astype(np.uint8)


def cohort(
    store: Path, name: str, subjects: int, rejected: int = 0, evil: bool = False, size: int = 64
) -> Path:
    """A shard set of drawn heads."""
    rng = np.random.default_rng(len(name))
    folder = store / "ingest" / f"{name}-0badcafe"
    (folder / "shards").mkdir(parents=True)
    tables, sessions = [], []
    for number in range(subjects):
        present = (7, 7, 7, 3, 5, 1)[number % 6]
        subject = f"sub-{number:03d}" if number or not evil else f"sub-{EVIL}"
        pixels = np.stack([head_picture(rng, size, k) * (present >> k & 1) for k in range(3)])
        stacks = np.repeat(pixels[None, :, None], 3, axis=0)
        row = {"cohort": name, "subject": subject, "session": "ses-01", "num_slices": 3, "present": present}
        tables.append(shard.encode(stacks, channels=CHANNELS, slices=range(3), **row))
        condition = EVIL if evil and not number else ("control", "lesion")[number % 2]
        site = EVIL if evil else f"site-{'ab'[number % 2]}"
        sessions.append({**row, "site": site, "head": f"head-{number % 3}", "age": 50.0 + number % 30,
                         "sex": "FM"[number % 2], "condition": condition})  # fmt: skip
    shard.write(folder / "shards" / "a.parquet", tables)
    pq.write_table(pa.Table.from_pylist(sessions), folder / "sessions.parquet")
    bad = [{"path": f"sub-9{i}.nii.gz", "code": "GZIP_CRC", "reason": EVIL if evil else "checksum is wrong"}
           for i in range(rejected)]  # fmt: skip
    layout = pa.schema([(key, pa.string()) for key in ("path", "code", "reason")])
    pq.write_table(pa.Table.from_pylist(bad, layout), folder / "quarantine.parquet")
    counts = {
        "scans": 3 * subjects,
        "sessions": subjects,
        "subjects": subjects,
        "stacks": 3 * subjects,
        "rejected": rejected,
    }
    entry = {"file": "shards/a.parquet", "sha256": "", "rows": 3 * subjects, "row_groups": [3] * subjects}
    manifest = {
        "cohort": name,
        "counts": counts,
        "channels": CHANNELS,
        "preprocessing": {},
        "shards": [entry],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def cells(
    store: Path,
    strength: dict[str, float],
    scheme: str = "subject",
    fractions: Sequence[float] = (0.1, 0.25, 0.5, 1.0),
    subjects: int = 120,
    external: bool = True,
    evil: bool = False,
    num_folds: int = 5,
    adaptation: str = "linear",
    subsets: Sequence[tuple[str, ...]] = (),
    stack: str = "contrasts",
) -> list[Path]:
    """Predictions whose separation grows with the strength of an initialisation, with the labels and with contrasts.

    Of `subsets`: two thirds of the subjects have each of a subset's contrasts.
    """
    made = []
    for number, (init, gain) in enumerate(strength.items()):
        for fraction in fractions:
            for fold in range(num_folds):
                rng = np.random.default_rng([number, int(fraction * 100), fold])
                rows = []
                sides = [("test", "demo", subjects // num_folds), ("external", "demo_external", 36)]
                for subset, (role, where, count) in itertools.product(((), *subsets), sides[: 1 + external]):
                    seen = len(subset or CHANNELS) / len(CHANNELS)
                    count = count * 2 // 3 if subset else count
                    for i in range(count):
                        label = i % 2
                        shared = np.random.default_rng([fold if role == "test" else 99, i]).normal()
                        score = (
                            gain * seen * fraction**0.3 * (label - 0.5) + 0.8 * shared + 0.6 * rng.normal()
                        )
                        p = 1 / (1 + np.exp(-score))
                        name = f"sub-{fold}{i:03d}" if role == "test" else f"ext-{i:03d}"
                        if evil and not i:
                            name = EVIL + name
                        group = name if scheme == "subject" or role == "external" else f"head-{fold}"
                        rows.append({"cohort": where, "subject": name, "group": group, "role": role, "label": label,
                                     "subset": "+".join(subset),
                                     "prob_control": 1 - p, "prob_lesion": p})  # fmt: skip
                folder = (
                    store
                    / "adapt"
                    / f"lesion-{init.replace(':', '_')}-{adaptation}-{scheme}-{fraction:g}-{fold}-{stack}-0000000{fold}"
                )
                folder.mkdir(parents=True)
                table = pa.Table.from_pylist(rows)
                pq.write_table(table, folder / "predictions.parquet")
                frame = table.to_pandas()
                test = frame[(frame["role"] == "test") & (frame["subset"] == "")]
                n = max(2, round(fraction * subjects * (num_folds - 1) / num_folds))
                manifest = {
                    "cell": {"task": "lesion", "cohort": "demo", "init": init, "label_fraction": fraction,
                             "scheme": scheme, "adaptation": adaptation, "fold": fold, "seed": 0,
                             "contrasts": CHANNELS, "subsets": subsets, "fill": "zero",
                             "stack": stack},
                    "task": {"task": "classification", "name": EVIL if evil else "lesion",
                             "classes": ["control", "lesion"]},
                    "counts": {"n_train": n, "n_train_positive": n // 2, "n_validation": 0, "n_test": len(test)},
                    "metrics": {"test/auroc": metrics.auroc(test["label"], test["prob_lesion"])},
                }  # fmt: skip
                (folder / "manifest.json").write_text(json.dumps(manifest))
                made.append(folder)
    return made


def journal(store: Path, name: str, steps: int = 200) -> Path:
    folder = store / "pretrain" / f"{name}-12345678" / "journal"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    lines = [{"resume": 0}]
    for step in range(steps):
        decay = np.exp(-step / 80)
        values = {"train/loss": 6 + 5 * decay, "train/dino_global": 3 + 2 * decay, "train/ibot": 3 + 3 * decay,
                  "train/koleo": -0.4 + decay / 2, "train/target_entropy": 6 - decay,
                  "train/lr": 1e-3 * min(1, step / 30) * decay}  # fmt: skip
        noisy = {k: float(v + rng.normal(0, 0.02) * (k != "train/lr")) for k, v in values.items()}
        lines.append({"step": step, "metrics": noisy, "time": 0.0})
    (folder / "0-a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2')
    return folder.parent


def inputs(
    store: Path, strength: dict[str, float] | None = None, evil: bool = False, **more: object
) -> report.ReportInputs:
    if "cells" not in more:
        strength = strength or {"random": 0.7, "scratch": 2.4, "covariates": 0.0}
        more["cells"] = [
            *cells(store, strength, evil=evil),
            *cells(store, strength, scheme="head", num_folds=3, subjects=72, evil=evil),
        ]
    values: dict[str, object] = {
        "cohorts": [
            cohort(store, "demo_ssl", 30),
            cohort(store, "demo", 24, rejected=2, evil=evil),
            cohort(store, "demo_external", 12),
        ],
        "pretraining": {"scratch": journal(store, "scratch")},
        "source": SOURCE,
        "stamps": ["heads shared between folds and with SSL (grouped by subject)"],
        "notes": ["pycortex S1 could not be had: its archive was not found."],
        "seconds": {
            "demo": 62.0,
            "ingest": 48.0,
            "pretrain": 212.0,
            "embed": 14.0,
            "sweep": 33.0,
            "report": 4.2,
        },
        "config": "name: demo\nsweep:\n  inits: [random, scratch]\n",
        "git": "fc5fc78",
        "versions": {"cranium": "0.1.0", "torch": "2.14.1", "ray": "2.60.0"},
        "runs": {"pretraining scratch": "a" * 32},
        "mlflow_uri": "sqlite:////store/mlflow.db",
        "mlflow_ui": "http://127.0.0.1:5000",
        "mlflow_experiment": "1",
        "bootstrap": 400,
    }
    values["cell_runs"] = {cell.name: f"{i:032x}" for i, cell in enumerate(more["cells"])}  # type: ignore[arg-type, union-attr]
    return report.ReportInputs(**{**values, **more})  # type: ignore[arg-type]
