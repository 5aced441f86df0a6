"""The report's part on label maps, from the rows that each cell kept per subject and region.

A mean is over subjects inside each fold, then over folds. An empty prediction of something that is there counts with
Dice 0; a region that neither the truth nor the prediction has is left out of a mean, and counted beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from cranium import wording
from cranium.figures import overlay, plots
from cranium.figures.page import Plate, Section, Sheet, Table, Tile
from cranium.segmenting import OVERLAYS, PREDICTIONS
from cranium.tasks.comparison import REFERENCES, STACKS, cheapness, rank
from cranium.tasks.metrics import Floats, Undefined
from cranium.tasks.statistics import (
    Fold,
    Interval,
    bootstrap_difference,
    bootstrap_interval,
    corrected_t_test,
)

TEST = "test"
HOW = {
    "linear": "linear decoder on frozen tokens",
    "conv": "convolutional decoder on frozen tokens",
    "lora": "low-rank updates under a convolutional decoder",
    "finetune": "fine-tuned under a convolutional decoder",
}
RULE = (
    "Scores are in 3-D on the scan's own voxels, against the original label file. A prediction that is empty where "
    "there is something to find is missed: Dice and surface Dice 0, HD95 the diagonal of the image, and it stays in "
    "the mean. Where neither has the class there is nothing to score: left out of the mean, and counted."
)
OF_CELL = ("init", "adaptation", "stack", "label_fraction", "scheme", "seed")
ACROSS = (
    "Mean Dice over test folds. Read down a column to compare initialisations, along a row to compare adaptations. A "
    "cnn has no backbone and is learnt in one way, whatever stands beside it."
)
COMPARED = (
    "Differences are paired: the same subjects in the same folds. The interval resamples subjects, the models being "
    "fixed; the corrected resampled t-test is over folds and is not adjusted for the number of rows."
)


class Setting(NamedTuple):
    """What cells must share to stand in one chart."""

    task: str
    cohort: str
    contrasts: str
    stack: str
    scheme: str
    adaptation: str
    label_fraction: float

    @property
    def words(self) -> str:
        grouped = "folds grouped by subject" if self.scheme == "subject" else f"leave one {self.scheme} out"
        share = "" if self.label_fraction == 1 else f", {100 * self.label_fraction:g} % of the labels"
        how = f", {HOW.get(self.adaptation, self.adaptation)}" if self.adaptation else ""
        seen = (
            self.contrasts if self.stack == "contrasts" else f"{self.contrasts}, {wording.STACKS[self.stack]}"
        )
        return f"{self.task.capitalize()} in {self.cohort} ({seen}){how}, {grouped}{share}"


@dataclass(frozen=True)
class Point:
    """One metric of one region under one initialisation on one test set: its mean over folds, and who is in it."""

    init: str
    test: str
    region: str
    metric: str
    interval: Interval | Undefined
    values: tuple[float, ...]  # of every subject, by name
    folds: Mapping[tuple[int, int], Fold]  # (fold, seed) -> values as `probs`

    @property
    def mean(self) -> float | None:
        means = [float(fold.probs.mean()) for fold in self.folds.values() if len(fold.probs)]
        return float(np.mean(means)) if means else None


def read(folders: Sequence[Path], runs: Mapping[str, str]) -> pd.DataFrame:
    """All rows of the cells in these folders, with where each cell stands in the grid."""
    parts = []
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text())
        cell, counts = manifest["cell"], manifest["counts"]
        part = pd.read_parquet(folder / PREDICTIONS)
        parts.append(
            part.assign(
                task=manifest["task"]["name"],
                home=cell["cohort"],
                test=np.where(part["role"] == TEST, TEST, part["cohort"]),
                contrasts=" + ".join(cell["contrasts"]),
                **{name: cell[name] for name in OF_CELL},
                n_train=counts["n_train"],
                tolerance_mm=manifest["task"]["tolerance_mm"],
                classes=[manifest["classes"]] * len(part),
                run=runs.get(folder.name, ""),
                folder=str(folder),
            )
        )
    return pd.concat(parts, ignore_index=True)


def weighted_mean(labels: ArrayLike, values: ArrayLike, weights: Floats) -> Floats:
    """Mean of `values` [n] in each resample, `weights` [r, n] being how often each was drawn; NaN for none."""
    total = weights.sum(axis=1)
    summed = weights @ np.asarray(values, float)
    means: Floats = np.divide(summed, total, out=np.full(len(weights), np.nan), where=total > 0)
    return means


def point(rows: pd.DataFrame, metric: str, resamples: int) -> Point:
    """Of the rows of one initialisation, test set and region."""
    known = rows[rows[metric].notna()]
    folds = {
        (int(fold), int(seed)): Fold(
            np.zeros(len(part), np.int64), part[metric].to_numpy(float), tuple(part["group"])
        )
        for (fold, seed), part in known.sort_values("subject").groupby(["fold", "seed"])
    }
    interval: Interval | Undefined = Undefined("nothing to score")
    if folds:
        interval = bootstrap_interval(list(folds.values()), weighted_mean, resamples)
    first = rows.iloc[0]
    values = tuple(known.sort_values(["subject", "seed"])[metric].astype(float))
    return Point(first["init"], first["test"], first["region"], metric, interval, values, folds)


def sections(table: pd.DataFrame, ui: Any, resamples: int) -> tuple[list[Section], list[str]]:
    """Sections of the page, and the result in sentences. `ui`: run id -> what to show for it (`page.Link`)."""
    plates, pictures, tables, said = [], [], [], []
    # Of the test folds, by initialisation and adaptation.
    means: dict[tuple[Setting, str], dict[tuple[str, str], Point]] = {}
    for setting, rows in _settings(beside_references(table)):
        regions, tests = list(dict.fromkeys(rows["region"])), list(dict.fromkeys(rows["test"]))
        found = {
            (test, region): [
                point(part, "dice", resamples)
                for _, part in _by_init(rows[(rows["test"] == test) & (rows["region"] == region)])
            ]
            for test in sorted(tests, key=lambda test: (test != TEST, test))
            for region in regions
        }
        for (test, region), points in found.items():
            plates.append(_plate(setting, test, region, points, rows, ui))
            if test == TEST:
                of = means.setdefault((setting._replace(adaptation=""), region), {})
                of |= {(p.init, setting.adaptation): p for p in points}
        said.append(_sentence(setting, found[TEST, rows["classes"].iloc[0][0]], rows))
        pairs = [pair for (test, _), points in found.items() if test == TEST for pair in _pairs(points, rows)]
        if pairs:
            columns = ("class", "difference of Dice", "mean", "95 % interval", "corrected t, p")
            tables.append(Table(columns, tuple(pairs), setting.words))
        pictures.append(_pictures(setting, rows))
    tables += _between_stacks(table, resamples)
    made = [
        Section("maps", "Segmentation", (RULE,), tuple(plates)),
        Section("pictures", "Best, median and worst", (), tuple(pictures)),
    ]
    if ways := [found for found in (_by_adaptation(*item) for item in means.items()) if found]:
        made.append(Section("map-adaptations", "Segmentation: adaptations", (ACROSS,), (), tuple(ways)))
    if tables:
        made.append(Section("map-tests", "Segmentation: comparisons", (COMPARED,), (), tuple(tables)))
    return made, said


def beside_references(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of a CNN repeated beside every adaptation of their setting instead of their own, as in classification."""
    own = table["init"].isin(REFERENCES)
    keys = ["task", "home", "contrasts", "stack", "scheme", "label_fraction"]
    ways = table.loc[~own, [*keys, "adaptation"]].drop_duplicates()
    placed = table[own].merge(ways, how="left", on=keys, suffixes=("_own", ""))
    placed["adaptation"] = placed["adaptation"].fillna(placed.pop("adaptation_own"))
    return pd.concat([table[~own], placed[table.columns]], ignore_index=True)


def _by_adaptation(where: tuple[Setting, str], found: Mapping[tuple[str, str], Point]) -> Table | None:
    """Initialisations down, adaptations along; None where there is one adaptation only."""
    setting, region = where
    ways = sorted({way for _, way in found}, key=cheapness)
    if len(ways) < 2:
        return None
    rows = [
        (init, *(_cell(found[init, way]) if (init, way) in found else None for way in ways))
        for init in sorted({init for init, _ in found} - set(REFERENCES), key=rank)
    ]
    for init in sorted({init for init, _ in found} & set(REFERENCES), key=rank):
        rows.append((init, *[_cell(next(p for (i, _), p in found.items() if i == init))] * len(ways)))
    return Table(("init", *ways), tuple(rows), f"{setting.words}: {region}")


def _cell(point: Point) -> str:
    return "undefined" if point.mean is None else f"{point.mean:.2f}{_span(point.interval)}"


def _settings(table: pd.DataFrame) -> Iterator[tuple[Setting, pd.DataFrame]]:
    keys = ["task", "home", "contrasts", "stack", "scheme", "adaptation", "label_fraction"]
    found = [(Setting(*key), rows) for key, rows in table.groupby(keys, sort=False)]
    yield from sorted(
        found, key=lambda item: item[0]._replace(adaptation=f"{cheapness(item[0].adaptation):02}")
    )


def _by_init(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return sorted(((str(init), part) for init, part in rows.groupby("init")), key=lambda item: rank(item[0]))


def _sentence(setting: Setting, points: Sequence[Point], rows: pd.DataFrame) -> str:
    n = rows.loc[rows["test"] == TEST, "subject"].nunique()
    means = [
        f"{p.mean:.2f}{_span(p.interval)} for {p.init}" if p.mean is not None else f"undefined for {p.init}"
        for p in points
    ]
    region = points[0].region
    return f"{setting.words}: the mean Dice of {region} over {n} test subjects is {', '.join(means)}."


def _span(interval: Interval | Undefined) -> str:
    return "" if isinstance(interval, Undefined) else f" ({interval.low:.2f} to {interval.high:.2f})"


def _plate(
    setting: Setting, test: str, region: str, points: Sequence[Point], rows: pd.DataFrame, ui: Any
) -> Plate:
    mine = rows[(rows["test"] == test) & (rows["region"] == region)]
    where = f"{setting.words}: {region}" + ("" if test == TEST else f", tested on {test}")
    marks = []
    for p in points:
        if isinstance(p.interval, Undefined):
            marks.append(plots.Mark(p.init, p.mean, dots=p.values, note=p.interval.reason))
        else:
            marks.append(plots.Mark(p.init, p.mean, p.interval.low, p.interval.high, p.values))
    n = mine["subject"].nunique()
    caption = (
        f"A ring is the Dice of one of {n} test subjects{', once per seed' if mine['seed'].nunique() > 1 else ''}, a "
        "bar runs to the mean over folds, a whisker is its 95 % percentile bootstrap interval (subjects drawn with "
        "replacement; the models are fixed)."
    )
    if n < 10:
        caption += f" With {n} subjects the interval is too narrow: read the rings."
    picture = plots.bars(marks, f"Dice by initialisation: {where}", axis="Dice", chance=None)
    tables = (_means(mine, f"means of {region}"), _subjects(mine, f"subjects, {region}", ui))
    return Plate(where, caption, picture, tables)


def _means(mine: pd.DataFrame, name: str) -> Table:
    rows: list[tuple[object, ...]] = []
    for init, part in _by_init(mine):
        values = [point(part, metric, 100).mean for metric in ("dice", "hd95_mm", "surface_dice")]
        undefined, missed = int(part["dice"].isna().sum()), int(part["missed"].sum())
        rows.append((init, *values, missed, undefined, len(part), _range(part["n_train"])))
    tolerance = f"{mine['tolerance_mm'].iloc[0]:g} mm"
    columns = ("init", "Dice", "HD95, mm", f"surface Dice at {tolerance}", "missed", "nothing to score",
               "predictions", "n train")  # fmt: skip
    return Table(columns, tuple(rows), name)


def _range(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def _subjects(mine: pd.DataFrame, name: str, ui: Any) -> Table:
    rows: list[tuple[object, ...]] = []
    for init, part in _by_init(mine):
        for row in part.sort_values(["subject", "seed"]).to_dict("records"):
            values = [row[m] if pd.notna(row[m]) else None for m in ("dice", "hd95_mm", "surface_dice")]
            outcome = "missed" if row["missed"] else row["undefined"]
            volumes = (float(row["truth_ml"]), float(row["predicted_ml"]))
            rows.append((init, row["subject"], row["seed"], *values, *volumes, outcome, ui(row["run"])))
    columns = ("init", "subject", "seed", "Dice", "HD95, mm", "surface Dice", "truth, ml", "predicted, ml",
               "outcome", "run")  # fmt: skip
    return Table(columns, tuple(rows), name)


def _pairs(points: Sequence[Point], rows: pd.DataFrame) -> Iterator[tuple[object, ...]]:
    for b, a in combinations(points, 2):
        shared = sorted(a.folds.keys() & b.folds.keys())
        try:
            interval = bootstrap_difference(
                [a.folds[k] for k in shared], [b.folds[k] for k in shared], weighted_mean
            )
        except ValueError as error:
            interval = Undefined(str(error))
        if isinstance(interval, Undefined):
            yield a.region, f"{a.init} minus {b.init}", None, f"no interval ({interval.reason})", "undefined"
            continue
        by_fold: dict[int, list[float]] = {}
        for key in shared:
            gap = float(a.folds[key].probs.mean() - b.folds[key].probs.mean())
            by_fold.setdefault(key[0], []).append(gap)
        gaps = [float(np.mean(values)) for values in by_fold.values()]
        mine = rows[(rows["test"] == TEST) & (rows["init"] == a.init)]
        n_test = mine["subject"].nunique() / len(gaps)
        test = corrected_t_test(gaps, [0.0] * len(gaps), float(mine["n_train"].mean()), n_test)
        p = test.reason if isinstance(test, Undefined) else f"{test.p:.3f}"
        span = f"{interval.low:+.2f} to {interval.high:+.2f}"
        yield a.region, f"{a.init} minus {b.init}", interval.estimate, span, p


def _between_stacks(table: pd.DataFrame, resamples: int) -> Iterator[Table]:
    """A table for each initialisation and decoder: one kind of stack against another."""
    keys = ["task", "home", "scheme", "adaptation", "label_fraction", "init"]
    for (task, home, scheme, adaptation, fraction, init), rows in table.groupby(keys, sort=True):
        mine = rows[rows["test"] == TEST]
        kinds = [stack for stack in STACKS if (mine["stack"] == stack).any()]
        found: list[tuple[object, ...]] = []
        for region in dict.fromkeys(mine["region"]):
            of = mine[mine["region"] == region]
            points = [replace(point(of[of["stack"] == kind], "dice", resamples), init=kind) for kind in kinds]
            found += _pairs(points, mine.assign(init=mine["stack"]))
        if found:
            words = Setting(task, home, "", "contrasts", scheme, adaptation, fraction).words.replace(
                " ()", ""
            )
            columns = ("class", "difference of Dice", "mean", "95 % interval", "corrected t, p")
            yield Table(columns, tuple(found), f"One kind of stack against another, {init}: {words}")


def _pictures(setting: Setting, rows: pd.DataFrame) -> Plate:
    """Of each initialisation the subjects with the best, the median and the worst mean Dice over the classes."""
    sheet: dict[str, list[Tile]] = {}
    inside = rows[(rows["test"] == TEST) & (rows["seed"] == rows["seed"].min())]
    for init, part in _by_init(inside):
        keys = ["subject", "folder", "picture"]
        mean = (
            part.groupby(keys, sort=True)["dice"].mean().dropna().sort_values(ascending=False, kind="stable")
        )
        if mean.empty:
            continue
        chosen = {0: "best", (len(mean) - 1) // 2: "median", len(mean) - 1: "worst"}
        for place in sorted(chosen):
            subject, folder, picture = mean.index[place]
            pair = overlay.read(Path(folder) / OVERLAYS / picture) or (None, None)
            title = f"{init} · {chosen[place]}: {subject}, Dice {mean.iloc[place]:.2f}"
            sheet[title] = [Tile("truth", pair[0]), Tile("prediction", pair[1])]
    caption = (
        "A pair is one test subject on the slice with most truth "
        f"({overlay.legend(rows['classes'].iloc[0])}); the white outline is the truth on both. Dice is of the whole "
        "scan, the mean of its classes and their unions, not of the slice."
    )
    return Plate(setting.words, caption, Sheet(sheet), wide=True)
