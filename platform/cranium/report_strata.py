"""The part of a report that asks whom a model serves: results by sex, age band and site, each with its n.

As everywhere a value is the mean over folds, here of the stratum's subjects in each; scores are never put together.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cranium import wording
from cranium.figures.page import Section, Table
from cranium.tasks.comparison import Setting, rank
from cranium.tasks.metrics import Undefined, auroc
from cranium.tasks.statistics import Fold, bootstrap_interval

AGES = (0, 18, 40, 60, 70, 80, 130)  # years; a band holds its lower end
TEXT = (
    "Mean AUROC over held-out folds at the largest label fraction, of the subjects of one stratum at a time; n is "
    "people, and those of the rarest class. A fold in which a stratum lacks a class has no value: the mean is over the "
    "others, and their number is shown. Strata are small and many, and no test is made: a difference between two of "
    "them is a question, not a result.",
)


class Stratum(NamedTuple):
    """One side of one split of the subjects: `sex`, `F`."""

    by: str
    name: str


def section(folders: Sequence[Path], resamples: int) -> list[Section]:
    """A folded table for each setting whose cohort tells sex, age or site of its subjects; none without any."""
    settings: dict[tuple[str, ...], list[tuple[Mapping[str, Any], Path]]] = defaultdict(list)
    for folder in folders:
        cell = json.loads((folder / "manifest.json").read_text())["cell"]
        shown = cell | {"contrasts": " + ".join(cell["contrasts"])}
        settings[tuple(shown[key] for key in Setting._fields)].append((cell, folder))
    tables = []
    for setting, cells in sorted(settings.items()):
        full = max(cell["label_fraction"] for cell, _ in cells)
        if rows := list(_rows([(c, f) for c, f in cells if c["label_fraction"] == full], resamples)):
            of = Setting(*setting)
            seen = of.contrasts if of.stack == "contrasts" else f"{of.contrasts}, {wording.STACKS[of.stack]}"
            name = f"{of.task.capitalize()} in {of.cohort}, {seen}, {wording.scheme(of.scheme)}"
            tables.append(Table(COLUMNS, tuple(rows), f"{name}, {of.adaptation}"))
    return [Section("strata", "By sex, age and site", TEXT, (), (), tuple(tables))] if tables else []


COLUMNS = ("init", "by", "stratum", "n", "rarest class", "AUROC", "95 % interval", "folds with a value")


def _rows(cells: Sequence[tuple[Mapping[str, Any], Path]], resamples: int) -> Iterator[tuple[object, ...]]:
    by_init: dict[str, list[pd.DataFrame]] = defaultdict(list)
    for cell, folder in sorted(cells, key=lambda one: (one[0]["fold"], one[0]["seed"])):
        table = pd.read_parquet(folder / "predictions.parquet")
        own = (table["role"] == "test") & (table["subset"] == "")
        by_init[cell["init"]].append(table[own])
    for init in sorted(by_init, key=rank):
        tables = [
            table.assign(**{f"by {k}": v for k, v in _strata(table).items()}) for table in by_init[init]
        ]
        found = {
            Stratum(by.removeprefix("by "), name)
            for table in tables
            for by in table.columns[table.columns.str.startswith("by ")]
            for name in table[by].dropna().unique()
        }
        split = {by for by, _ in found if sum(other.by == by for other in found) > 1}
        for stratum in sorted(s for s in found if s.by in split):
            yield (init, *stratum, *_judged(tables, stratum, resamples))


def _strata(table: pd.DataFrame) -> dict[str, pd.Series[Any]]:
    """Of each row, by what it can be told apart."""
    found = {by: table[by].dropna().astype(str).reindex(table.index) for by in ("sex", "site") if by in table}
    if "age" in table:
        names = [*(f"{low} to {high - 1}" for low, high in pairwise(AGES[:-1])), f"{AGES[-2]} and above"]
        age = pd.to_numeric(table["age"], errors="coerce")
        found["age"] = pd.cut(age, AGES, right=False, labels=names).astype(object)
    return found


def _judged(tables: Sequence[pd.DataFrame], stratum: Stratum, resamples: int) -> tuple[object, ...]:
    """n, n of the rarest class, mean AUROC, its interval, and in how many of the folds there is one."""
    folds, people = [], dict[str, int]()
    for table in tables:
        mine = table[table[f"by {stratum.by}"] == stratum.name].sort_values("subject")
        people |= dict(zip(mine["subject"], mine["label"], strict=True))
        if len(mine):
            probs = mine[[c for c in mine if c.startswith("prob_")]].to_numpy(np.float64)
            folds.append(Fold(mine["label"].to_numpy(np.int64), probs, tuple(mine["group"].astype(str))))
    values = [auroc(fold.labels, fold.probs) for fold in folds]
    known = [fold for fold, value in zip(folds, values, strict=True) if not isinstance(value, Undefined)]
    num_classes = folds[0].probs.shape[1]
    rarest = int(np.bincount(list(people.values()), minlength=num_classes).min())
    interval = bootstrap_interval(known, resamples=resamples)
    mean = float(np.mean([v for v in values if not isinstance(v, Undefined)])) if known else "undefined"
    return len(people), rarest, mean, wording.interval(interval), f"{len(known)} of {len(tables)}"
