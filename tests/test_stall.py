"""A worker that hangs is told from those that wait for it."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import ray
from cranium import stall
from cranium.config import UserError
from cranium.stall import Heartbeat, Standing, Watch

LIMIT = 600.0


def beat(rank: int, moves: int = 9, waits: bool = True, count: int = 1) -> Heartbeat:
    return Heartbeat(rank, "host", "node", 100 + rank, 1.5, count, moves, 3, "step", waits)


@pytest.mark.parametrize(
    ("beats", "silent", "expected"),
    [
        ([beat(0), beat(1), beat(2)], {1}, [1]),
        ([beat(0, moves=9), beat(1, moves=3), beat(2, moves=8)], set(), [1]),  # the least far
        ([beat(0), beat(1, waits=False), beat(2)], set(), [1]),  # in the same step, and in no collective
        ([beat(0), beat(1)], set(), [0, 1]),  # nothing tells them apart
        ([beat(0, moves=9, waits=False), beat(1, moves=8)], set(), [1]),  # who is ahead holds nobody up
    ],
)
def test_who_is_blamed(beats: list[Heartbeat], silent: set[int], expected: list[int]) -> None:
    assert [one.rank for one in stall.blamed({one.rank: one for one in beats}, silent)] == expected


class Clock:
    """A run's folder, a clock, and who was ended."""

    def __init__(self, run: Path, patch: pytest.MonkeyPatch) -> None:
        self.now, self.ended, self.run, self.alive = 0.0, list[int](), run, True
        patch.setattr(time, "monotonic", lambda: self.now)
        patch.setattr(stall, "end_process", self._end)
        self.watch = Watch(run, LIMIT)

    def _end(self, of: Heartbeat) -> bool:
        self.ended += [of.rank] if self.alive else []
        return self.alive

    def after(self, seconds: float, *beats: Heartbeat) -> None:
        """Look every five seconds for so long; each worker beats all the while unless its count is 0."""
        for _ in range(int(seconds / 5)):
            self.now += 5
            for one in beats:
                told = replace(one, count=int(self.now) * one.count)
                stall._write(self.run / stall.BEATS / f"{one.rank}.json", json.dumps(asdict(told)))
            self.watch.look()


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(tmp_path, monkeypatch)


def test_who_moves_is_left_alone(clock: Clock) -> None:
    for moves in range(10):
        clock.after(LIMIT - 5, beat(0, moves), beat(1, moves))
    assert clock.ended == [] and clock.watch.said == ""


def test_whoever_does_not_answer_is_ended_and_named(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    clock.after(LIMIT, beat(0), beat(1, count=0))
    assert clock.ended == []
    clock.after(20, beat(0), beat(1, count=0))
    assert clock.ended == [1]
    assert (
        "no step for 600 s: worker 1 (process 101 on host; step, step 3) does not answer" in clock.watch.said
    )
    assert clock.watch.said in capsys.readouterr().out


def test_whoever_is_behind_is_ended_once(clock: Clock) -> None:
    clock.after(LIMIT + 15, beat(0, 9), beat(1, 8))
    clock.after(LIMIT - 20)  # its successor starts
    clock.after(LIMIT - 5, beat(0, 1), beat(1, 1))
    assert clock.ended == [1] and "holds the others up" in clock.watch.said


def test_what_a_crash_left_is_no_stall(clock: Clock) -> None:
    clock.after(50, beat(0), beat(1))
    clock.alive = False  # both died; the new ones wait for a node, for an hour
    clock.after(3600)
    assert clock.ended == [] and clock.watch.said == ""


def test_nobody_is_blamed_for_a_pause_of_all(clock: Clock) -> None:
    """As of a container, or of a disk that blocks every one of them."""
    clock.after(50, beat(0, 5), beat(1, 5))
    clock.now += 3600
    clock.after(LIMIT - 5, beat(0, 5), beat(1, 5))
    assert clock.ended == []
    clock.after(LIMIT + 20, beat(0, 5), beat(1, 4))
    assert clock.ended == [1]


def test_what_was_said_is_over_once_the_run_is_beyond_it(clock: Clock) -> None:
    """Else the next error of any kind, days later, were called a stall."""
    clock.after(LIMIT + 20, beat(0, 9), beat(1, 8))
    again = [replace(beat(rank, 1), pid=200 + rank, step=2) for rank in (0, 1)]  # from its checkpoint
    clock.after(50, *again)
    assert "holds the others up" in clock.watch.said
    clock.after(10, *[replace(one, moves=7, step=4) for one in again])
    assert clock.watch.said == ""


def test_a_beat_that_cannot_be_read_is_none(clock: Clock) -> None:
    clock.after(10, beat(0))
    (clock.run / stall.BEATS / "1.json").write_text("{")
    (clock.run / stall.BEATS / "2.json").mkdir()
    clock.after(10, beat(0))
    assert clock.ended == [] and list(clock.watch._beats()) == [0]


def test_only_the_process_that_beat_is_ended() -> None:
    """Not another that has its number by now."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        born = stall._born(process.pid)
        assert not stall._kill(process.pid, born + 1) and process.poll() is None
        assert stall._kill(process.pid, born) and process.wait(10) == -signal.SIGKILL
        assert not stall._kill(process.pid, born)
    finally:
        process.kill()


def test_a_worker_says_where_it_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        def get_node_id(self) -> str:
            return "node"

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    standing, stacks = Standing(), tmp_path / stall.STACKS / "worker-3.txt"
    with stall.beating(tmp_path, 3, 0.2, standing):
        standing.move(7, "step")
        deadline = time.monotonic() + 20
        while not stacks.exists() and time.monotonic() < deadline:
            _a_read_that_never_ends()
        (told,) = Watch(tmp_path, 0.2)._beats().values()
    assert (told.rank, told.step, told.doing, told.waits) == (3, 7, "step", False)
    assert "_a_read_that_never_ends" in stacks.read_text()
    assert not list((tmp_path / stall.BEATS).iterdir())


def _a_read_that_never_ends() -> None:
    threading.Event().wait(0.05)


def test_what_ended_in_vain_is_said_with_a_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(self: Watch) -> None:
        self.said = "no step for 600 s: worker 1 does not answer"

    monkeypatch.setattr(Watch, "look", look)
    with pytest.raises(UserError, match="stall_seconds") as refused, stall.watched(tmp_path, 0.1):
        time.sleep(0.1)
        raise RuntimeError("the actor died")
    assert refused.value.code == "STALLED" and refused.value.exit_code == 1
