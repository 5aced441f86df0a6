"""Numbers of running work for Prometheus, by Ray's own exporter; nothing happens where Ray is not running.

`METERS` declares every one; Ray exports them as `ray_<name>` from each node, about every 10 s. Labels are few:
experiment, run, rank, and what a meter adds. Nothing is read back, so no result depends on them.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

EVERY = 2.0  # seconds between what is told by time; Ray exports every 10
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1200.0)  # buckets


@dataclass(frozen=True)
class Meter:
    """A counter ends in `_total`. A histogram is of seconds; Ray keeps its buckets exactly, its sum only about."""

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...]


RUN = ("experiment", "run")
WORKER = (*RUN, "rank")
METERS: Mapping[str, Meter] = {
    "cranium_running": Meter("gauge", "1 while the command works on this stage", (*RUN, "stage")),
    "cranium_pretrain_steps_done": Meter("gauge", "steps of this run that are done", RUN),
    "cranium_pretrain_steps_planned": Meter("gauge", "steps it will have made at its end", RUN),
    "cranium_pretrain_attempts": Meter(
        "gauge", "starts of this run; one more for every kill it outlived", RUN
    ),
    "cranium_pretrain_steps_skipped": Meter("gauge", "updates left out because they were not finite", RUN),
    "cranium_pretrain_step_seconds": Meter("histogram", "a step, waiting for its batch included", WORKER),
    "cranium_pretrain_stacks_total": Meter("counter", "slice stacks that went through a step", WORKER),
    "cranium_pretrain_loop_seconds_total": Meter(
        "counter", "time of the loop by its part", (*WORKER, "part")
    ),
    "cranium_pretrain_loss": Meter("gauge", "loss by term; total is their weighted sum", (*RUN, "term")),
    "cranium_pretrain_gradient_norm": Meter("gauge", "before clipping", (*RUN, "module")),
    "cranium_pretrain_learning_rate": Meter("gauge", "of the last block", RUN),
    "cranium_pretrain_weight_decay": Meter("gauge", "of the weights that decay", RUN),
    "cranium_pretrain_teacher_momentum": Meter("gauge", "of the teacher's moving average", RUN),
    "cranium_pretrain_teacher_temperature": Meter("gauge", "that its targets are sharpened with", RUN),
    "cranium_pretrain_target_entropy_ratio": Meter(
        "gauge", "of the teacher's targets: 0 collapsed, 1 uniform", RUN
    ),
    "cranium_pretrain_prototypes_used_ratio": Meter(
        "gauge", "prototypes that are some target's largest", RUN
    ),
    "cranium_pretrain_feature_spread_ratio": Meter(
        "gauge", "of unit CLS features: 0 collapsed, 1 uses every direction", RUN
    ),
    "cranium_pretrain_effective_rank": Meter("gauge", "of the teacher's CLS features; 1 is collapsed", RUN),
    "cranium_stream_batches_total": Meter("counter", "batches handed to a worker", WORKER),
    "cranium_stream_late_batches_total": Meter("counter", "of them, those it had to wait for", WORKER),
    "cranium_stream_pixels_bytes_total": Meter("counter", "pixels in them", WORKER),
    "cranium_stream_busy_seconds_total": Meter(
        "counter", "reading and assembling, rather than waiting for the worker to take a batch", WORKER
    ),
    "cranium_sweep_cells": Meter(
        "gauge", "cells of the grid by state: done, failed, missing", (*RUN, "state")
    ),
    "cranium_sweep_cell_seconds": Meter("histogram", "one cell that was done", ("experiment", "adaptation")),
    "cranium_sweep_cell_failures_total": Meter(
        "counter", "cells that ended in an error; each is tried twice", ("experiment", "adaptation")
    ),
    "cranium_tracking_lag_seconds": Meter("gauge", "since MLflow last had all there was", RUN),
    "cranium_tracking_points_total": Meter("counter", "values of metrics that MLflow took", RUN),
}

_made: dict[str, Any] = {}
_held: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}  # gauges as they were last set
_lock = threading.Lock()
_holder: threading.Thread | None = None


def put(name: str, value: float, labels: Mapping[str, str]) -> None:
    """Set the gauge, add to the counter or observe in the histogram of this name."""
    global _holder
    if not _exporting():
        return
    _record(name, value, labels)
    if METERS[name].kind == "gauge":
        with _lock:
            _held[name, frozenset(labels.items())] = value
            if _holder is None:
                _holder = threading.Thread(target=_hold, daemon=True, name="meters")
                _holder.start()


def _exporting() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _record(name: str, value: float, labels: Mapping[str, str]) -> None:
    from ray.util import metrics

    meter = METERS[name]
    match meter.kind:
        case "gauge":
            if name not in _made:
                _made[name] = metrics.Gauge(name, meter.text, meter.labels)
            _made[name].set(value, dict(labels))
        case "counter":
            if name not in _made:  # Ray adds `_total` itself
                _made[name] = metrics.Counter(name.removesuffix("_total"), meter.text, meter.labels)
            if value > 0:
                _made[name].inc(value, dict(labels))
        case "histogram":
            if name not in _made:
                _made[name] = metrics.Histogram(name, meter.text, list(SECONDS), meter.labels)
            _made[name].observe(value, dict(labels))


def _hold() -> None:
    """Set every gauge again and again: Ray exports it once each time it is set, and drops it 20 s later."""
    while True:
        time.sleep(EVERY)
        with _lock:
            if not _exporting():
                _held.clear()
            held = dict(_held)
        for (name, labels), value in held.items():
            _record(name, value, dict(labels))


@contextmanager
def running(stage: str, experiment: str, run: str) -> Iterator[None]:
    """Say that a stage is being worked on, until the body ends."""
    labels = {"experiment": experiment, "run": run, "stage": stage}
    put("cranium_running", 1.0, labels)
    try:
        yield
    finally:
        put("cranium_running", 0.0, labels)


# ---- pretraining ----------------------------------------------------------------------------------------------------

# Of a journal's entry: its name there -> the gauge, and what of it.
GAUGES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "train/loss": ("cranium_pretrain_loss", {"term": "total"}),
    **{
        f"train/{term}": ("cranium_pretrain_loss", {"term": term})
        for term in ("dino_global", "dino_local", "ibot", "koleo")
    },
    **{
        f"train/grad_norm_{module}": ("cranium_pretrain_gradient_norm", {"module": module})
        for module in ("backbone", "dino_head", "ibot_head")
    },
    "train/lr": ("cranium_pretrain_learning_rate", {}),
    "train/weight_decay": ("cranium_pretrain_weight_decay", {}),
    "train/momentum": ("cranium_pretrain_teacher_momentum", {}),
    "train/teacher_temperature": ("cranium_pretrain_teacher_temperature", {}),
    "train/target_entropy": ("cranium_pretrain_target_entropy_ratio", {}),
    "train/prototypes_used": ("cranium_pretrain_prototypes_used_ratio", {}),
    "train/feature_std": ("cranium_pretrain_feature_spread_ratio", {}),
    "train/effective_rank": ("cranium_pretrain_effective_rank", {}),
    "train/skipped": ("cranium_pretrain_steps_skipped", {}),
}


class Loop:
    """What one worker of a pretraining exports: of every step its time, the rest when it logs."""

    def __init__(
        self,
        labels: Mapping[str, str],
        full: Mapping[str, float],
        done: int,
        planned: int,
        stacks: int,
        attempts: int,
    ) -> None:
        """`labels`: experiment, run, rank. `full`: what a value of the journal is a share of, by its name there.

        `done` steps of `planned` are made, each of `stacks` of this worker; this is the run's start number `attempts`.
        """
        self._labels, self._full = dict(labels), full
        self._run = {name: labels[name] for name in RUN}
        self._done, self._planned, self._stacks = done, planned, stacks
        self._spent: dict[str, float] = {}
        self._due = 0.0
        if labels["rank"] == "0":
            put("cranium_pretrain_attempts", attempts, self._run)
            put("cranium_pretrain_steps_planned", planned, self._run)

    def step(self, done: int, seconds: float, spent: Mapping[str, float]) -> None:
        """The step that makes it `done`, in `seconds`; `spent` are those of the loop so far, by part."""
        put("cranium_pretrain_step_seconds", seconds, self._labels)
        now = time.monotonic()
        if now < self._due and done < self._planned:
            return
        self._due = now + EVERY
        put("cranium_pretrain_stacks_total", (done - self._done) * self._stacks, self._labels)
        self._done = done
        for part, total in spent.items():
            more = total - self._spent.get(part, 0.0)
            put("cranium_pretrain_loop_seconds_total", more, {**self._labels, "part": part})
            self._spent[part] = total
        if self._labels["rank"] == "0":
            put("cranium_pretrain_steps_done", done, self._run)

    def entry(self, values: Mapping[str, float]) -> None:
        """What the journal was given."""
        for name, value in values.items():
            if found := GAUGES.get(name):
                put(found[0], value / self._full.get(name, 1.0), {**self._run, **found[1]})


def batch(labels: Mapping[str, str], nbytes: int, seconds: float) -> None:
    """A batch of so many bytes of pixels, that took `seconds` to read and assemble."""
    put("cranium_stream_batches_total", 1, labels)
    put("cranium_stream_pixels_bytes_total", nbytes, labels)
    put("cranium_stream_busy_seconds_total", seconds, labels)
