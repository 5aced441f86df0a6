"""Row R13: Ray's own monitor ends workers because a node runs low on memory. It is said, with the number to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import phantoms
from random_kills import Command

pytestmark = pytest.mark.chaos

EXPERIMENT = {
    "name": "memory",
    "ingest": {"cohorts": ["ssl"], "contrasts": ["T1w"], **phantoms.COARSE},
    "stream": {"lanes": 4, "window": 3},
    "pretrain": {**phantoms.PRETRAIN, "steps": 2},
}


def test_what_runs_low_on_memory_says_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node is asked to keep to 1 % of its memory, which it uses already; Ray would try for ever."""
    phantoms.bids_tree(tmp_path, "ssl", num_subjects=4, contrasts=("T1w",), missing=())
    phantoms.write_card(tmp_path / "datasets", "ssl", contrasts=("T1w",))
    (tmp_path / "memory.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    logs = iter(range(10))

    def ends(verb: str) -> tuple[int, str]:
        words = [
            verb,
            str(tmp_path / "memory.yaml"),
            f"store={tmp_path / 'store'}",
            f"raw.ssl={tmp_path / 'ssl'}",
        ]
        command = Command(words, tmp_path / f"{next(logs)}.log")
        try:
            return command.wait(240), command.output.read_text()
        finally:
            command.end()

    for verb, setting in (
        ("ingest", "lower ingest.compute.num_workers (now 1)"),
        ("pretrain", "prefetch_batches"),
    ):
        with monkeypatch.context() as low:
            low.setenv("RAY_memory_usage_threshold", "0.01")
            low.setenv("RAY_memory_monitor_refresh_ms", "200")
            low.setenv("RAY_task_oom_retries", "1")  # not five, whose waits double
            code, said = ends(verb)
        assert code == 1 and "error OUT_OF_MEMORY: a node ran low on memory (" in said, said
        assert setting in said and "the same command goes on" in said
        code, said = ends(verb)
        assert code == 0, said
