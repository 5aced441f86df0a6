"""A command as a user gives it, in a process group of its own, where something is killed by SIGKILL; and the log of it.

Whatever the command starts carries a mark in its environment, so that no process of anybody else is ever touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SEED = int(os.environ.get("CHAOS_SEED", "0"))
LOG = os.environ.get("CHAOS_LOG")  # a file that gets a line of JSON for each kill and each end
MARK = "CHAOS_MARK"
TARGETS = ("driver", "worker", "node", "head", "all")  # `node`: Ray's raylet; `head`: the cluster's store
MOMENTS = ("starting", "working", "ending")
NOBODYS = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")  # do none of the work


def kills(default: int) -> int:
    return int(os.environ.get("CHAOS_KILLS", default))


class Command:
    """`cranium <words>`, under way; what it prints goes to `output`."""

    def __init__(self, words: Sequence[str], output: Path) -> None:
        self.mark, self.output = uuid.uuid4().hex, output
        environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        environment.pop("RAY_AUTH_MODE", None)  # a token of its own, as a user's has
        environment |= {MARK: self.mark, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cranium.cli", *words],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def ended(self) -> int | None:
        return self.process.poll()

    def alive(self) -> list[psutil.Process]:
        """All of its processes, also those that have another parent by now."""
        found = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if one.status() != psutil.STATUS_ZOMBIE and one.environ().get(MARK) == self.mark:
                    found.append(one)
        return found

    def victims(self, target: str) -> list[psutil.Process]:
        """Those that a kill of `target` may hit: one of them, or with `all` every one."""
        if target == "driver":
            return [psutil.Process(self.process.pid)] if self.ended is None else []
        everything = self.alive()
        if target == "all":
            return everything
        return [one for one in everything if _is(one, target)]

    def kill(self, target: str, draw: random.Random, patience: float = 240) -> str | None:
        """SIGKILL to one of the target, as soon as there is one; its name, or None where the command ended before."""
        deadline = time.monotonic() + patience
        while self.ended is None and time.monotonic() < deadline:
            if found := self.victims(target):
                hit = found if target == "all" else [draw.choice(found)]
                with contextlib.suppress(psutil.Error):
                    name = Path(hit[0].cmdline()[0]).name if target != "all" else f"processes: {len(hit)}"
                    for one in hit:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            one.send_signal(signal.SIGKILL)
                    return name
            time.sleep(0.02)
        return None

    def wait(self, seconds: float) -> int:
        """Its exit code. Raises `subprocess.TimeoutExpired` when it goes on for longer."""
        return self.process.wait(seconds)

    def gone(self, seconds: float) -> float:
        """Wait until nothing of it is left; how long that took."""
        begun = time.monotonic()
        while left := self.alive():
            waited = time.monotonic() - begun
            assert waited < seconds, [(one.pid, one.name(), one.cmdline()[:3]) for one in left]
            time.sleep(0.1)
        return time.monotonic() - begun

    def end(self) -> None:
        """Whatever is left of it is killed."""
        for one in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()


def _is(one: psutil.Process, target: str) -> bool:
    try:
        name = (one.cmdline() or [""])[0]
    except psutil.Error:
        return False
    if target == "worker":
        return name.startswith("ray::") and not name.startswith(NOBODYS)
    return name.endswith({"node": "raylet/raylet", "head": "gcs/gcs_server"}[target])


@dataclass(frozen=True)
class Kill:
    """What, and when: `share` of the work is done, or of the seconds that starting or ending takes is over."""

    moment: str
    share: float
    target: str


def plan(draw: random.Random, kills: int) -> list[Kill]:
    """Random moments in the order they come; every target is hit as often as the others."""
    rounds = -(-kills // len(TARGETS))
    targets = [target for _ in range(rounds) for target in draw.sample(TARGETS, len(TARGETS))]
    if kills < len(TARGETS):
        targets = ["driver", "worker", "node", *targets]
    moments = draw.choices(MOMENTS, (0.25, 0.65, 0.1), k=kills)
    shares = sorted(0.9 * draw.random() for _ in range(kills))  # later there may be nobody left to hit
    made = [Kill(moment, *rest) for moment, *rest in zip(moments, shares, targets[:kills], strict=True)]
    ends = [
        Kill("ending", kill.share, "driver") for kill in made if kill.moment == "ending"
    ]  # all else has ended
    return [kill for kill in made if kill.moment != "ending"] + ends


@dataclass
class Disturbed:
    """One stage in an artefact's way: how it is begun, how far it is, what has to hold after every kill."""

    stage: str
    begin: Callable[[], Command]
    done: Callable[[], int]
    total: int
    over: Callable[[], bool]  # all of the work is done; the command may still have something to say of it
    check: Callable[[], None]

    def run(self, kills: Sequence[Kill], draw: random.Random) -> int:
        """Kill as planned, give the command again whenever it has ended, let it end; how often it was hit."""
        self.command, hits = self.begin(), 0
        try:
            for number, kill in enumerate(kills):
                hits += self._kill(number, kill, draw)
            self._finish(hits)
        finally:
            self.command.end()
        return hits

    def _kill(self, number: int, kill: Kill, draw: random.Random) -> bool:
        begun = time.monotonic()
        self._await(kill, draw)
        before, came = self.done(), time.monotonic()
        hit = self.command.kill(kill.target, draw)
        killed = time.monotonic()
        if hit and kill.target != "worker":  # without one of those it may go on
            assert self.command.wait(120) not in (0, 3) or self.over(), "it took a kill for its end"
        ended, after = self.command.ended, time.monotonic() - killed
        left = self.command.gone(180) if ended is not None else None  # Ray's agents once took over a minute
        self.check()
        write(
            stage=self.stage, kill=number, seed=SEED, moment=kill.moment, target=kill.target, hit=hit,
            waited_s=round(came - begun, 1), done_before=before, done_after=self.done(), total=self.total,
            exit=ended, ended_after_s=round(after, 1), rest_gone_after_s=left and round(left, 1),
        )  # fmt: skip
        if ended is not None:
            self.command = self.begin()
        return hit is not None

    def _await(self, kill: Kill, draw: random.Random) -> None:
        if kill.moment == "starting":
            time.sleep(kill.share * 8)
            return
        ending = kill.moment == "ending"
        while not (self.over() if ending else self.done() >= int(kill.share * self.total)):
            if self.command.ended is not None:  # an earlier kill was too much for it
                assert self.command.ended not in (0, 3), self.command.output.read_text()[-3000:]
                self.command.gone(60)
                self.command = self.begin()
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 2 if ending else 0.5))

    def _finish(self, hits: int) -> None:
        """Work that lost its workers twice is left to the next command: that is two more at most."""
        codes = [self.command.wait(900)]
        while codes[-1] not in (0, 3) and len(codes) < 3:
            self.command = self.begin()
            codes.append(self.command.wait(900))
        left = self.command.gone(60)
        self.check()
        write(
            stage=self.stage, seed=SEED, kills=hits, exits=codes, done_after=self.done(), total=self.total,
            rest_gone_after_s=round(left, 1),
        )  # fmt: skip
        assert codes[-1] in (0, 3), self.command.output.read_text()[-3000:]
        assert self.over()


def write(**facts: Any) -> None:
    """A line of the log, which is also printed."""
    line = json.dumps(facts)
    print(line)
    if LOG:
        with Path(LOG).open("a") as file:
            file.write(line + "\n")
