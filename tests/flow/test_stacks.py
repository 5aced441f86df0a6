"""Three kinds of stack as a user compares them: one command, on phantoms of which some lack a contrast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import phantoms

pytestmark = pytest.mark.flow
STACKS = {"contrasts": [2, 1, 56, 56], "neighbours": [1, 3, 56, 56], "both": [2, 3, 56, 56]}
COHORTS = ("ssl", "home")
EXPERIMENT = {
    "name": "kinds",
    "asks": "what do neighbours add?",
    "ingest": {"cohorts": list(COHORTS), "contrasts": ["T1w", "FLAIR"], **phantoms.COARSE},
    "stream": {"lanes": 4, "window": 3},
    "pretrain": {**phantoms.PRETRAIN, "steps": 3},
    "adapt": {
        "tasks": [phantoms.LESION],
        "accept_leakage": ["head:ssl+test", "head:test+train"],  # phantoms share their three heads
    },
    "sweep": {
        "init": ["random", "scratch"],
        "label_fractions": [1.0],
        "folds": 2,
        "stack": list(STACKS),
        "neighbours_of": "T1w",
    },
    "report": {"bootstrap": 100},
}


def cranium(folder: Path, verb: str, *settings: str) -> subprocess.CompletedProcess[str]:
    facts = [f"store={folder / 'store'}", *(f"raw.{name}={folder / name}" for name in COHORTS)]
    command = [sys.executable, "-m", "cranium.cli", verb, str(folder / "kinds.yaml"), *facts, *settings]
    return subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)


def manifests(folder: Path, stage: str) -> list[dict]:
    return [
        json.loads(path.read_text()) for path in sorted((folder / "store" / stage).glob("*/manifest.json"))
    ]


@pytest.mark.timeout(900)
def test_three_kinds_of_stack_through_one_command(tmp_path: Path) -> None:
    # `neighbours` of T1w lacks two of home's people.
    lacking = {"ssl": (), "home": ((), ("T1w",), (), ("FLAIR",), (), ())}
    for seed, (name, missing) in enumerate(lacking.items()):
        phantoms.bids_tree(
            tmp_path,
            name,
            num_subjects=2 * len(missing) or 8,
            seed=seed,
            conditions=("control", "lesion"),
            contrasts=("T1w", "FLAIR"),
            missing=missing,
        )
        phantoms.write_card(tmp_path / "datasets", name, contrasts=("T1w", "FLAIR"))
    (tmp_path / "kinds.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    done = cranium(tmp_path, "run", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(done.stdout.splitlines()[-1])["made"]

    shards = manifests(tmp_path, "ingest")
    kinds = {(m["cohort"], m["preprocessing"]["stack"]): m for m in shards}
    assert set(kinds) == {(cohort, stack) for cohort in COHORTS for stack in STACKS}
    assert all(m["shape"] == STACKS[stack] for (_, stack), m in kinds.items())
    assert kinds["home", "neighbours"]["channels"] == ["T1w"]
    people = {stack: kinds["home", stack]["counts"]["subjects"] for stack in STACKS}
    assert people == {"contrasts": 12, "neighbours": 10, "both": 12}

    hashes = {stack: kinds["ssl", stack]["preprocessing_hash"] for stack in STACKS}
    trained = manifests(tmp_path, "pretrain")
    assert sorted(m["preprocessing_hash"] for m in trained) == sorted(hashes.values())
    assert len(manifests(tmp_path, "embed")) == 2 * 3

    cells = {}
    for path in (tmp_path / "store" / "adapt").glob("*/manifest.json"):
        cell = json.loads(path.read_text())["cell"]
        table = pd.read_parquet(path.with_name("predictions.parquet"))
        cells[cell["stack"], cell["init"], cell["fold"]] = tuple(sorted(table["subject"]))
    assert len(cells) == 3 * 2 * 2
    for fold in (0, 1):  # the same people in each fold of each kind of stack
        assert len({cells[stack, init, fold] for stack in STACKS for init in ("random", "scratch")}) == 1
    assert sum(len(cells["both", "random", fold]) for fold in (0, 1)) == 10
    page = Path(made["report"]).read_text()
    assert 'id="stacks"' in page and "scratch, both" in page and "scratch, neighbours" in page

    again = cranium(tmp_path, "run", "--json")
    assert again.returncode == 0 and json.loads(again.stdout.splitlines()[-1])["made"] == made
    assert "done before" in again.stdout and "pretrain scratch (both)" in again.stdout

    refused = cranium(tmp_path, "export", "out=" + str(tmp_path / "out"))
    assert refused.returncode == 2 and "stack=... one of contrasts, neighbours, both" in refused.stderr
    out = cranium(tmp_path, "export", "stack=both", "out=" + str(tmp_path / "out"), "--json")
    assert out.returncode == 0, out.stderr
    facts = json.loads(out.stdout.splitlines()[-1])
    assert "T1w, FLAIR; 3 slice(s) each" in Path(facts["card"]).read_text()
