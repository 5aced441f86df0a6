"""Settings, intervals and p-values in the words of a report."""

from __future__ import annotations

from collections.abc import Collection

from cranium.tasks.comparison import Setting
from cranium.tasks.metrics import Undefined, Value
from cranium.tasks.statistics import Interval

NO_BREAK = "\u00a0"


STACKS = {
    "contrasts": "single slices",
    "neighbours": "neighbouring slices",
    "both": "neighbouring slices of each contrast",
}


def setting(of: Setting, among: Collection[Setting]) -> str:
    """`Lesion in demo, folds grouped by subject`, and what else tells it from the others."""
    said = f"{of.task.capitalize()} in {of.cohort}, {scheme(of.scheme)}"
    if len({s.contrasts for s in among}) > 1:
        said += f", learnt from {of.contrasts}"
    if len({s.stack for s in among}) > 1:
        said += f", {STACKS[of.stack]}"
    return f"{said}, {of.adaptation}" if len({s.adaptation for s in among}) > 1 else said


def scheme(name: str) -> str:
    return "folds grouped by subject" if name == "subject" else f"leave one {name} out"


def interval(value: Interval | Undefined, signed: bool = False) -> str:
    """An interval as text, or why there is none."""
    if isinstance(value, Undefined):
        return f"no interval ({value.reason})"
    sign = "+" if signed else ""
    return f"{value.low:{sign}.2f} to {value.high:{sign}.2f}"


def p_value(value: Value | None) -> str:
    if value is None or isinstance(value, Undefined):
        return "undefined"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
