"""A cohort is killed five times at random on its way, Ray and all, and ends equal to an undisturbed one.

200 scans by default; `CHAOS_SCANS=2000` makes it the full size. Prints how long both took.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import ingests
import phantoms
from cranium import store, trust
from cranium.store import Artefact

pytestmark = pytest.mark.chaos

SCANS = int(os.environ.get("CHAOS_SCANS", "200"))
KILLS = 5
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


def begin(raw: Path, home: Path, workers: int = 2) -> subprocess.Popen[str]:
    words = [
        "ingest",
        str(raw.parent / "datasets" / "phantom.yaml"),
        f"raw={raw}",
        f"store={home}",
        *SETTINGS,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "cranium.cli", *words, f"ingest.compute.num_workers={workers}", "--json"]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the command and everything it started, Ray's processes too."""
    below = psutil.Process(process.pid).children(recursive=True)
    for one in (psutil.Process(process.pid), *below):
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(below, timeout=30)
    process.communicate()


def done(home: Path) -> int:
    """Sessions read and shards packed so far."""
    folders = [folder / "work" for folder in home.glob("ingest/*")]
    return sum(1 for folder in folders for path in folder.glob("*.json") if path.name[0] in "0123456789s")


def finish(process: subprocess.Popen[str], home: Path) -> Artefact:
    output, _ = process.communicate()
    assert process.returncode == 3, output[-2000:]  # some scans are rejected
    (made,) = store.find(home, "ingest")
    return made


def test_a_cohort_killed_five_times_ends_as_an_undisturbed_one(raw: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    calm = finish(begin(raw, tmp_path / "calm"), tmp_path / "calm")
    undisturbed = time.monotonic() - started
    shards = len(calm.manifest()["shards"])
    seed = int(os.environ.get("CHAOS_SEED", "0"))
    draw = random.Random(seed)
    home, deaths = tmp_path / "killed", []
    started = time.monotonic()
    for limit in sorted(draw.sample(range(1, SCANS + shards), KILLS)):
        process = begin(raw, home)
        while process.poll() is None and done(home) < limit:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.2))
        if process.poll() is None:
            kill(process)
            deaths.append(done(home))
        assert store.find(home, "ingest") == [] or done(home) == 0, "something is visible before its time"
    made = finish(begin(raw, home), home)
    disturbed = time.monotonic() - started
    assert len(deaths) >= KILLS - 1 and max(deaths) > SCANS // 4, deaths
    assert made.id == calm.id and trust.verify(made) == []
    assert ingests.content(made) == ingests.content(calm)
    counts = made.manifest()["counts"]
    assert counts["scans"] == SCANS and counts["rejected"] == len(range(7, SCANS, 50))
    print(f"{SCANS} scans: {undisturbed:.1f} s undisturbed; killed at {deaths}: {disturbed:.1f} s in all")
