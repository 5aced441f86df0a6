"""Row R11: a loss or gradient that is not finite is captured, and left out or the end for all workers; and replayed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from cranium import capture, checkpoint, pretrain, replay, restart, training
from cranium.config import Machine, UserError
from cranium.store import Artefact
from pretrainings import SPOILT, STEPS, experiment, journal, last_state, spoilt
from shards import shard_set

pytestmark = pytest.mark.chaos

# Its first update overflows the second step.
WILD = {"optimiser": {"lr": 1e30, "warmup": 0.0, "freeze_last_layer": 0.0}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return shard_set(tmp_path_factory.mktemp("shards"))


def test_an_update_is_left_out_on_all_workers_alike(
    ray_cluster: object, shards: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, two parts each; only the second worker's gradient is spoilt, in one part."""
    monkeypatch.setattr(training, "train_worker", spoilt)
    exp = experiment(workers=2, nonfinite="skip", accumulate=2)
    made = pretrain.pretrain(exp, Machine(store=tmp_path), "scratch", [shards])
    assert made.manifest()["skipped"] == 1
    found = capture.read(made.path / capture.FOLDER / f"{SPOILT:08}.json")
    assert found.skipped and found.workers == 2 and math.isfinite(found.terms["loss"])
    assert "grad_norm_backbone" in found.wrong and len(found.rows) == 8
    steps = dict(journal(made))
    assert list(steps) == list(range(STEPS))
    assert [metrics["train/skipped"] for metrics in steps.values()] == [0.0] * SPOILT + [1.0] * (
        STEPS - SPOILT
    )
    assert all(tensor.isfinite().all() for tensor in last_state(made)["method"].values())


def test_a_step_that_is_not_finite_ends_the_run_with_nothing_lost_and_is_replayed(
    ray_cluster: object, shards: Artefact, tmp_path: Path
) -> None:
    machine, exp = Machine(store=tmp_path), experiment(**WILD)
    with pytest.raises(UserError) as stopped:
        pretrain.pretrain(exp, machine, "scratch", [shards])
    assert stopped.value.code == "NOT_FINITE" and stopped.value.exit_code == 1
    made = pretrain.artefact(exp, machine, "scratch", [shards])
    (path,) = (made.path / capture.FOLDER).iterdir()
    assert f"replay={path}" in str(stopped.value) and not made.done
    found = capture.read(path)
    assert found.step >= 1 and found.checkpoint == found.step and not found.skipped and "loss" in found.wrong
    (kept,) = restart.kept(made.path)
    state = checkpoint.load_training(kept)
    assert state["step"] == found.step and all(t.isfinite().all() for t in state["method"].values())
    assert [step for step, _ in journal(made)] == list(range(found.step))

    lines = replay.replay(exp, machine, "scratch", [shards], path)
    assert re.search(r"first module to make something not finite: (teacher|student)\.backbone\.", lines[0]), (
        lines
    )
    assert any(line.startswith(f"step {found.step}: terms not finite: loss, ") for line in lines), lines
    assert restart.kept(made.path) == [kept] and list((made.path / capture.FOLDER).iterdir()) == [path]
    with pytest.raises(UserError, match="continue_from"):  # again: from its checkpoint, at once
        pretrain.pretrain(exp, machine, "scratch", [shards])
    assert restart.kept(made.path) == [kept]


def test_too_many_in_a_row_end_a_run_that_skips(
    ray_cluster: object, shards: Artefact, tmp_path: Path
) -> None:
    machine, exp = Machine(store=tmp_path), experiment(**WILD, nonfinite="skip")
    with pytest.raises(UserError) as stopped:
        pretrain.pretrain(exp, machine, "scratch", [shards])
    assert stopped.value.code == "NOT_FINITE"
    made = pretrain.artefact(exp, machine, "scratch", [shards])
    captured = [capture.read(path) for path in sorted((made.path / capture.FOLDER).iterdir())]
    first = captured[0].step
    assert [c.step for c in captured] == list(range(first, first + training.MOST_SKIPPED + 1))
    assert [c.skipped for c in captured] == [True] * training.MOST_SKIPPED + [False]
    state = last_state(made)
    assert state["step"] == first + training.MOST_SKIPPED and state["in_a_row"] == training.MOST_SKIPPED
