"""What a shard set looks like: counts, missing contrasts, example stacks, rejected scans."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from cranium.volume import shard

from . import plots
from .page import Plate, Sheet, Table, Tile, png

EXAMPLES = 2  # subjects shown of each cohort
SEARCHED = 200  # row groups looked through for them


@dataclass(frozen=True)
class Cohort:
    """A shard set as read from its folder."""

    folder: Path
    manifest: dict[str, Any]
    sessions: pd.DataFrame
    rejected: pd.DataFrame

    @property
    def name(self) -> str:
        return str(self.manifest.get("cohort") or self.folder.name.rpartition("-")[0])

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.manifest["channels"])

    @property
    def presence(self) -> list[tuple[bool, ...]]:
        """For each session, which channels it has."""
        bits = self.sessions["present"].astype(int)
        return [tuple(bool(b >> k & 1) for k in range(len(self.channels))) for b in bits]


def read(folder: Path) -> Cohort:
    """The manifest and tables of `<store>/ingest/<cohort>-<hash>/`. Raises OSError when one is missing."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tables = [pq.read_table(folder / name).to_pandas() for name in ("sessions.parquet", "quarantine.parquet")]
    return Cohort(folder, manifest, *tables)


def counts(cohorts: Sequence[Cohort]) -> Table:
    """A row per cohort: subjects, sessions, stacks, rejected scans, heads, sites, median age, sex."""
    rows = []
    for cohort in cohorts:
        table, number = cohort.sessions, cohort.manifest["counts"]
        people = table.drop_duplicates("subject")
        ages = (
            pd.to_numeric(people["age"], errors="coerce").dropna()
            if "age" in table
            else pd.Series(dtype=float)
        )
        sexes = Counter(people["sex"].dropna().astype(str)) if "sex" in table else Counter()
        rows.append(
            (
                cohort.name,
                int(number["subjects"]),
                int(number["sessions"]),
                int(number["stacks"]),
                int(number["rejected"]),
                int(table["head"].nunique()) if "head" in table else None,
                int(table["site"].nunique()) if "site" in table else None,
                f"{ages.median():.0f} ({ages.min():.0f} to {ages.max():.0f})" if len(ages) else None,
                ", ".join(f"{sex} {count}" for sex, count in sorted(sexes.items())) or None,
            )
        )
    names = (
        "cohort",
        "subjects",
        "sessions",
        "stacks",
        "rejected scans",
        "heads",
        "sites",
        "median age",
        "sex",
    )
    return Table(names, tuple(rows), "cohorts")


def presence(cohorts: Sequence[Cohort]) -> Plate:
    """Which combinations of contrasts there are, and in how many sessions of each cohort."""
    channels = cohorts[0].channels
    found = {cohort.name: Counter(cohort.presence) for cohort in cohorts if cohort.channels == channels}
    patterns = sorted(
        {p for count in found.values() for p in count}, key=lambda p: (-sum(p), [not x for x in p])
    )
    numbers = {name: [count[pattern] for pattern in patterns] for name, count in found.items()}
    table = Table(
        (*channels, *found),
        tuple(
            (*("yes" if there else "missing" for there in pattern), *(numbers[name][row] for name in found))
            for row, pattern in enumerate(patterns)
        ),
        "contrasts",
    )
    return Plate(
        "Which contrasts are there",
        "Each row is a combination of contrasts: a filled disc is present, a ring is missing. "
        "A bar is the number of sessions with that combination in the cohort above it.",
        plots.presence(patterns, channels, numbers, "Sessions by combination of contrasts"),
        (table,),
    )


def examples(cohorts: Sequence[Cohort]) -> Plate:
    """The middle stack of a few subjects per cohort, one picture per contrast."""
    rows: dict[str, Sequence[Tile]] = {}
    for cohort in cohorts:
        for file, group, subject in _chosen(cohort):
            stacks = shard.read_row_group(file, group)
            middle = len(stacks) // 2
            there = int(stacks.column("present")[middle].as_py())
            picture = shard.pixels(stacks)[middle]  # [C, S, H, W]
            tiles = []
            for k, channel in enumerate(cohort.channels):
                image = picture[k, picture.shape[1] // 2]
                tiles.append(Tile(channel, png(image) if there >> k & 1 else None))
            rows[f"{cohort.name} · {subject}{_labels(cohort, subject)}"] = tiles
    return Plate(
        "Example stacks",
        "A row is one subject: the middle slice of its stack as the model sees it (8 bit, fixed mm per pixel), "
        "one picture per contrast. A hatched tile is a contrast that subject does not have.",
        Sheet(rows),
        wide=True,
    )


def _labels(cohort: Cohort, subject: str) -> str:
    """The subject's condition, where the cohort has such a column."""
    if "condition" not in cohort.sessions:
        return ""
    values = cohort.sessions.loc[cohort.sessions["subject"] == subject, "condition"].dropna()
    return f" · {values.iloc[0]}" if len(values) and values.iloc[0] else ""


def _chosen(cohort: Cohort) -> list[tuple[str, int, str]]:
    """Row groups (file, index, subject) to show: different conditions, a complete set and one with a gap."""
    whole = 2 ** len(cohort.channels) - 1
    best: list[tuple[str, int, str]] = []
    seen_conditions: set[str] = set()
    seen_complete: set[bool] = set()
    spare: list[tuple[str, int, str]] = []
    subjects: set[str] = set()
    base = shard.base(cohort.folder)
    looked = 0
    for entry in cohort.manifest["shards"]:
        for group in range(len(entry["row_groups"])):
            looked += 1
            if looked > SEARCHED or len(best) == EXAMPLES:
                return best or spare[:EXAMPLES]
            path = f"{base}/{entry['file']}"
            row = shard.read_row_group(path, group, ["subject", "present"]).slice(0, 1).to_pylist()[0]
            condition, complete = _labels(cohort, row["subject"]), row["present"] == whole
            if row["subject"] in subjects:
                continue
            subjects.add(row["subject"])
            spare.append((path, group, row["subject"]))
            new_condition = condition not in seen_conditions or not condition
            if new_condition and complete not in seen_complete:
                best.append(spare[-1])
                seen_conditions.add(condition)
                seen_complete.add(complete)
    return (best + [item for item in spare if item not in best])[:EXAMPLES]


def rejections(cohorts: Sequence[Cohort]) -> Table:
    """Rejected scans by cohort, code and reason, most frequent first."""
    rows: list[tuple[object, ...]] = []
    for cohort in cohorts:
        if len(cohort.rejected):
            found = Counter(zip(cohort.rejected["code"], cohort.rejected["reason"], strict=True))
            rows += [(cohort.name, str(code), str(reason), n) for (code, reason), n in found.most_common()]
    return Table(("cohort", "code", "reason", "scans"), tuple(rows), "quarantine")
