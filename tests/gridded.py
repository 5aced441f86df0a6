"""A sweep in a process of its own, for others to kill: `python gridded.py STORE CELLS`. A second one goes on."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from cranium import bench_sweep, cluster, recording, sweep
from cranium.config import Machine
from cranium.study import Study


def study(home: Path, cells: int) -> tuple[Study, sweep.Grid]:
    spec = bench_sweep.Spec(cells=cells, subjects=100, dim=32)
    machine = Machine(store=home)
    exp = bench_sweep.experiment(spec)
    grid = sweep.declare(exp, machine, *bench_sweep.generated(home, spec))
    return Study(exp, machine, {}, Console(quiet=True)), grid


def main(home: Path, cells: int) -> None:
    told, grid = study(home, cells)
    with (
        cluster.connect(told.machine),
        recording.sweeping(told, grid, lambda done, total, text: None) as live,
    ):
        failures = sweep.sweep(grid, told.exp, live)
    recording.swept(told, grid, failures)
    assert not failures and not told.notes, (failures, told.notes)


if __name__ == "__main__":
    recording.LIVE_SECONDS = 1.0
    main(Path(sys.argv[1]), int(sys.argv[2]))
