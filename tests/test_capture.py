"""What a captured step says, and what is refused as one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cranium import capture, corpora, pretrain, replay, stream
from cranium.config import Machine, Stream, UserError
from cranium.volume import plan
from shards import shard_set
from test_pretrain import experiment


def made(step: int = 3, **changed: object) -> capture.Capture:
    rows = ({"cohort": "tiny", "subject": "001", "session": "", "slice": 7},)
    facts = {"seed": 0, "workers": 2, "checkpoint": 2, "skipped": False, "rows": rows}
    return capture.Capture(
        step, terms={"loss": math.nan, "ibot": -math.inf, "koleo": 0.5}, **(facts | changed)
    )  # type: ignore[arg-type]


def test_it_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = capture.write(tmp_path, made())
    assert path == tmp_path / "nonfinite" / "00000003.json"
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    back = capture.read(path)
    assert math.isnan(back.terms["loss"]) and back.terms["ibot"] == -math.inf and back.terms["koleo"] == 0.5
    assert back.wrong == ["loss", "ibot"] and back.rows == made().rows and back.checkpoint == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": 1, "terms": {}}'])
def test_what_is_no_capture_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    for wrong in (path, tmp_path / "absent.json"):
        with pytest.raises(UserError, match="is no capture of a step") as refused:
            capture.read(wrong)
        assert refused.value.code == "CAPTURE"


def test_rows_follow_the_plan_through_epochs(tmp_path: Path) -> None:
    """Every row of an epoch once, never more of a session in a step than is allowed."""
    corpus = corpora.corpus([shard_set(tmp_path)])
    order = stream.order(Stream(lanes=4, window=3), 8, seed=3)
    steps = plan.steps(corpus.sessions, order, 0)
    for epoch in range(2):
        found = [list(capture.rows(corpus, order, epoch * steps + step)) for step in range(steps)]
        assert all(len(rows) == 8 for rows in found)
        every = [tuple(row.values()) for rows in found for row in rows]
        assert len(set(every)) == len(every) == 8 * steps
        assert {row["slice"] for rows in found for row in rows} <= set(range(20))


def test_a_capture_of_another_run_or_without_its_checkpoint_is_refused(tmp_path: Path) -> None:
    machine, shards = Machine(store=tmp_path / "store"), [shard_set(tmp_path / "shards")]
    exp = experiment()
    elsewhere = capture.write(machine.store / "pretrain" / "scratch-other", made())
    with pytest.raises(UserError, match="of another run"):
        replay.replay(exp, machine, "scratch", shards, elsewhere)
    run = pretrain.artefact(exp, machine, "scratch", shards).path
    path = capture.write(run, made())
    with pytest.raises(UserError, match="keeps no checkpoint from before step 3"):
        replay.replay(exp, machine, "scratch", shards, path)
