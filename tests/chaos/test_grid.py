"""A sweep is killed at random, its driver with all of Ray or one of its trials, and ends as an undisturbed one.

`CHAOS_KILLS=20` makes it the full size.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

import gridded
from cranium import adapt, store, track

pytestmark = pytest.mark.chaos

KILLS = int(os.environ.get("CHAOS_KILLS", "3"))
CELLS = 50 * (KILLS + 1)


def begin(home: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    script = Path(gridded.__file__)
    log = (home.parent / f"{home.name}.log").open("ab")
    command = [sys.executable, str(script), str(home), str(CELLS)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log)


def kill(process: subprocess.Popen[bytes], trial: bool) -> None:
    """SIGKILL to one trial's process, or to the command and everything it started."""
    below = psutil.Process(process.pid).children(recursive=True)
    chosen = [one for one in below if trial and "_trial" in " ".join(one.cmdline())][:1]
    for one in chosen or [psutil.Process(process.pid), *below]:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    if not chosen:
        process.wait()


def results(home: Path) -> dict[str, pd.DataFrame]:
    _, grid = gridded.study(home, CELLS)
    assert not grid.missing and grid.artefact.done
    return {work.folder.name: pd.read_parquet(work.folder / adapt.PREDICTIONS) for work in grid.works}


def test_a_sweep_killed_at_random_ends_complete_with_every_cell_once(tmp_path: Path) -> None:
    calm, home = tmp_path / "calm", tmp_path / "killed"
    assert begin(calm).wait() == 0, (tmp_path / "calm.log").read_text()[-2000:]
    draw = random.Random(int(os.environ.get("CHAOS_SEED", "0")))
    deaths: list[int] = []

    def done() -> int:
        return len(list(home.glob(f"adapt/*/{store.MANIFEST}")))

    process = begin(home)
    for limit in sorted(draw.sample(range(1, CELLS), KILLS)):
        while process.poll() is None and done() < limit:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.2))
        if process.poll() is None:
            kill(process, trial=draw.random() < 0.25)
            deaths.append(done())
        if process.poll() is not None:
            process = begin(home)
    assert process.wait() == 0, (tmp_path / "killed.log").read_text()[-2000:]
    assert len(deaths) >= KILLS - 1 and max(deaths) > CELLS // 4, deaths

    undisturbed, made = results(calm), results(home)
    assert made.keys() == undisturbed.keys() and len(made) == CELLS
    for name, predictions in made.items():
        pd.testing.assert_frame_equal(predictions, undisturbed[name])
    told, _ = gridded.study(home, CELLS)
    tracker = track.Tracker(told.machine.tracking, told.exp.name)
    (parent,) = tracker._client.search_runs([tracker.experiment_id], "tags.stage = 'sweep'")
    cells = tracker.children(parent.info.run_id)
    assert parent.info.status == "FINISHED" and len(cells) == CELLS
    assert {cell.key for cell in cells} == {f"adapt/{name}" for name in made}
    assert {cell.status for cell in cells} == {"FINISHED"}
    print(f"{CELLS} cells, killed when {deaths} were done")
