"""A training that stands still: which worker holds the others up, where it is, and its end. [Ray Train]

The workers of a step wait for each other, so one that hangs stops them all, silently, until the collective's own time
limit (30 minutes). Every worker therefore leaves a heartbeat in the run's folder, with how far it is; the command
compares them, and ends the one the others wait for. Ray then starts all of them again from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from cranium.config import UserError
from cranium.watch import repeatedly

BEATS = "heartbeats"  # below a run's folder: how far each worker is
STACKS = "stalled"  # where the threads of those that stood still were, by worker
MISSED = 4  # beats in a row: the process is stopped, or its host is
# Where a worker waits for others: collectives, and the backward pass, in which gradients are exchanged.
WAITING = (os.path.join("torch", "distributed"), os.path.join("torch", "autograd"))


@dataclass
class Standing:
    """How far a worker is: set by the thread that works, read by the one that beats."""

    moves: int = 0
    step: int = 0
    doing: str = "start"

    def move(self, step: int, doing: str) -> None:
        self.moves, self.step, self.doing = self.moves + 1, step, doing


@dataclass(frozen=True)
class Heartbeat:
    """What a worker says of itself."""

    rank: int
    host: str
    node: str  # Ray's id of it
    pid: int
    born: float  # when the process began, as its kernel counts: a number that is given again is another's
    count: int
    moves: int
    step: int
    doing: str
    waits: bool  # it is where workers wait for each other

    def __str__(self) -> str:
        return f"worker {self.rank} (process {self.pid} on {self.host}; {self.doing}, step {self.step})"


# ---- a worker -------------------------------------------------------------------------------------------------------


def period(limit: float) -> float:
    """Seconds between two beats, for a limit of that many."""
    return min(5.0, limit / 10)


@contextlib.contextmanager
def beating(run: Path, rank: int, limit: float, standing: Standing) -> Iterator[None]:
    """Beat from a thread of its own while this one works; after `limit` seconds in one place, say where that is."""
    import ray

    path, works = run / BEATS / f"{rank}.json", threading.get_ident()
    born = _born(os.getpid())
    node = str(ray.get_runtime_context().get_node_id())
    count, moves, since, unwritten = 0, -1, time.monotonic(), ""

    def beat() -> None:
        nonlocal count, moves, since, unwritten
        count += 1
        if standing.moves != moves:
            moves, since = standing.moves, time.monotonic()
        still = time.monotonic() - since > limit
        told = Heartbeat(
            rank, os.uname().nodename, node, os.getpid(), born, count, waits=_waits(works),
            **asdict(standing),
        )  # fmt: skip
        try:
            _write(path, json.dumps(asdict(told)))
            if still:
                _write_stacks(run / STACKS / f"worker-{rank}.txt")
                since = float("inf")  # once is enough
        except OSError as error:  # the training says what it lacks; without a beat it is none the worse
            if unwritten != str(error):
                unwritten = str(error)
                print(f"a beat of worker {rank} could not be written: {error}", flush=True)

    with repeatedly(beat, period(limit)):
        yield
    path.unlink(missing_ok=True)


def _write(path: Path, content: str) -> None:
    """Whole, but not flushed to the disk: after a crash of the machine nobody needs it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(content)
    beside.replace(path)


def _waits(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    return frame is not None and any(part in frame.f_code.co_filename for part in WAITING)


def _write_stacks(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        faulthandler.dump_traceback(file)


# ---- the command ----------------------------------------------------------------------------------------------------


def blamed(beats: Mapping[int, Heartbeat], silent: set[int]) -> list[Heartbeat]:
    """Whom the others wait for: those that do not answer, else those least far, else those that wait for nobody.

    All of them where nothing tells them apart: on a GPU a worker's own work and waiting look alike from outside.
    """
    if silent:
        return [beats[rank] for rank in sorted(silent)]
    least = min(beat.moves for beat in beats.values())
    behind = [beat for beat in beats.values() if beat.moves == least]
    return [beat for beat in behind if not beat.waits] or behind


@dataclass
class Watch:
    """The beats of a run as the command sees them; hosts' clocks are never compared."""

    run: Path
    limit: float
    said: str = ""  # of the last one that was ended, until the run is beyond where it stood
    _heard: dict[int, tuple[tuple[int, float, int], float]] = field(default_factory=dict)
    _moved: float = field(default_factory=time.monotonic)
    _looked: float = field(default_factory=time.monotonic)
    _places: list[tuple[int, float, int]] = field(default_factory=list)
    _stood: int = 0  # the step of it

    def look(self) -> None:
        """End whoever holds the others up, once nobody has moved for the limit and a little more."""
        beats, now, every = self._beats(), time.monotonic(), period(self.limit)
        if now - self._looked > 10 * every:  # all of us were paused, or the disk was: nobody is to blame
            self._moved = now
            self._heard.clear()
        if any(beat.step > self._stood for beat in beats.values()):
            self.said = ""
        places = [(beat.pid, beat.born, beat.moves) for beat in beats.values()]
        if places != self._places or not beats:
            self._places, self._moved = places, now
        silent = set()
        for rank, beat in beats.items():
            heard = (beat.pid, beat.born, beat.count)
            if self._heard.get(rank, (None, 0.0))[0] != heard:
                self._heard[rank] = heard, now
            elif now - self._heard[rank][1] > MISSED * every:
                silent.add(rank)
        if now - self._moved > self.limit + 2 * every:
            self._end(blamed(beats, silent), silent)
            self._places, self._moved = [], time.monotonic()
            shutil.rmtree(self.run / BEATS, ignore_errors=True)
        self._looked = time.monotonic()

    def _beats(self) -> dict[int, Heartbeat]:
        found = {}
        for path in sorted((self.run / BEATS).glob("*.json")):
            # Its worker has just ended or renamed it (a network's file system says it is stale), or it is of no use.
            with contextlib.suppress(OSError, ValueError, TypeError):
                beat = Heartbeat(**json.loads(path.read_text()))
                found[beat.rank] = beat
        return found

    def _end(self, guilty: list[Heartbeat], silent: set[int]) -> None:
        ended = [beat for beat in guilty if end_process(beat)]
        if not ended:
            return  # they were gone, and the ones that follow have not beaten yet
        which = "does not answer" if silent else "holds the others up" if len(ended) == 1 else "stand still"
        stacks = f"; the stacks of those that could say are in {self.run / STACKS}" if self._stacks() else ""
        self.said = f"no step for {self.limit:g} s: {', '.join(map(str, ended))} {which}{stacks}"
        self._stood = max(beat.step for beat in ended)
        print(f"{self.said}. Ended, so that the training goes on from its last checkpoint", flush=True)

    def _stacks(self) -> bool:
        return any((self.run / STACKS).glob("worker-*.txt"))


def end_process(beat: Heartbeat) -> bool:
    """SIGKILL to a worker, by a task on its node; whether it was there. A node that is gone is Ray's own matter."""
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    import ray

    there = NodeAffinitySchedulingStrategy(node_id=beat.node, soft=False)
    task = ray.remote(num_cpus=0)(_kill).options(scheduling_strategy=there)
    try:
        return bool(ray.get(task.remote(beat.pid, beat.born), timeout=60))
    except RayError as error:
        print(f"{beat} could not be ended: {' '.join(str(error).split())[:200]}", flush=True)
        return False


def _kill(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        if _born(pid) != born or process.status() == psutil.STATUS_ZOMBIE:
            return False
        process.kill()
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    return True


def _born(pid: int) -> float:
    """When a process began, in a count of its host that no change of the clock touches (psutil's is by the clock)."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        return float(stat.read_text().rpartition(")")[2].split()[19])
    return float(psutil.Process(pid).create_time())


@contextlib.contextmanager
def watched(run: Path, limit: float) -> Iterator[None]:
    """Look after a run's workers while the body waits for them. `UserError(STALLED)` where ending one was no help."""
    for left in (BEATS, STACKS):  # by an earlier attempt
        shutil.rmtree(run / left, ignore_errors=True)
    watch = Watch(run, limit)
    try:
        with repeatedly(watch.look, period(limit)):
            yield
    except UserError:
        raise
    except Exception as error:
        if watch.said:
            mend = "see to that machine, or raise pretrain.compute.stall_seconds if a step may take longer"
            again = "the same command goes on from the last checkpoint"
            raise UserError("STALLED", f"{watch.said}; {mend}; {again}", 1) from error
        raise
