"""Runs moved from one tracking store into another are the same runs, and moved once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cranium import cli, track, track_move
from cranium.journals import Journal
from cranium.track import Tracker

STEPS = 1200  # more points than one batch takes


def quiet(done: int, total: int, text: str) -> None:
    pass


@pytest.fixture
def laptop(mlflow_db: str, tmp_path: Path) -> str:
    """A pretraining with a curve and a page, and a sweep of two cells, one failed."""
    tracker = Tracker(mlflow_db, "study")
    run = tracker.run("pretrain/x", "pretrain x", {"stage": "pretrain"})
    tracker.params(run, {"lr": "0.001", "long": "y" * 5000})
    with Journal(tmp_path / "journal") as journal:
        for step in range(STEPS):
            journal.metrics(step, {"train/loss": 1 / (step + 1)})
    tracker.replay(run, tmp_path / "journal")
    (tmp_path / "health.html").write_text("well")
    tracker.artefact(run, tmp_path / "health.html")
    tracker.finish(run)
    parent = tracker.run("sweep/s", "sweep", {"stage": "sweep"})
    for number, status in enumerate(("FINISHED", "FAILED")):
        tags = {"fold": str(number), "init": "random"}
        tracker.record(
            f"adapt/{number}",
            f"cell {number}",
            parent,
            tags,
            {"fold": str(number)},
            {"test/auroc": 0.5},
            status,
        )
    return mlflow_db


@pytest.fixture
def server(_empty_mlflow: Path, tmp_path: Path) -> str:
    (tmp_path / "server").mkdir()
    shutil.copy(_empty_mlflow, tmp_path / "server" / "mlflow.db")
    return f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}"


def content(uri: str, name: str = "study") -> dict[str, Any]:
    """All of an experiment's runs by their old id, as plain values; ids of parents as names of runs."""
    client = track.connected(uri)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    names = {run.info.run_id: run.info.run_name for run in runs}
    found = {}
    for run in runs:
        tags = {k: v for k, v in run.data.tags.items() if k not in (track_move.MOVED, track_move.WHOLE)}
        if track.PARENT in tags:
            tags[track.PARENT] = names[tags[track.PARENT]]
        points = {
            (metric, point.step, point.value, point.timestamp)
            for metric in run.data.metrics
            for point in client.get_metric_history(run.info.run_id, metric)
        }
        files = {item.path: item.file_size for item in client.list_artifacts(run.info.run_id)}
        times = (run.info.start_time, run.info.end_time, run.info.status)
        old = run.data.tags.get(track_move.MOVED, run.info.run_id)
        found[old] = (tags, dict(run.data.params), points, files, times)
    return found


def test_a_moved_run_is_the_same_run(laptop: str, server: str) -> None:
    before = content(laptop)
    assert track_move.move(laptop, server, quiet) == {"moved": 4, "there": 0}
    assert content(server) == before == content(laptop)
    points = next(found[2] for found in before.values() if found[3])
    assert len(points) == STEPS


def test_a_second_move_moves_what_is_new(laptop: str, server: str) -> None:
    track_move.move(laptop, server, quiet)
    Tracker(laptop, "study").run("pretrain/y", "later", {"stage": "pretrain"})
    assert track_move.move(laptop, server, quiet) == {"moved": 1, "there": 4}
    assert content(server) == content(laptop)


def test_a_move_that_was_cut_goes_on(laptop: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, plain = 0, Tracker.send

    def cut(self: Tracker, *rest: Any) -> None:
        nonlocal sent
        sent += 1
        if sent == 3:
            raise OSError("the server is gone")
        plain(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "send", cut)
        with pytest.raises(track.TrackingError, match="the server is gone"):
            track_move.move(laptop, server, quiet)
    track_move.move(laptop, server, quiet)
    assert content(server) == content(laptop)


def test_a_run_whose_journal_was_sent_there_is_not_doubled(laptop: str, server: str, tmp_path: Path) -> None:
    tracker = Tracker(server, "study")
    run = tracker.run("pretrain/x", "pretrain x", {"stage": "pretrain"})
    tracker.replay(run, tmp_path / "journal")
    track_move.move(laptop, server, quiet)
    found = content(server)
    assert len(found) == 4 and len(next(one[2] for one in found.values() if one[3])) == STEPS
    # and what is computed later finds the moved run by its key
    assert tracker.run("pretrain/x", "pretrain x", {"stage": "pretrain"}) == run


def test_the_command_says_what_it_did(laptop: str, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main(["track", "move", laptop, *words])
        return int(ended.value.code or 0)

    assert command(f"tracking_uri={server}") == 0 and "4 runs moved" in capsys.readouterr().out
    assert command(f"tracking_uri={server}") == 0 and "0 runs moved" in capsys.readouterr().out
    assert command() == 2
