"""One command on one experiment, and how its stages show that they work: a bar with an ETA, or lines in a plain log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

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
from cranium.config import Experiment, Machine, Stack

Tell = Callable[[int, int, str], None]
LINE_SECONDS = 10.0  # how often a plain log gets a line


@dataclass
class Study:
    """One command on one experiment: what is asked, where it happens, and what there is to say at the end.

    Where kinds of stack are compared, every stage but the sweep is done for each of them, in a view of the study.
    """

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
    stack: Stack | None = None  # of several, the one that this is a view of
    viewed: Study | None = None  # the study that this is a view of

    @property
    def whole(self) -> Study:
        return self.viewed or self

    def views(self) -> dict[Stack, Study]:
        """The study with each kind of stack alone; they write into the same notes. With no such axis, itself."""
        stacks = self.exp.stacks
        if self.exp.sweep is None or not self.exp.sweep.stack:
            return dict.fromkeys(stacks, self)
        told = stacks if len(stacks) > 1 else (None,)
        return {
            stack: replace(self, exp=self.exp.of_stack(stack), stack=shown, viewed=self)
            for stack, shown in zip(stacks, told, strict=True)
        }

    def named(self, name: str) -> str:
        """What a stage or an artefact is called, so that it is not taken for that of another stack."""
        return f"{name} ({self.stack})" if self.stack else name

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
