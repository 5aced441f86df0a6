"""Journal first: what was written survives kills and resumes, and reaches MLflow once."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cranium import journals, track
from cranium.config import UserError
from cranium.journals import Journal
from cranium.track import Tracker


def _steps(folder: Path) -> list[tuple[int, str]]:
    return [(entry.step, entry.attempt) for entry in journals.read(folder)]


def test_a_resume_voids_what_the_checkpoint_does_not_hold(tmp_path: Path) -> None:
    with Journal(tmp_path, "a") as journal:
        for step in range(1, 6):
            journal.metrics(step, {"train/loss": 10.0 - step})
    with Journal(tmp_path, "b", resume=3) as journal:
        for step in range(3, 5):
            journal.metrics(step, {"train/loss": 0.0})
    assert _steps(tmp_path) == [(1, "a"), (2, "a"), (3, "b"), (4, "b")]
    with Journal(tmp_path, "c"):
        pass  # from scratch
    assert _steps(tmp_path) == []


def test_a_clock_that_is_set_back_does_not_void_what_came_after(  # R14
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noon = time.time_ns()
    for attempt, (hour, resume) in enumerate(((0, 1), (-2, 3), (-1, 4))):
        monkeypatch.setattr(time, "time_ns", lambda hour=hour: noon + hour * 3600 * 10**9)
        with Journal(tmp_path, str(attempt), resume) as journal:
            for step in range(resume, resume + 3):
                journal.metrics(step, {"train/loss": 1.0})
    assert _steps(tmp_path) == [(1, "0"), (2, "0"), (3, "1"), (4, "2"), (5, "2"), (6, "2")]


def test_a_torn_last_line_is_dropped_and_damage_elsewhere_refused(tmp_path: Path) -> None:
    with Journal(tmp_path, "a") as journal:
        journal.metrics(1, {"train/loss": 1.0})
        journal.metrics(2, {"train/loss": 2.0})
        path = journal.path
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        path.write_bytes(whole[:-cut])
        assert _steps(tmp_path) == [(1, "a")]
    path.write_bytes(whole.replace(b'{"step": 1', b'{"step" 1'))
    with pytest.raises(UserError) as refused:
        journals.read(tmp_path)
    assert refused.value.code == "JOURNAL" and "line 2" in str(refused.value)


def test_a_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "a")
    journal.metrics(1, {"train/loss": 1.5})
    assert journals.read(tmp_path)[0].metrics == {"train/loss": 1.5}  # not closed, as after a SIGKILL
    journal.close()


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    assert journals.read(tmp_path / "nothing") == []


def test_replay_sends_every_point_once(tmp_path: Path, mlflow_db: str) -> None:
    tracker = Tracker(mlflow_db, "study")
    run = tracker.run("pretrain/x", "x", {"stage": "pretrain"})
    folder = tmp_path / "journal"
    with Journal(folder, "a") as journal:
        for step in range(1, 701):
            journal.metrics(step, {"train/loss": 1 / step, "train/lr": float(step)})
    assert tracker.replay(run, folder) == 1400
    assert tracker.replay(run, folder) == 0
    with Journal(folder, "b", resume=500) as journal:  # repeats steps that were sent
        for step in range(500, 711):
            journal.metrics(step, {"train/loss": 1 / step, "train/lr": float(step)})
    assert tracker.replay(run, folder) == 20
    (folder / "sent.json").unlink()  # as if we had died between sending and remembering
    tracker.replay(run, folder)
    history = tracker.client.get_metric_history(run, "train/loss")
    assert sorted({point.step for point in history}) == list(range(1, 711))
    assert {point.step: point.value for point in history}[250] == 1 / 250


def test_what_mlflow_has_lost_is_sent_again_when_it_is_asked(tmp_path: Path, mlflow_db: str) -> None:
    database = Path(mlflow_db.removeprefix("sqlite:///"))
    run, folder = Tracker(mlflow_db, "study").run("pretrain/x", "x", {}), tmp_path / "journal"
    journal = Journal(folder, "a")
    for step in range(40):
        journal.metrics(step, {"train/loss": 1 / (step + 1)})
    Tracker(mlflow_db, "study").replay(run, folder)
    last_week = database.read_bytes()
    for step in range(40, 100):
        journal.metrics(step, {"train/loss": 1 / (step + 1), "train/lr": 0.1})
    journal.close()
    Tracker(mlflow_db, "study").replay(run, folder)
    database.write_bytes(last_week)

    tracker = Tracker(mlflow_db, "study")
    assert tracker.replay(run, folder) == 0  # we remember to have sent all of it
    assert tracker.replay(run, folder, ask=True) == 120
    history = tracker.client.get_metric_history(run, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(n, 1 / (n + 1)) for n in range(100)]
    assert tracker.replay(run, folder, ask=True) == tracker.replay(run, folder) == 0


def test_a_run_is_found_again_by_its_key(mlflow_db: str) -> None:
    tracker = Tracker(mlflow_db, "study")
    parent = tracker.run("sweep/x", "sweep x", {"a": "1"})
    assert Tracker(mlflow_db, "study").run("sweep/x", "sweep x", {"a": "2"}) == parent
    for fold in range(3):
        for _ in range(2):  # the second time nothing new
            tracker.record(
                f"cell/{fold}",
                f"cell {fold}",
                parent,
                {"fold": str(fold)},
                {"seed": "0"},
                {"test/auroc": fold / 4},
            )
    children = tracker.children(parent)
    assert [child.tags["fold"] for child in children] == ["0", "1", "2"]
    assert [child.metrics["test/auroc"] for child in children] == [0.0, 0.25, 0.5]
    assert {child.status for child in children} == {"FINISHED"} and {child.key for child in children} == {
        "cell/0",
        "cell/1",
        "cell/2",
    }
    assert Tracker(mlflow_db, "another").run("sweep/x", "sweep x", {}) != parent


def test_a_cell_whose_sender_was_killed_half_way_is_sent_once(
    mlflow_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(mlflow_db, "study")
    parent = tracker.run("sweep/x", "sweep x", {})
    cell = ("cell/0", "cell 0", parent, {"fold": "0"}, {"seed": "0"}, {"test/auroc": 0.75, "n_test": 8.0})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracker.client, "set_terminated", killed)
        tracker.record(*cell)
    time.sleep(0.01)  # MLflow takes a point for another where its time is another
    run = tracker.record(*cell)
    assert tracker.client.get_run(run).info.status == "FINISHED"
    assert [len(tracker.client.get_metric_history(run, name)) for name in cell[-1]] == [1, 1]


def test_what_was_not_sent_while_mlflow_was_away_comes_later_and_once(
    tmp_path: Path, mlflow_db: str
) -> None:  # T1
    folder, away = tmp_path / "journal", track.TrackingError("away")
    tracker = Tracker(mlflow_db, "study")
    run, send, answers = tracker.run("pretrain/x", "x", {}), tracker.send, [True, False, False, True]

    def sometimes(*given: object) -> None:
        if not answers.pop(0):
            raise away
        send(*given)

    with pytest.MonkeyPatch.context() as patch, Journal(folder, "a") as journal:
        patch.setattr(tracker, "send", sometimes)
        for step in range(40):
            journal.metrics(step, {"train/loss": 1 / (step + 1)})
            if step % 10 == 9:
                with contextlib.suppress(track.TrackingError):
                    tracker.replay(run, folder)
    assert answers == []
    history = tracker.client.get_metric_history(run, "train/loss")
    assert [(point.step, point.value) for point in history] == [(n, 1 / (n + 1)) for n in range(40)]


def test_params_tags_and_files(tmp_path: Path, mlflow_db: str) -> None:
    tracker = Tracker(mlflow_db, "study")
    run = tracker.run("k", "k", {})
    tracker.params(run, {f"p{i:03}": i for i in range(230)})  # beyond MLflow's 100 a call
    tracker.log(run, metrics={"cells": 4.0}, tags={"t": "x"}, params={"p000": "changed", "new": 1})
    (tmp_path / "resolved.yaml").write_text("name: x\n")
    tracker.artefact(run, tmp_path / "resolved.yaml")
    tracker.finish(run)
    found = tracker.client.get_run(run)
    assert len(found.data.params) == 231 and found.data.params["p000"] == "0", "params never change"
    assert (
        found.data.metrics["cells"] == 4.0 and found.data.tags["t"] == "x" and found.info.status == "FINISHED"
    )
    stored = list((tmp_path / track.ARTEFACTS).rglob("resolved.yaml"))
    assert [path.read_text() for path in stored] == ["name: x\n"], (
        "beside the database, not in the current folder"
    )


def test_where_one_lane_is_refused_the_others_stop_too(
    tmp_path: Path, mlflow_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after all they have, which may be that of a week: a signal has to end it as soon."""
    tracker, sent = Tracker(mlflow_db, "study"), list[str]()
    with Journal(tmp_path / "journal") as journal:
        for step in range(100):
            journal.metrics(step, dict.fromkeys("abcd", 0.5))
    monkeypatch.setattr(track, "_sqlite", lambda uri: None)  # as a server's
    monkeypatch.setattr(track, "MAX_METRICS", 4)  # a request a point

    def send(run_id: str, chunk: list[track.Point]) -> None:
        ((name, *_),) = chunk
        if name == "d":
            raise track.TrackingError("refused")
        time.sleep(0.05)
        sent.append(name)

    monkeypatch.setattr(tracker, "send", send)
    with pytest.raises(track.TrackingError, match="refused"):
        tracker.replay("run", tmp_path / "journal")
    assert len(sent) <= 30


def test_odd_names_long_values_and_what_is_no_number_are_taken(tmp_path: Path, mlflow_db: str) -> None:  # T4
    """A label of a card may be called anything; one refused name would keep the whole journal back."""
    tracker = Tracker(mlflow_db, "study")
    run, odd = tracker.run("k", "k", {}), "monitor/linear_diagnosis (1=AD), é:50%" + "x" * 300
    with Journal(tmp_path / "journal") as journal:
        for step in range(3):
            journal.metrics(step, {odd: 0.5, "train/loss": [1.0, math.nan, math.inf][step]})
    assert tracker.replay(run, tmp_path / "journal") == 6
    assert (
        tracker.replay(run, tmp_path / "journal") == tracker.replay(run, tmp_path / "journal", ask=True) == 0
    )
    for _ in range(2):
        tracker.log(run, {"cells (all)": 4.0}, params={"note": "y" * 10_000, "by <site>": "z"})
    data = tracker.client.get_run(run).data
    name = track.named(odd)
    assert name.startswith("monitor/linear_diagnosis _1_AD__ é_50_xxx") and len(name) == 250
    assert [p.value for p in tracker.client.get_metric_history(run, name)] == [0.5] * 3
    losses = [point.value for point in tracker.client.get_metric_history(run, "train/loss")]
    assert losses[0] == 1 and math.isnan(losses[1]) and losses[2] > 1e300
    assert data.params == {"note": "y" * 6000, track.named("by <site>"): "z"}
    assert len(tracker.client.get_metric_history(run, track.named("cells (all)"))) == 1
    clash = ["a (1)", "a [1]", "/a", "a//b", "a/b/", "..", "a/../b", ".", ""]
    tracker.log(run, {name: float(number) for number, name in enumerate(clash)})
    found = tracker.client.get_run(run).data.metrics
    assert [found[track.named(name)] for name in clash] == [float(number) for number in range(len(clash))]


def test_mlflow_down_fails_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(track.TrackingError) as down:
        Tracker("http://127.0.0.1:9", "study")
    assert time.monotonic() - started < 20 and "127.0.0.1:9" in str(down.value)


def test_an_unwritable_database_is_a_tracking_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database" * 100)
    with pytest.raises(track.TrackingError):
        Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "study")


KILLED_IN_THE_TABLES = """
import os, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
from cranium.track import connected

@event.listens_for(Engine, "after_cursor_execute")
def killed(connection, cursor, statement, *rest):
    if "CREATE TABLE _alembic_tmp_tags" in statement:
        os._exit(9)

connected(sys.argv[1])
"""


def test_a_database_that_was_killed_in_the_making_is_made_anew(tmp_path: Path) -> None:
    database = tmp_path / "store" / "mlflow.db"
    uri = f"sqlite:///{database}"
    assert subprocess.run([sys.executable, "-c", KILLED_IN_THE_TABLES, uri], timeout=120).returncode == 9
    assert not database.exists() and list(database.parent.iterdir()) != []
    tracker = Tracker(uri, "study")
    assert tracker.run("a", "a", {}) == Tracker(uri, "study").run("a", "a", {})
    assert {path.name for path in database.parent.iterdir()} == {"mlflow.db", "mlflow.lock"}


@given(
    st.recursive(
        st.integers() | st.text() | st.lists(st.integers()),
        lambda v: st.dictionaries(st.text("ab"), v),
        max_leaves=8,
    )
)
def test_flatten_keeps_every_leaf(value: object) -> None:
    def leaves(node: object) -> int:
        return sum(map(leaves, node.values())) if isinstance(node, dict) else 1

    flat = track.flatten({"x": value})
    assert len(flat) == leaves(value) and all(isinstance(text, str) for text in flat.values())


def test_runs_of_a_forgotten_subject(mlflow_db: str, tmp_path: Path) -> None:
    tracker = Tracker(mlflow_db, "tiny")
    runs = [tracker.run(f"key{i}", "sweep", {}) for i in range(2)]
    for name in ("splits.json", "resolved.yaml"):
        (tmp_path / name).write_text("{}")
        for run in runs:
            tracker.artefact(run, tmp_path / name)
    for _ in range(2):  # once more changes nothing
        track.forget(mlflow_db, runs[:1], "2026-11-24", ("splits.json",))
    client = track.connected(mlflow_db)
    assert [client.get_run(run).data.tags.get("forgotten") for run in runs] == ["2026-11-24", None]
    kept = [sorted(a.path for a in client.list_artifacts(run)) for run in runs]
    assert kept == [["resolved.yaml"], ["resolved.yaml", "splits.json"]]
    with pytest.raises(track.TrackingError):
        track.forget("http://127.0.0.1:9", runs, "2026-11-24", ())
