"""Rows R13 and R14: a node low on memory; no HOME, another time zone, another locale."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import phantoms
from cranium import store
from random_kills import Command

pytestmark = pytest.mark.chaos

EXPERIMENT = {
    "name": "around",
    "ingest": {"cohorts": ["ssl"], "contrasts": ["T1w"], **phantoms.COARSE, "compute": {"num_workers": 2}},
    "stream": {"lanes": 4, "window": 3},
    "pretrain": {**phantoms.PRETRAIN, "steps": 2},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment, and `usual`: the store where it was done."""
    root = tmp_path_factory.mktemp("around")
    phantoms.bids_tree(root, "ssl", num_subjects=4, contrasts=("T1w",), missing=())
    phantoms.write_card(root / "datasets", "ssl", contrasts=("T1w",))
    (root / "around.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    for verb in ("ingest", "pretrain"):
        code, said = ends(root, verb, root / "usual")
        assert code == 0, said
    return root


def ends(base: Path, verb: str, home: Path) -> tuple[int, str]:
    words = [verb, str(base / "around.yaml"), f"store={home}", f"raw.ssl={base / 'ssl'}"]
    command = Command(words, home.with_name(f"{home.name}-{verb}.log"))
    try:
        return command.wait(240), command.output.read_text()
    finally:
        command.end()


def test_what_runs_low_on_memory_says_what_to_change(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node is asked to keep to 1 % of its memory, which it uses already; Ray would try for ever."""
    with monkeypatch.context() as low:
        low.setenv("RAY_memory_usage_threshold", "0.01")
        low.setenv("RAY_memory_monitor_refresh_ms", "200")
        low.setenv("RAY_task_oom_retries", "1")  # not five, whose waits double
        code, said = ends(base, "ingest", tmp_path / "store")
    assert code == 1 and "error OUT_OF_MEMORY: a node ran low on memory (" in said, said
    assert "lower ingest.compute.num_workers (now 2)" in said and "the same command goes on" in said
    code, said = ends(base, "ingest", tmp_path / "store")
    assert code == 0, said


def test_no_home_another_zone_and_another_locale_change_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/none")  # where nobody can make a folder, root neither
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    monkeypatch.setenv("LC_ALL", "C")
    for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR", "LANG"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "store"
    for stage in ("ingest", "pretrain"):
        code, said = ends(base, stage, home)
        assert code == 0, said
        ((ours,), (usual,)) = store.find(home, stage), store.find(base / "usual", stage)
        assert ours.path.name == usual.path.name
        facts = ("shards",) if stage == "ingest" else ("weights_sha256",)
        assert [ours.manifest()[fact] for fact in facts] == [usual.manifest()[fact] for fact in facts]
