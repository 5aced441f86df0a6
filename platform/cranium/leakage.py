"""The gate before anything is trained: nobody is on two sides, by name, group, file, declared overlap or looks.

Sides are train and test of a fold, the external cohorts and the SSL corpus. What is shared must be accepted by name,
and then stands as a stamp on every report.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from cranium.config import PRETRAINED_HERE, Experiment, Task, UserError
from cranium.store import Artefact
from cranium.tasks import splits
from cranium.volume import fingerprint

Folds = Mapping[str, int]
ShardSets = Mapping[str, Artefact]
OWN = ("subject_id", "key")  # columns of a table of units that are no units


def gate(exp: Experiment, task: Task, folds: Folds, shard_sets: ShardSets) -> list[str]:
    """What is shared between sides and accepted by name, in words. Raises `UserError(LEAKAGE)` for all else."""
    assert exp.adapt and exp.sweep
    made = {init for init in exp.sweep.init if init in PRETRAINED_HERE or init.startswith("run:")}
    pretrained = made and exp.pretrain
    corpus = exp.pretrain.cohorts if pretrained and exp.pretrain else ()
    cohorts = tuple(dict.fromkeys((task.cohort, *task.external, *corpus)))
    tables = _tables(cohorts, (task.cohort, *task.external), shard_sets)
    home = tables[task.cohort]
    fixed = {"ssl": [tables[c] for c in corpus], "external": [tables[c] for c in task.external]}
    declared = _declared({"test": [task.cohort], "ssl": corpus, "external": task.external}, shard_sets)
    found: dict[tuple[str, tuple[str, str]], set[str]] = {}
    for fold in sorted(set(folds.values())):
        test = home["subject_id"].map(lambda s, k=fold: folds.get(s) == k)
        train = home["subject_id"].map(lambda s, k=fold: s in folds and folds[s] != k)
        sides = {"train": [home[train]], "test": [home[test]], **fixed}
        names = {c for some in sides.values() for table in some for c in table} - set(OWN)
        units = {
            unit: {
                side: {v for t in some if unit in t for vs in t[unit] for v in vs}
                for side, some in sides.items()
            }
            for unit in sorted(names)
        }
        for side, pairs in declared.items():
            units["overlap"][side] |= pairs
        try:
            overlaps = splits.check_leakage(units, exp.adapt.accept_leakage)
        except splits.Leakage as leakage:
            reason = str(leakage).removeprefix("LEAKAGE: ")
            raise UserError("LEAKAGE", f"task {task.name}: {reason}") from None
        except ValueError as error:
            raise UserError("CONFIG", f"adapt.accept_leakage: {error}") from None
        for overlap in overlaps:
            found.setdefault((overlap.unit, overlap.splits), set()).update(overlap.ids)
    return [_in_words(unit, sides, sorted(ids)) for (unit, sides), ids in sorted(found.items())]


def _in_words(unit: str, sides: tuple[str, str], ids: list[str]) -> str:
    first, second = ("SSL corpus" if side == "ssl" else side for side in sides)
    shown = ", ".join(ids[:6]) + (f" and {len(ids) - 6} more" if len(ids) > 6 else "")
    many = "" if len(ids) == 1 else "s"
    if unit == "overlap":
        return f"{first} and {second} hold people or collections that are declared to overlap ({shown})"
    if unit == "duplicate":
        return f"{len(ids)} pair{many} of sessions in {first} and {second} look like one head ({shown})"
    return f"{len(ids)} {unit}{many} shared between {first} and {second} ({shown})"


# ---- who and what ---------------------------------------------------------------------------------------------------


def _tables(
    cohorts: tuple[str, ...], looked_at: Iterable[str], shard_sets: ShardSets
) -> dict[str, pd.DataFrame]:
    """For every cohort one row a session: the values of every unit of leakage, as tuples."""
    tables = {cohort: _units(shard_sets[cohort]) for cohort in cohorts}
    for cohort in cohorts:
        tables[cohort]["overlap"] = _translated(cohort, tables, shard_sets)
    duplicates = _duplicates(tables, set(looked_at), shard_sets)
    for table in tables.values():
        table["duplicate"] = [tuple(duplicates.get(key, ())) for key in table["key"]]
    return tables


def _units(shard_set: Artefact) -> pd.DataFrame:
    """Subject, file contents and declared groups of every session; ids of a cohort are its own."""
    manifest = shard_set.manifest()
    cohort, card = manifest["cohort"], manifest["card"]
    table = pd.read_parquet(shard_set.path / "sessions.parquet")
    units: dict[str, Any] = {
        "subject_id": table["subject"],
        "key": [
            f"{cohort}/{s}{f'/{v}' if v else ''}"
            for s, v in zip(table["subject"], table["session"], strict=True)
        ],
        "subject": [(f"{cohort}/{s}",) for s in table["subject"]],
        "content": [tuple(source["sha256"] for source in json.loads(s).values()) for s in table["sources"]],
    }
    for group in card["groups"]:
        # Simulated cohorts share their source heads by name; families and the like are numbered per collection.
        shared = bool(card["simulated"])
        known = table[group].notna()  # where a table says nothing there is nothing to share
        units[group] = [
            (str(v) if shared else f"{cohort}/{v}",) if k else ()
            for v, k in zip(table[group], known, strict=True)
        ]
    return pd.DataFrame(units)


def _resolved(cohort: str, shard_sets: ShardSets) -> dict[str, dict[str, list[str]]]:
    """Other collection -> our subject -> theirs, where the card's mapping of ids could be walked at ingest.

    Not where one of the two holds ids and the other keys for them: those cannot be compared.
    """
    manifest = shard_sets[cohort].manifest()
    found = dict(manifest.get("overlap_ids") or {})
    named = manifest.get("identifiers")
    others = {
        other: shard_sets[other].manifest().get("identifiers") for other in found if other in shard_sets
    }
    return {other: ids for other, ids in found.items() if others.get(other, named) == named}


def _declared(sides: Mapping[str, Iterable[str]], shard_sets: ShardSets) -> dict[str, set[str]]:
    """side -> the pairs of collections on it that a card's `overlaps:` declares to share people nobody can name."""
    manifests = {c: shard_sets[c].manifest() for cohorts in sides.values() for c in cohorts}
    pairs = {frozenset((c, o["cohort"])) for c, m in manifests.items() for o in m["card"]["overlaps"]}
    pairs -= {frozenset((c, other)) for c in manifests for other in _resolved(c, shard_sets)}
    return {
        side: {" and ".join(sorted(p)) for p in pairs if p & set(cohorts)} for side, cohorts in sides.items()
    }


def _translated(
    cohort: str, tables: Mapping[str, pd.DataFrame], shard_sets: ShardSets
) -> list[tuple[str, ...]]:
    """For every session of a cohort the people, named in both collections, that an id mapping says it shows."""
    named: dict[str, set[str]] = {}
    for here in tables:
        for other, ids in _resolved(here, shard_sets).items():
            for ours, theirs in ids.items():
                for their in theirs:
                    person = f"{here}/{ours} = {other}/{their}"
                    for place, subject in ((here, ours), (other, their)):
                        if place == cohort:
                            named.setdefault(subject, set()).add(person)
    return [tuple(sorted(named.get(str(s), ()))) for s in tables[cohort]["subject_id"]]


# ---- looks ----------------------------------------------------------------------------------------------------------


def _duplicates(
    tables: Mapping[str, pd.DataFrame], looked_at: set[str], shard_sets: ShardSets
) -> dict[str, list[str]]:
    """Session -> the pairs it is in of sessions that look like one head; not those that another unit ties already."""
    found: dict[str, list[str]] = {}
    by_channels: dict[tuple[str, ...], list[str]] = {}
    for cohort in tables:
        by_channels.setdefault(tuple(shard_sets[cohort].manifest()["channels"]), []).append(cohort)
    for cohorts in by_channels.values():
        every = pd.concat([tables[cohort] for cohort in cohorts], ignore_index=True)
        ties = [c for c in every if c not in OWN]
        folders = tuple(_version(shard_sets[cohort]) for cohort in cohorts)
        looked = tuple(cohort in looked_at for cohort in cohorts)
        for match in _matches(folders, looked):
            first, second = every.iloc[match.first], every.iloc[match.second]
            if any(set(_tuple(first[tie])) & set(_tuple(second[tie])) for tie in ties):
                continue
            pair = f"{first['key']} ~ {second['key']} ({match.similarity:.2f})"
            for key in (first["key"], second["key"]):
                found.setdefault(key, []).append(pair)
    return found


def _tuple(value: Any) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else ()  # a group that only other cohorts have is no tie


def _version(shard_set: Artefact) -> tuple[Path, int]:
    return shard_set.path, (shard_set.path / "manifest.json").stat().st_mtime_ns


@functools.lru_cache(maxsize=8)
def _matches(
    shard_sets: tuple[tuple[Path, int], ...], looked_at: tuple[bool, ...]
) -> tuple[fingerprint.Match, ...]:
    """Pairs among the sessions of all shard sets, one of them in a set that is looked at."""
    prints: list[bytes] = []
    people: list[str] = []
    rows: list[int] = []
    for number, ((folder, _), looked) in enumerate(zip(shard_sets, looked_at, strict=True)):
        table = pd.read_parquet(folder / "sessions.parquet", columns=["subject", "fingerprint"])
        if looked:
            rows += range(len(prints), len(prints) + len(table))
        prints += table["fingerprint"].tolist()
        people += [f"{number}/{subject}" for subject in table["subject"]]
    return tuple(fingerprint.matches(prints, people, rows))
