"""Row P7 at random times: a cohort's ingest is killed, one process of it or all, and ends equal to an undisturbed one.

200 scans and five kills by default; `CHAOS_SCANS=2000 CHAOS_KILLS=20` for the full size, `CHAOS_LOG=FILE` for a line of
JSON a kill. Prints how long it took, undisturbed and not.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

import ingests
import phantoms
import random_kills
from cranium import store, trust
from random_kills import Command, Disturbed

pytestmark = pytest.mark.chaos

SCANS = int(os.environ.get("CHAOS_SCANS", "200"))
KILLS = random_kills.kills(5)
SETTINGS = (
    "ingest.size=56",
    "ingest.spacing_mm=4",
    "ingest.slice_spacing_mm=4",
    "ingest.shard_mb=4",
    "ingest.align=none",
    "ingest.mask=[supplied]",
)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One T1w scan a subject: ten heads, every scan with noise of its own. One in fifty cannot be read."""
    root = tmp_path_factory.mktemp("raw") / "phantom"
    grid, heads = phantoms.affine(), range(min(10, SCANS))
    labels = [phantoms.tissues(phantoms.head(seed), (44, 52, 40), grid) for seed in heads]
    rows = ["participant_id\tage\tsex\tsite\thead\tcondition"]
    for number in range(SCANS):
        name, of = f"sub-{number:05}", labels[number % len(labels)]
        path = phantoms.write(
            root / name / "anat" / f"{name}_T1w.nii.gz", phantoms.intensities(of, "T1w", number), grid
        )
        mask = root / "derivatives/masks" / name / "anat" / f"{name}_T1w_mask.nii.gz"
        phantoms.write(mask, (of >= 2).astype(np.uint8), grid)
        if number % 50 == 7:
            path.write_bytes(path.read_bytes()[:-100])
        rows.append(f"{name}\t{50 + number % 40}\tF\tsite{number % 2}\thead{number % 10}\tcontrol")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    phantoms.write_card(root.parent / "datasets", contrasts=("T1w",))
    return root


def done(home: Path) -> int:
    """Sessions read and shards packed so far."""
    folders = [folder / "work" for folder in home.glob("ingest/*")]
    return sum(1 for folder in folders for path in folder.glob("*.json") if path.name[0] in "0123456789s")


def test_a_cohort_killed_at_random_ends_as_an_undisturbed_one(raw: Path, tmp_path: Path) -> None:
    logs = iter(range(1000))

    def begin(home: Path) -> Command:
        words = ["ingest", str(raw.parent / "datasets" / "phantom.yaml"), f"raw={raw}", f"store={home}"]
        return Command([*words, *SETTINGS, "ingest.compute.num_workers=2"], tmp_path / f"{next(logs)}.log")

    started = time.monotonic()
    quiet = begin(tmp_path / "calm")
    assert quiet.wait(3600) == 3, quiet.output.read_text()[-2000:]  # some scans are rejected
    undisturbed = time.monotonic() - started
    (calm,) = store.find(tmp_path / "calm", "ingest")
    shards = len(calm.manifest()["shards"])
    home = tmp_path / "killed"

    def over() -> bool:
        return bool(store.find(home, "ingest"))

    def check() -> None:
        """Nothing is visible before its time, and what is, is whole: no more is left to do than to sweep up."""
        for made in store.find(home, "ingest"):
            assert made.id == calm.id and {problem.code for problem in trust.verify(made)} <= {
                "SHARD_UNKNOWN"
            }

    draw = random.Random(random_kills.SEED)
    plan = random_kills.plan(draw, KILLS)
    ingesting = Disturbed("ingest", lambda: begin(home), lambda: done(home), SCANS + shards, over, check)
    started = time.monotonic()
    hits = ingesting.run(plan, draw)
    took = time.monotonic() - started
    assert hits >= KILLS - 1  # what is left to do at the very end is soon over
    (made,) = store.find(home, "ingest")
    assert made.id == calm.id and trust.verify(made) == []
    assert ingests.content(made) == ingests.content(calm)
    counts = made.manifest()["counts"]
    assert counts["scans"] == SCANS and counts["rejected"] == len(range(7, SCANS, 50))
    random_kills.write(
        stage="ingest", scans=SCANS, kills=hits, undisturbed_s=round(undisturbed), disturbed_s=round(took)
    )
