from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cranium import inventory, store, sweep_progress
from cranium.config import Machine
from cranium.store import Artefact
from test_sweep import experiment


@pytest.fixture
def sweep(tmp_path: Path) -> Artefact:
    made = Artefact(tmp_path / "sweep" / "grid-0badcafe")
    sweep_progress.announce(made, (tmp_path / "adapt" / f"cell-{n}" for n in range(5)))
    return made


def commit(root: Path, number: int) -> None:
    folder = root / "adapt" / f"cell-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    store.commit(folder, {})


def test_failed_cells_are_told_apart_from_missing_ones_until_they_are_done(
    sweep: Artefact, tmp_path: Path
) -> None:
    cells = [tmp_path / "adapt" / f"cell-{n}" for n in range(5)]
    commit(tmp_path, 0)
    sweep_progress.failed(cells[1], "ValueError: no")
    (cells[2] / "search").mkdir(parents=True)  # begun, then killed
    assert sweep_progress.of(tmp_path, sweep) == sweep_progress.Progress(1, 1, 3, False, None)
    assert '"ValueError: no"' in (cells[1] / sweep_progress.FAILURE).read_text()
    commit(tmp_path, 1)  # and the process died before it could tidy up
    assert sweep_progress.of(tmp_path, sweep) == sweep_progress.Progress(2, 0, 3, False, None)
    sweep_progress.mended(cells)
    assert not (cells[1] / sweep_progress.FAILURE).exists()
    assert sweep_progress.of(tmp_path, Artefact(tmp_path / "sweep" / "another-00000000")) is None


def test_who_holds_the_lock_is_running_and_its_pace_gives_the_time_left(
    sweep: Artefact, tmp_path: Path
) -> None:
    commit(tmp_path, 0)
    old = time.time() - 1000
    os.utime(tmp_path / "adapt" / "cell-0" / store.MANIFEST, (old, old))  # of an earlier attempt
    script = (
        "import sys, pathlib; from cranium import store\n"
        "with store.lock(pathlib.Path(sys.argv[1]), 'sweep/grid-0badcafe'): print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == b"1\n"
        begun = sweep_progress.of(tmp_path, sweep)
        assert begun and begun.running and begun.eta is None  # nothing done yet by this one
        since = time.time() - 60
        os.utime(store.lock_file(tmp_path, sweep.id), (since, since))
        commit(tmp_path, 1)
        commit(tmp_path, 2)
        going = sweep_progress.of(tmp_path, sweep)
        assert going and going.done == 3 and going.eta == pytest.approx(60, abs=5)  # 2 in a minute, 2 left
        (line,) = inventory.status(experiment(), Machine(store=tmp_path))
        assert line[:2] == ("sweep", "grid-0badcafe")
        assert line[2].startswith("begun: running, 3 of 5 cells done, 0 failed, 2 missing, ETA ")
        holder.communicate(b"\n")
    ended = sweep_progress.of(tmp_path, sweep)
    assert ended and not ended.running and ended.eta is None
