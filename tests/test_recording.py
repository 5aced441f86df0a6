from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

import pytest
from rich.console import Console

from cranium import config, journals, recording, store, sweep, track
from cranium.study import Study
from test_sweep import experiment, features, sets


@pytest.fixture
def study(tmp_path: Path, mlflow_db: str) -> Study:
    machine = config.Machine(store=tmp_path / "store", tracking_uri=mlflow_db)
    return Study(experiment(label_fractions=[1.0]), machine, {}, Console(quiet=True))


@pytest.fixture
def grid(study: Study) -> sweep.Grid:
    root = study.machine.store
    return sweep.declare(study.machine, [sweep.Part(study.exp, sets(root), features(root))])


def finish(work: object, **more: object) -> None:
    work.folder.mkdir(parents=True)
    made = {"metrics": {"test/auroc": 0.5}, "counts": {"n_train": 4, "n_test": 2}}
    store.commit(work.folder, made | more)


def told(study: Study, grid: sweep.Grid) -> tuple[str, dict[str, track.Run]]:
    """The status of the sweep's run, and its cells by key."""
    tracker = track.Tracker(study.machine.tracking, study.exp.name)
    parent = tracker.client.search_runs([tracker.experiment_id], "tags.stage = 'sweep'")
    assert len(parent) == 1
    cells = tracker.children(parent[0].info.run_id)
    assert len({cell.key for cell in cells}) == len(cells)
    return parent[0].info.status, {cell.key: cell for cell in cells}


def test_cells_are_seen_while_the_sweep_goes_on_and_every_run_ends_as_it_did(
    study: Study, grid: sweep.Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "LIVE_SECONDS", 0.0)
    first, *others = grid.works
    key = {work.folder.name: f"adapt/{work.folder.name}" for work in grid.works}
    with (
        pytest.raises(KeyboardInterrupt),
        recording.sweeping(study, grid, lambda done, total, text: None) as live,
    ):
        finish(first)
        monkeypatch.setattr(recording, "LIVE_SECONDS", 40.0)  # and for ten seconds it may send
        live(1, len(grid.works), "cells")
        status, cells = told(study, grid)
        assert status == "RUNNING" and list(cells) == [key[first.folder.name]]
        assert cells[key[first.folder.name]].metrics["test/auroc"] == 0.5
        raise KeyboardInterrupt
    assert told(study, grid)[0] == "KILLED"

    broken, *rest = others
    searched = {"trials": 8, "epochs": 41, "validation_auroc": None, "settings": {"blr": 0.01, "epochs": 4}}
    for work in rest:
        finish(work, search=searched)
    recording.swept(study, grid, {broken.folder.name: "ValueError: no"})
    status, cells = told(study, grid)
    assert status == "FAILED" and len(cells) == len(grid.works)
    assert cells[key[broken.folder.name]].status == "FAILED"
    assert cells[key[broken.folder.name]].tags["failure"] == "ValueError: no"
    assert recording.runs(study, grid.artefact) == {}  # not yet whole
    run = cells[key[rest[0].folder.name]]  # what its search spent and found
    assert (run.metrics["search/trials"], run.metrics["search/epochs"]) == (8, 41)
    assert run.params["searched.blr"] == "0.01" and "search/validation_auroc" not in run.metrics

    finish(broken)
    recording.swept(study, grid, {})
    status, cells = told(study, grid)
    assert status == "FINISHED" and {cell.status for cell in cells.values()} == {"FINISHED"}
    assert recording.runs(study, grid.artefact).keys() == {"run", *(w.folder.name for w in grid.works)}


def test_a_sweep_that_mlflow_has_lost_is_sent_again(
    study: Study, grid: sweep.Grid, _empty_mlflow: Path
) -> None:
    for work in grid.works:
        finish(work)
    store.commit(grid.artefact.path, {})
    recording.swept(study, grid, {})
    before = told(study, grid)[1]
    shutil.copy(_empty_mlflow, study.machine.tracking.removeprefix("sqlite:///"))

    again = Study(study.exp, study.machine, {}, Console(quiet=True))
    recording.swept(again, grid, {})  # it is marked as sent
    assert again.tracker is None
    recording.sync(again, {"contrasts": {}}, grid)
    status, cells = told(again, grid)
    assert status == "FINISHED" and cells.keys() == before.keys()
    assert all(
        cells[key].metrics == run.metrics and cells[key].params == run.params for key, run in before.items()
    )


def test_a_pretraining_that_fails_or_is_stopped_says_so_and_is_taken_up_again(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "LIVE_SECONDS", 0.0)
    made = store.Artefact(study.machine.store / "pretrain" / "scratch-0")
    tracker = track.Tracker(study.machine.tracking, study.exp.name)

    def status() -> str:
        return str(tracker.client.search_runs([tracker.experiment_id])[0].info.status)

    for error, ended in ((ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")):
        with (
            pytest.raises(type(error)),
            recording.live(study, "scratch", made, lambda done, total, text: None) as live,
        ):
            live(1, 2, "steps")
            assert status() == "RUNNING"
            raise error
        assert status() == ended


def test_a_run_whose_process_was_killed_is_said_to_be_by_the_next_command(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "LIVE_SECONDS", 0.0)
    root, uri, name = study.machine.store, study.machine.tracking, study.exp.name
    tracker = track.Tracker(uri, name, store.identity(root))
    for name in ("dead", "alive", "done"):
        made = store.Artefact(root / "pretrain" / name)
        tracker.run(made.id, name, {})
        made.path.mkdir(parents=True)
        (made.path / "journal").touch()
    track.Tracker(uri, study.exp.name, "another").run("pretrain/dead", "elsewhere", {})
    store.commit(root / "pretrain" / "done", {})  # all but its end was sent
    hour_ago = time.time() - 3600
    for path in (root / "pretrain" / "dead" / "journal", root / "pretrain" / "dead"):
        os.utime(path, (hour_ago, hour_ago))
    (root.parent / "etc").mkdir()
    (root / "sweep").mkdir()
    tracker.run("sweep/../../etc", "not ours", {})

    def status() -> dict[str, str]:
        return {r.info.run_name: r.info.status for r in tracker.client.search_runs([tracker.experiment_id])}

    with store.lock(root, "pretrain/alive"):
        recording._tracker(study)
    running = {name: "RUNNING" for name in ("alive", "done", "elsewhere", "not ours")}
    assert status() == {**running, "dead": "KILLED"}
    (dead,) = tracker.client.search_runs([tracker.experiment_id], "attributes.status = 'KILLED'")
    assert "gone" in dead.data.tags["killed"] and abs(dead.info.end_time / 1000 - hour_ago) < 1
    assert tracker.run("pretrain/dead", "dead", {}) == dead.info.run_id  # taken up again
    assert status()["dead"] == "RUNNING"
    assert "killed" not in tracker.client.get_run(dead.info.run_id).data.tags


def test_a_killed_sweep_was_alive_when_it_was_last_heard_of(study: Study, grid: sweep.Grid) -> None:
    """Its own folder is not written to while cells are."""
    grid.artefact.path.mkdir(parents=True)
    finish(grid.works[0])
    recording._send_cells(study, grid, {})
    day_ago = time.time() - 86400
    os.utime(grid.artefact.path, (day_ago, day_ago))
    again = Study(study.exp, study.machine, {}, Console(quiet=True))
    recording._tracker(again)
    tracker = track.Tracker(study.machine.tracking, study.exp.name)
    (run,) = tracker.client.search_runs([tracker.experiment_id], "tags.stage = 'sweep'")
    assert run.info.status == "KILLED" and run.info.end_time >= run.info.start_time


def test_two_stores_with_one_server_have_runs_of_their_own(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one experiment, so that what they make has one name."""
    monkeypatch.setattr(recording, "LIVE_SECONDS", 0.0)
    machines = [study.machine, study.machine.model_copy(update={"store": tmp_path / "other"})]
    for number, machine in enumerate(machines):
        for _ in range(2):  # a command, and the same again
            one = Study(study.exp, machine, {}, Console(quiet=True))
            made = store.Artefact(machine.store / "pretrain" / "scratch-0")
            with journals.Journal(made.path / "journal", resume=0) as journal:
                journal.metrics(0, {"train/loss": float(number)})
            with recording.live(one, "scratch", made, lambda done, total, text: None) as live:
                live(1, 2, "steps")
            assert one.notes == []
    client = track.Tracker(study.machine.tracking, study.exp.name).client
    experiment_id = client.get_experiment_by_name(study.exp.name).experiment_id
    runs = client.search_runs([experiment_id])
    assert sorted(run.data.metrics["train/loss"] for run in runs) == [0.0, 1.0]


def test_a_run_deleted_by_hand_comes_anew_and_whole(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "LIVE_SECONDS", 0.0)
    made = store.Artefact(study.machine.store / "pretrain" / "scratch-0")
    client = track.Tracker(study.machine.tracking, study.exp.name).client
    with journals.Journal(made.path / "journal") as journal:

        def command(*steps: int, deleted: bool = False) -> None:
            with recording.live(study, "scratch", made, lambda done, total, text: None) as live:
                for step in steps:
                    journal.metrics(step, {"train/loss": float(step)})
                    live(step + 1, 4, "steps")
                    if deleted and step == steps[0]:
                        client.delete_run(client.search_runs([experiment_id])[0].info.run_id)

        command(0)
        experiment_id = client.get_experiment_by_name(study.exp.name).experiment_id
        command(1, 2, deleted=True)  # MLflow refuses the third step: it is said, and costs nothing
        assert len(study.notes) == 1 and "must be in the 'active' state" in study.notes[0]
        command(3)
    (run,) = client.search_runs([experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(n, float(n)) for n in range(4)]


def test_a_server_that_never_answers_costs_seconds(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and says nothing: of that no connection error comes."""
    monkeypatch.setattr(recording, "LIVE_SECONDS", 0.0)
    made = store.Artefact(study.machine.store / "pretrain" / "scratch-0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        machine = study.machine.model_copy(
            update={"tracking_uri": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        )
        one, begun, told = Study(study.exp, machine, {}, Console(quiet=True)), time.monotonic(), []
        with recording.live(one, "scratch", made, lambda done, total, text: told.append(done)) as live:
            live(1, 2, "steps")
        assert told == [1] and time.monotonic() - begun < 30
    assert len(one.notes) == 1 and "the journals are kept" in one.notes[0]
