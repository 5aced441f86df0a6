"""Row P7: an ingest killed by SIGKILL at any point leaves no visible half, and goes on to what a calm one makes.

The points are before and after each call that changes the file system (rename, link, unlink, fsync, mkdir, rmtree),
drawn with a seed; `test_soak` kills at random times, Ray and all.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ingests
import kills
import phantoms
from cranium import store, trust
from cranium.config import Machine
from cranium.store import Artefact

pytestmark = pytest.mark.chaos

POINTS = 50


class Killer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes = multiprocessing.get_context(
            "forkserver"
        )  # no threads of this process in the forked ones
        self.processes.set_forkserver_preload(["kills"])

    def __call__(self, raw: Path, home: Path, point: int = 0) -> int:
        """0 when it came to the end, else -9; `points` tells how many it passed then."""
        told = self.folder / "told"
        process = self.processes.Process(target=kills.ingest, args=(raw, home, point, told))
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        if process.exitcode == 0:
            self.points = int(told.read_text())
        return process.exitcode


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.pathsep.join(path for path in sys.path if path)
        )  # the server's preload needs it
        yield Killer(tmp_path_factory.mktemp("told"))


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`new` has two subjects more than `old`; the first seven share files and times."""
    root = tmp_path_factory.mktemp("trees")
    new = phantoms.bids_tree(root, "new", num_subjects=7, contrasts=("T1w",), missing=(), tilt=False)
    shutil.copytree(new, root / "old")
    for subject in ("sub-006", "sub-007"):
        shutil.rmtree(root / "old" / subject)
    return root


def visible(home: Path) -> list[str]:
    """Finished sets, each of them whole."""
    found = store.find(home, "ingest")
    problems = [problem for made in found for problem in trust.verify(made)]
    assert {problem.code for problem in problems} <= {"SHARD_UNKNOWN"}  # killed before it could sweep up
    return [made.id for made in found]


def finished(home: Path, but: list[str]) -> Artefact:
    (made,) = [made for made in store.find(home, "ingest") if made.id not in but]
    return made


@pytest.mark.parametrize("before", ["nothing", "an older version"])
def test_killed_at_random_points(killer: Killer, trees: Path, tmp_path: Path, before: str) -> None:
    old = tmp_path / "old"
    if before == "an older version":
        ingests.plainly(trees / "old", Machine(store=old))
    else:
        old.mkdir()
    was = visible(old)
    calm = tmp_path / "calm"
    shutil.copytree(old, calm)
    assert killer(trees / "new", calm) == 0
    expected = ingests.content(finished(calm, was))
    points = sorted(np.random.default_rng(len(was)).choice(killer.points, POINTS // 2, replace=False) + 1)
    assert killer.points > 60
    for point in map(int, points):
        home = tmp_path / "home"
        shutil.copytree(old, home)
        assert killer(trees / "new", home, point) == -signal.SIGKILL, point
        seen = visible(home)
        assert seen == was or len(seen) == len(was) + 1, point
        assert killer(trees / "new", home) == 0
        made = finished(home, was)
        assert ingests.content(made) == expected, point
        assert {p.name for p in made.path.iterdir()} == {
            *map(lambda f: f.split("/")[0], expected),
            "verified.json",
        }
        shutil.rmtree(home)


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(killer: Killer, trees: Path, tmp_path: Path, seed: int) -> None:
    """Each attempt lives for some points more than the last one left to do; the end is the same."""
    calm, home = tmp_path / "calm", tmp_path / "home"
    assert killer(trees / "new", calm) == 0
    rng, deaths = np.random.default_rng(seed), 0
    while killer(trees / "new", home, int(rng.integers(8, 40))) != 0:
        deaths += 1
        assert deaths < 100, "it never gets any further"
    assert deaths >= 5
    assert ingests.content(finished(home, [])) == ingests.content(finished(calm, []))
