from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cranium.stream import READERS
from shards import shard_set

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


def overlap(reads: list[dict]) -> int:
    """The most reads under way at one moment."""
    moves = sorted([(r["started"], 1) for r in reads] + [(r["ended"], -1) for r in reads], key=lambda m: m)
    now = most = 0
    for _, change in moves:
        now += change
        most = max(most, now)
    return most


def test_workers_read_on_their_own_nodes_and_two_jobs_do_not_starve(tmp_path: Path):
    """Three nodes on loopback. All pixels a worker uses are read, and so live, on its own node; the head reads none."""
    made = shard_set(tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT / "tests")]),
    }
    script = ROOT / "tests" / "ray" / "nodes.py"
    run = subprocess.run(
        [sys.executable, str(script), str(made.path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    workers = found["workers"]
    assert [w["rows"] for w in workers] == [
        60 * 4
    ] * 4  # both jobs ended, each worker with its half of every batch
    assert len({w["node"] for w in workers}) == 2
    for worker in workers:
        nodes = {read["node"] for read in worker["reads"]}
        assert nodes == {worker["node"]} and found["head"] not in nodes
        assert overlap(worker["reads"]) <= READERS
