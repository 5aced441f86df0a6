"""One command on one experiment, and how its stages show that they work: a bar with an ETA, or lines in a plain log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from cranium import track
from cranium.cards import Card
from cranium.config import Experiment, Machine

Tell = Callable[[int, int, str], None]
LINE_SECONDS = 10.0  # how often a plain log gets a line


@dataclass
class Study:
    """One command on one experiment: what is asked, where it happens, and what there is to say at the end."""

    exp: Experiment
    machine: Machine
    cards: Mapping[str, Card]
    console: Console
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)  # stage and name -> folder
    missing: dict[str, str] = field(default_factory=dict)  # what could not be had -> why
    rejected: bool = False
    tracker: track.Tracker | None = None

    @property
    def exit_code(self) -> int:
        return 3 if self.rejected or self.missing else 0

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Tell]:
        """A bar with an ETA while the stage works; its time is remembered."""
        started = time.monotonic()
        with bar(self.console, name) as tell:
            yield tell
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
        self.console.print(f"[green]✓[/] {name:<28} {clock(time.monotonic() - started)}")

    def skipped(self, name: str) -> None:
        self.console.print(f"[dim]· {name:<28} done before[/]")


@contextlib.contextmanager
def bar(console: Console, name: str) -> Iterator[Tell]:
    if not console.is_terminal:
        begun = last = time.monotonic()
        before: int | None = None  # what an earlier attempt had done costs no time now

        def line(done: int, total: int, text: str) -> None:
            nonlocal last, before
            before = done if before is None else before
            now = time.monotonic()
            if now - last >= LINE_SECONDS:
                last, made = now, done - before
                eta = f"ETA {clock((now - begun) * (total - done) / made)}" if made > 0 else ""
                console.print(f"  {name}: {done}/{total} {text} {eta}", soft_wrap=True)

        yield line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    ends = (TextColumn("ETA"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[text]}"))
    # Rich would take over sys.stdout and bring Ray's noise, which goes to the log, back to the terminal.
    with Progress(
        *columns, *ends, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bars:
        task = bars.add_task(name, total=None, text="starting")
        yield lambda done, total, text: bars.update(task, completed=done, total=total, text=text)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60:d}:{int(seconds) % 60:02d}" if seconds >= 60 else f"{seconds:.1f} s"
