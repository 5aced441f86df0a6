"""What the journals of pretraining runs look like."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from . import plots, style
from .page import Plate, Table

PANELS = {
    "train/loss": "loss",
    "train/dino_global": "DINO, global crops",
    "train/ibot": "iBOT, masked patches",
    "train/koleo": "KoLeo",
    "train/target_entropy": "entropy of targets",
    "train/lr": "learning rate",
}
POINTS = 300  # of a line; more would only make the page heavy


def read(folder: Path) -> dict[int, dict[str, float]]:
    """Metrics by step from all `*.jsonl` segments below `folder`, oldest first.

    A segment that says `resume` voids the older entries from that step on; a torn last line is left out.
    """
    steps: dict[int, dict[str, float]] = {}
    for path in sorted(folder.rglob("*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            entry = json.loads(line)
            if "resume" in entry:
                steps = {step: metrics for step, metrics in steps.items() if step < entry["resume"]}
            if "metrics" in entry:
                steps.setdefault(int(entry["step"]), {}).update(entry["metrics"])
    return dict(sorted(steps.items()))


def plate(runs: Mapping[str, Path]) -> Plate | None:
    """Training curves of the runs, init -> folder; None when no run has written a metric."""
    histories = {name: read(folder) for name, folder in runs.items()}
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    rows: list[tuple[object, ...]] = []
    for key, label in PANELS.items():
        for name, history in histories.items():
            values = [
                (float(step), float(metrics[key])) for step, metrics in history.items() if key in metrics
            ]
            if values:
                stride = -(-len(values) // POINTS)
                kept = values[:-1:stride] + values[-1:]
                panels.setdefault(label, {})[name] = ([s for s, _ in kept], [v for _, v in kept])
                rows.append((name, label, len(values), values[0][1], values[-1][1]))
    if not panels:
        return None
    tints = {name: style.colour(name) for name in runs}
    return Plate(
        "Pretraining",
        "A line is one run over its optimiser steps; each panel is one quantity on its own scale. "
        "Entropy near 0 would mean collapsed targets.",
        plots.histories(panels, tints, "Training curves of pretraining"),
        (Table(("run", "quantity", "entries", "first", "last"), tuple(rows), "training"),),
    )
