"""What tracking costs: a step's line in the journal, journals into MLflow, a run found among many.

`cranium bench track [uri= steps= runs= data= out=]`. Without `uri` an SQLite database of its own; a server at `uri`
keeps an experiment bench-*. The peer is what a training loop does that talks to MLflow itself.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pydantic import Field

from cranium import bench, journals, track

# What a step of a pretraining logs.
STEP = {name: math.pi for name in track.METRICS if name.startswith("train/")}
STEP |= {name: math.e for name in ("sys/stacks_per_second", "sys/data_wait_seconds", "sys/data_wait_share")}
CELL = {"stage": "adapt", "task": "lesion", "label_fraction": "0.1"}  # of its tags


class Spec(bench.Settings):
    uri: str | None = None
    steps: int = Field(5000, ge=100)
    runs: int = Field(10_000, gt=100)


def run(spec: Spec, say: Callable[[str], None]) -> bench.Result:
    """Measure the journal, the replay of it, and looking for runs while there are 100 and while there are all."""
    machine = bench.machine()
    folder = spec.data / "bench-track"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tracker = track.Tracker(spec.uri or f"sqlite:///{folder / 'mlflow.db'}", f"bench-{uuid.uuid4().hex[:8]}")
    turn = iter(range(10_000))

    def journal() -> None:
        _write(folder / f"journal-{next(turn)}", spec.steps)

    def replay() -> None:
        written = _write(folder / f"sent-{next(turn)}", spec.steps)
        sent = tracker.replay(tracker.run(written.name, written.name, {}), written)
        assert sent == spec.steps * len(STEP)

    few = max(20, spec.steps // 100)

    def itself() -> None:
        """One call a step: what MLflow's own loggers do."""
        run_id = tracker.run(f"itself-{next(turn)}", "itself", {})
        for step in range(few):
            tracker.send(run_id, [(name, value, step, step) for name, value in STEP.items()])

    measured = bench.measure(
        [
            bench.Case("journal", spec.steps, journal, "steps"),
            bench.Case("journal and replay", spec.steps * len(STEP), replay, "points", warm=False),
            bench.Case("a call a step", few * len(STEP), itself, "points", warm=False),
        ],
        spec.rounds,
        say,
    )
    measured += _many(tracker, spec.runs, say)
    shutil.rmtree(folder)
    return bench.Result(
        "track",
        "cranium bench track",
        spec.model_dump(mode="json", exclude={"data", "out", "uri"})
        | {"server": (spec.uri or "sqlite").partition(":")[0]},
        machine | {"load_after": bench.load()},
        measured,
        _targets({case.name: case for case in measured}),
    )


def _write(folder: Path, steps: int) -> Path:
    with journals.Journal(folder, "bench") as journal:
        for step in range(steps):
            journal.metrics(step, STEP)
    return folder


def _many(tracker: track.Tracker, runs: int, say: Callable[[str], None]) -> list[bench.Measured]:
    """Looking for one run by its key, and for a page of them by tags, with 100 runs there and with all."""
    found = [
        bench.Measured(f"{what}, {count:,} runs", 1, "searches")
        for count in (100, runs)
        for what in ("a run by its key", "100 runs by tags")
    ]
    made = 0
    parent = tracker.run("parent", "sweep", {})
    for count, (by_key, by_tags) in ((100, found[:2]), (runs, found[2:])):
        begun = time.perf_counter()
        while made < count:
            tags = CELL | {track.KEY: f"cell-{made}", track.PARENT: parent, "fold": str(made % 5)}
            tracker.client.create_run(tracker.experiment_id, run_name=f"cell {made}", tags=tags)
            made += 1
            if made % 1000 == 0:
                say(f"{made:,} runs made, {1000 / (time.perf_counter() - begun):,.0f} a second")
                begun = time.perf_counter()
        for turn in range(20):
            wanted = (turn * 7919) % count
            _timed(by_key, partial(tracker.run, f"cell-{wanted}", f"cell {wanted}", {}))
            asked = f"tags.task = 'lesion' and tags.fold = '{turn % 5}'"
            _timed(
                by_tags, partial(tracker.client.search_runs, [tracker.experiment_id], asked, max_results=100)
            )
    return found


def _timed(measured: bench.Measured, work: Callable[[], object]) -> None:
    cpu, wall = bench.tree_cpu(), time.perf_counter()
    work()
    measured.wall.append(time.perf_counter() - wall)
    measured.cpu.append(bench.tree_cpu() - cpu)


def _targets(measured: Mapping[str, bench.Measured]) -> list[bench.Target]:
    target = bench.Target
    journal, replay, itself = (measured[n] for n in ("journal", "journal and replay", "a call a step"))
    searches = [case for name, case in measured.items() if name.startswith("100 runs by tags")]
    few, many = (statistics.median(case.wall) for case in searches)
    return [
        target("points a second into MLflow", replay.per_second, 5000),
        target("ms of a training step for its line", 1000 / journal.per_second, 0.1, at_least=False),
        target(
            "a step's line over a call a step, by time",
            journal.per_second * len(STEP) / itself.per_second,
            100,
        ),
        target("s to find 100 of all runs by tags", many, 1, at_least=False),
        target("the same, over that of 100 runs", many / few, 10, at_least=False),
    ]
