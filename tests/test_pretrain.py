"""What needs no Ray: what a resume refuses, and how a signal lets the work end."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from cranium import pretrain
from cranium.config import Experiment, Machine, UserError
from shards import shard_set


def experiment(**changed: object) -> Experiment:
    settings = {"cohorts": ["tiny"], "inits": ["scratch"], "arch": "vit_tiny_patch14", **changed}
    return Experiment.model_validate({"name": "tiny", "ingest": {"cohorts": ["tiny"]}, "pretrain": settings})


def test_resuming_with_other_settings_is_refused_field_by_field(tmp_path: Path) -> None:
    machine, shards = Machine(store=tmp_path / "store"), [shard_set(tmp_path / "shards")]
    old, new = experiment(steps=10), experiment(steps=20, optimiser={"lr": 0.5})
    begun = pretrain.artefact(old, machine, "scratch", shards)
    pretrain.check_resume(new, machine, "scratch", shards)  # nothing is there to go on with
    (begun.path / "ray" / "checkpoint_1").mkdir(parents=True)
    (begun.path / pretrain.KEY).write_text(pretrain.canonical(pretrain._key(old, machine, "scratch", shards)))
    with pytest.raises(UserError) as refused:
        pretrain.check_resume(new, machine, "scratch", shards)
    assert refused.value.code == "RESUME_DIFFERS"
    for part in ("pretrain.steps: 10 -> 20", "pretrain.optimiser.lr: 0.001 -> 0.5", begun.path.name):
        assert part in str(refused.value)
    pretrain.check_resume(old, machine, "scratch", shards)
    accepted = experiment(steps=20, optimiser={"lr": 0.5}, continue_from=begun.path.name)
    pretrain.check_resume(accepted, machine, "scratch", shards)
    assert pretrain._continued(accepted, machine) == begun.path
    with pytest.raises(UserError, match="holds no checkpoint"):
        pretrain._continued(experiment(continue_from="scratch-none"), machine)


def test_a_signal_asks_the_work_to_end_and_a_second_one_does_not_wait(
    tmp_path: Path, interrupts: None
) -> None:
    stop = tmp_path / "stop"
    ended = threading.Event()

    def until_asked() -> None:
        while not stop.exists():
            time.sleep(0.01)
        ended.set()

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(0.3, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        pretrain._interruptible(until_asked, stop)
    assert ended.is_set()

    stop.unlink()
    release = threading.Event()
    for seconds in (0.3, 0.8):
        threading.Timer(seconds, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        pretrain._interruptible(release.wait, stop)  # never ends by itself
    release.set()


def test_what_the_work_raises_is_raised_here(tmp_path: Path) -> None:
    def fail() -> None:
        raise UserError("CODE", "why")

    with pytest.raises(UserError, match="why"):
        pretrain._interruptible(fail, tmp_path / "stop")
    assert pretrain._interruptible(lambda: 7, tmp_path / "stop") == 7
