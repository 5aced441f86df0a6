"""The course of a pretraining so far, from its folder: what was logged, what is wrong, and what it is read against."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cranium import journals, monitor, training
from cranium.config import Experiment, Pretrain
from cranium.dinov2 import health
from cranium.figures.health import Limits
from cranium.models.architectures import ARCHITECTURES
from cranium.store import Artefact
from cranium.training import JOURNAL, START

PLANNED = 200  # points of a schedule

Metrics = dict[str, dict[int, float]]  # metric -> step -> value


@dataclass(frozen=True)
class Attempt:
    """One start of the run: the first step it made, and what it logged (void entries included)."""

    name: str
    resume: int
    entries: int
    last: int | None
    began: float | None
    ended: float | None


@dataclass(frozen=True)
class Course:
    """A pretraining as its folder shows it now."""

    made: Artefact
    exp: Experiment
    init: str
    shard_sets: tuple[Artefact, ...]
    stopped: str = ""  # why it ended early
    failed: bool = False  # and not because it was asked to

    @property
    def spec(self) -> Pretrain:
        assert self.exp.pretrain
        return self.exp.pretrain

    @cached_property
    def entries(self) -> list[journals.Entry]:
        return journals.read(self.made.path / JOURNAL)

    @cached_property
    def attempts(self) -> list[Attempt]:
        return [_attempt(path) for path in sorted((self.made.path / JOURNAL).glob("*.jsonl"))]

    @cached_property
    def alarms(self) -> list[health.Alarm]:
        found = [(entry.step, dict(entry.metrics)) for entry in self.entries]
        dim = ARCHITECTURES[self.spec.arch].dim
        return health.alarms(found, steps=self.spec.steps, prototypes=self.spec.loss.prototypes, dim=dim)

    @cached_property
    def history(self) -> Metrics:
        return by_metric(self.entries)

    @cached_property
    def looks(self) -> Metrics:
        """Of the teacher; step 0 is the backbone it started from."""
        return by_metric(journals.read(self.made.path / monitor.FOLDER / JOURNAL))

    @property
    def lost_looks(self) -> dict[int, str]:
        """Steps whose look failed, and why."""
        files = sorted((self.made.path / monitor.FOLDER).glob(f"*/{monitor.MEASURED}"))
        found = {int(path.parent.name): json.loads(path.read_text()) for path in files}
        return {step: values[monitor.FAILED] for step, values in found.items() if monitor.FAILED in values}

    @property
    def resumes(self) -> list[int]:
        """The first step of every start of the run but the first."""
        return [attempt.resume for attempt in self.attempts[1:]]

    @property
    def start(self) -> dict[str, Any]:
        """Where the first weights came from; empty before they were loaded."""
        path = self.made.path / START
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    @property
    def done(self) -> int:
        """Steps done and logged."""
        return self.entries[-1].step + 1 if self.entries else 0

    def median(self, metric: str) -> float | None:
        values = self.history.get(metric)
        return statistics.median(values.values()) if values else None


def _attempt(path: Path) -> Attempt:
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    head = lines[0] if lines else {}
    logged = lines[1:]
    times = [line["time"] for line in logged] or [None]
    return Attempt(
        str(head.get("attempt", path.stem)),
        int(head.get("resume", 0)),
        len(logged),
        logged[-1]["step"] if logged else None,
        times[0],
        times[-1],
    )


def by_metric(entries: Sequence[journals.Entry]) -> Metrics:
    """Finite values by metric and step."""
    found: Metrics = {}
    for entry in entries:
        for name, value in entry.metrics.items():
            if math.isfinite(value):
                found.setdefault(name, {})[entry.step] = value
    return found


def limits(spec: Pretrain) -> Limits:
    """What the signs of collapse can reach under these settings, and where they alarm."""
    dim, entropy = ARCHITECTURES[spec.arch].dim, math.log(spec.loss.prototypes)
    spread, images = 1 / math.sqrt(dim), 2 * spec.batch_size
    return Limits(
        entropy=entropy,
        collapsed=health.COLLAPSED * entropy,
        uniform=health.UNIFORM * entropy,
        prototypes=min(1.0, images / spec.accumulate / spec.loss.prototypes),
        spread=spread,
        flat=health.FLAT * spread,
        rank=min(dim, images // spec.compute.num_workers),
        line=health.LINE,
        clip=spec.optimiser.clip,
        starved=health.STARVED,
    )


def plan(spec: Pretrain) -> Metrics:
    """What the schedules of these settings say, at some 200 steps."""
    schedule = training.rates(spec.optimiser, spec.loss, spec.steps, spec.batch_size)
    planned: Metrics = {}
    for step in range(0, spec.steps, max(1, spec.steps // PLANNED)):
        now = schedule.at(step)
        for name in ("lr", "weight_decay", "momentum", "teacher_temperature"):
            planned.setdefault(f"train/{name}", {})[step] = getattr(now, name)
    return planned
