"""How Cranium measures itself: cases run in rounds, CPU seconds of every process, ratios within one run.

All cases are worked in turn, round by round, each warmed up before it is measured, so that neither a change of the
machine's load nor the case before favours one. Medians are kept. The modules `bench_*` say what is measured
and what is asked of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from cranium.config import Frozen
from cranium.reading import load_machine
from cranium.store import write_atomic
from cranium.watch import repeatedly

PACKAGES = ("numpy", "pyarrow", "ray", "torch", "SimpleITK")
# Does it all once; what it found out beside the time, in numbers.
Work = Callable[[], Mapping[str, float] | None]


class Settings(Frozen):
    """What every benchmark can be told on the command line."""

    rounds: int = 3
    # Generated input, kept for next time.
    data: Path = Field(default_factory=lambda: load_machine().cache / "bench")
    out: Path | None = None  # JSON of the results

    @field_validator("data")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().absolute()  # Ray's workers run elsewhere


@dataclass(frozen=True)
class Case:
    """One way to do some work. `items` are done by one call of `work`; `rounds` None: as many as the others."""

    name: str
    items: int
    work: Work
    unit: str = "stacks"
    rounds: int | None = None
    warm: bool = True  # once unmeasured before each measurement


@dataclass
class Measured:
    """What a case took, round by round."""

    name: str
    items: int
    unit: str
    wall: list[float] = field(default_factory=list)  # seconds
    cpu: list[float] = field(default_factory=list)  # seconds, this process and all below it
    facts: list[Mapping[str, float]] = field(default_factory=list)
    cold: float | None = None  # seconds of the very first time

    @property
    def per_second(self) -> float:
        return self.items / statistics.median(self.wall)

    @property
    def cpu_per_1000(self) -> float:
        """CPU seconds for 1,000 items."""
        return 1000 * statistics.median(self.cpu) / self.items

    def fact(self, name: str) -> float:
        return statistics.median(found[name] for found in self.facts)

    def plain(self) -> dict[str, Any]:
        names = sorted({name for found in self.facts for name in found})
        return {
            "name": self.name,
            "unit": self.unit,
            "items": self.items,
            "per_second": round(self.per_second, 3),
            "cpu_seconds_per_1000": round(self.cpu_per_1000, 4),
            "wall_seconds": [round(seconds, 4) for seconds in self.wall],
            "cold_seconds": None if self.cold is None else round(self.cold, 4),
            "cpu_seconds": [round(seconds, 4) for seconds in self.cpu],
            "facts": {name: round(self.fact(name), 4) for name in names},
        }


@dataclass(frozen=True)
class Target:
    """A number that is asked for. `at_least`: larger is better."""

    name: str
    value: float
    required: float
    goal: float | None = None
    at_least: bool = True

    @property
    def met(self) -> str:
        """`goal`, `required` or `missed`."""

        def holds(bound: float) -> bool:
            return self.value >= bound if self.at_least else self.value <= bound

        if not holds(self.required):
            return "missed"
        return "goal" if self.goal is not None and holds(self.goal) else "required"


@dataclass(frozen=True)
class Result:
    what: str  # stream | ingest | step
    command: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    measured: Sequence[Measured]
    targets: Sequence[Target]
    notes: Sequence[str] = ()

    def plain(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "command": self.command,
            "settings": dict(self.settings),
            "machine": dict(self.machine),
            "measured": [case.plain() for case in self.measured],
            "targets": [
                {
                    "name": t.name,
                    "value": round(t.value, 4),
                    "required": t.required,
                    "goal": t.goal,
                    "at_least": t.at_least,
                    "met": t.met,
                }
                for t in self.targets
            ],
            "notes": list(self.notes),
        }


def measure(
    cases: Sequence[Case], rounds: int, say: Callable[[str], None] = lambda text: None
) -> list[Measured]:
    """Work every case in `rounds` rounds, in turn; each time once unmeasured before it is measured.

    Else a case pays for what the one before it did: a DataLoader's fork makes every page of this process copy-on-write.
    """
    found = [Measured(case.name, case.items, case.unit) for case in cases]
    for number in range(max(case.rounds or rounds for case in cases)):
        for case, kept in zip(cases, found, strict=True):
            if number >= (case.rounds or rounds):
                continue
            if case.warm:
                wall = time.perf_counter()
                case.work()
                kept.cold = kept.cold or time.perf_counter() - wall
            cpu, wall = tree_cpu(), time.perf_counter()
            facts = case.work()
            kept.wall.append(time.perf_counter() - wall)
            kept.cpu.append(tree_cpu() - cpu)
            kept.facts.append(facts or {})
            say(f"{case.name}: {case.items / kept.wall[-1]:,.0f} {case.unit}/s")
    return found


def tree_cpu() -> float:
    """CPU seconds of this process and all below it, those of its private Ray cluster included."""
    import psutil

    own = psutil.Process()
    ended = own.cpu_times()
    # Of this process to the microsecond; the kernel tells others' in ticks of 10 ms.
    total: float = time.process_time() + ended.children_user + ended.children_system
    for process in own.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


@contextlib.contextmanager
def peak_memory(interval_s: float = 0.1) -> Iterator[dict[str, float]]:
    """Fills `{"peak_mb": ...}`: the largest private memory of this process and all below it, shared pages left out."""
    import psutil

    found = {"peak_mb": 0.0}

    def look() -> None:
        own = psutil.Process()
        total = 0
        for process in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                total += memory.rss - memory.shared
        found["peak_mb"] = max(found["peak_mb"], total / 1e6)

    look()
    with repeatedly(look, interval_s):
        yield found


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was; no names of hosts or people."""
    import psutil

    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": load(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def load() -> float:
    """Processes that want a core, over the last minute."""
    return round(os.getloadavg()[0], 2)


def keep(result: Result, path: Path) -> None:
    write_atomic(path, json.dumps(result.plain(), indent=1) + "\n")


def table(result: Result) -> str:
    """Two Markdown tables: what was measured, and what was asked for."""
    lines = ["| case | items | items/s | CPU s per 1,000 | facts |", "|---|---|---|---|---|"]
    for case in result.plain()["measured"]:
        facts = ", ".join(f"{name} {value:g}" for name, value in case["facts"].items())
        lines.append(
            f"| {case['name']} | {case['items']:,} {case['unit']} | {_number(case['per_second'])} | "
            f"{case['cpu_seconds_per_1000']:g} | {facts} |"
        )
    lines += ["", "| asked for | measured | required | goal | met |", "|---|---|---|---|---|"]
    for target in result.targets:
        sign = ">=" if target.at_least else "<="
        goal = "" if target.goal is None else f"{sign} {target.goal:g}"
        lines.append(
            f"| {target.name} | {_number(target.value)} | {sign} {target.required:g} | {goal} | {target.met} |"
        )
    return "\n".join([*lines, *(f"\n{note}" for note in result.notes)])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
