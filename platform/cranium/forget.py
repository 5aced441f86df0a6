"""`cranium forget`: take one subject out of everything that a store holds.

What holds the subject's data or results is rewritten (shard sets) or removed (features, predictions, splits, pages);
weights that have seen the subject are kept but marked, for they cannot unlearn: reading them raises FORGOTTEN. The id
goes on a list of keyed hashes, so that ingesting the same files does not bring the subject back.

A plan in `private/` is written before the first change and removed after the last. Killed anywhere, the same command
completes it; every step may be done twice. Dependents go first, so nothing is ever visible that was made from rows
that are gone. What it can't reach (backups, raw files, exported weights) stands in docs/privacy.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cranium import capture, identity, naming, place, shardset, store, track, versions
from cranium.config import Machine, UserError, fingerprint
from cranium.patterns import tidy
from cranium.store import Artefact
from cranium.volume import privacy, shard

STAGES = ("embed", "pretrain", "adapt", "sweep", "report")  # and whatever else names what it was made from
# Folders of a store that hold no results.
OURS = ("ingest", "demo", "logs", "locks", "private", "tracked", track.ARTEFACTS)
WORDS = (".json", ".jsonl", ".yaml", ".html", ".csv", ".tsv", ".txt", ".log", ".md")
# Shard sets, SHA-256 of their shards, dependents by their fate.
PLAN = ("sets", "shards", "removed", "marked")
READ_BYTES = 32 << 20  # text files beyond this are not searched

Tell = Callable[[str], None]


@dataclass
class Forgotten:
    """What was done, in names of artefacts; nothing in it names the subject."""

    date: str
    rewritten: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    marked: list[str] = field(default_factory=list)
    lines: int = 0  # of logs
    runs: int = 0  # of MLflow


@dataclass(frozen=True)
class _Subject:
    """Who: under every name that this store may give the subject, and the keyed hash that outlives them."""

    cohort: str
    names: frozenset[str]
    key: str

    @property
    def pattern(self) -> re.Pattern[str]:
        return privacy.naming(self.names)


def forget(machine: Machine, cohort: str, subject: str, tell: Tell = lambda text: None) -> Forgotten:
    """Take `subject` of `cohort` out of the store. Doing it again completes it, or finds nothing left.

    Raises `UserError`: NO_SUBJECT (nobody of this name here), BUSY (something works in this store), TRACKING (MLflow
    was not reached; all else is done, and the same command does the rest).
    """
    who = _named(machine.store, cohort, subject)
    plan_path = identity.private(machine.store) / f"forget-{who.key}.json"
    with store.lock(machine.store, "forget"):
        store.require_idle(machine.store, besides="forget")
        plan = _plan(machine.store, who, plan_path)
        done = Forgotten(identity.remember_forgotten(machine.store, who.key))
        _tombstones(machine.store, who, plan, done, tell)
        for name in plan["sets"]:
            made = Artefact(machine.store / "ingest" / name)
            if made.done:
                with store.lock(machine.store, made.id):
                    # Pages with pictures; ingest makes them anew.
                    place.remove(sorted(made.path.glob("*.html")))
                    versions.rewrite(made, lambda s, _: s in who.names)
                    _left_out(made, who.key)
                done.rewritten.append(made.id)
                tell(f"rewritten: {made.id}")
        _mappings(machine.store, who)
        for begun in versions.unfinished(machine.store, cohort):
            _discard(begun)
            tell(f"removed: {begun.id}, which was never finished")
        _private_names(machine.store, who)
        done.lines = _scrub_logs(machine.store / "logs", who.pattern)
        for folder in (
            identity.private(machine.store),
            machine.store / "logs",
            *(at.path for at in _results(machine.store)),
        ):
            _leftovers(folder)
        done.runs = _tag_runs(machine, plan, done)
        plan_path.unlink()
    return done


def _left_out(made: Artefact, key: str) -> None:
    """Note in the manifest that somebody is left out, so that an ingest that finds the set can say so."""
    if made.done and key not in (known := made.manifest().get("forgotten", [])):
        base = shard.base(made.path)
        store.commit(base, made.manifest() | {"forgotten": sorted([*known, key])})
        shardset.fetch(made, base)


def _mappings(folder: Path, who: _Subject) -> None:
    """Take the subject out of what other collections say of who is also in this one."""
    for made in store.find(folder, "ingest"):
        manifest = made.manifest()
        every = manifest.get("overlap_ids") or {}
        ids = every.get(who.cohort, {})
        left = {ours: [t for t in theirs if tidy(t) not in who.names] for ours, theirs in ids.items()}
        if left != ids:
            with store.lock(folder, made.id):
                base = shard.base(made.path)
                mapping = {ours: theirs for ours, theirs in left.items() if theirs}
                store.commit(base, manifest | {"overlap_ids": every | {who.cohort: mapping}})
                shardset.fetch(made, base)


def traces(machine: Machine, cohort: str, subject: str) -> list[str]:
    """Text files of the store that still name the subject, e.g. notes that someone put there: for a person to judge."""
    pattern = _named(machine.store, cohort, subject).pattern
    found = []
    for path in sorted(machine.store.rglob("*")):
        inside = path.relative_to(machine.store)
        if inside.parts[0] in ("private", "demo") or path.suffix not in WORDS or not path.is_file():
            continue
        if path.stat().st_size <= READ_BYTES and pattern.search(path.read_text(errors="replace")):
            found.append(pattern.sub("...", str(inside)))
    return found


def _named(folder: Path, cohort: str, subject: str) -> _Subject:
    plain = tidy(subject)
    key = naming.subject_key(identity.salt(folder), cohort, plain)
    return _Subject(cohort, frozenset((plain, key)), identity.forgotten_key(folder, cohort, plain))


# ---- the plan -------------------------------------------------------------------------------------------------------


def _plan(folder: Path, who: _Subject, path: Path) -> dict[str, Any]:
    """Which shard sets hold the subject, and the SHA-256 of their shards as they were; kept until all is done."""
    plan = json.loads(path.read_text()) if path.is_file() else {name: [] for name in PLAN}
    for made in store.find(folder, "ingest"):
        manifest = made.manifest()
        if manifest["cohort"] == who.cohort and _holds(made, manifest, who.names):
            plan["sets"].append(made.path.name)
            plan["shards"] += [entry["sha256"] for entry in manifest["shards"]]
    plan = {name: sorted(set(values)) for name, values in plan.items()}
    if not plan["sets"] and not path.is_file() and who.key not in identity.forgotten(folder):
        raise UserError("NO_SUBJECT", _nobody(folder, who.cohort))
    identity.write_private(path, plan)
    return plan


def _nobody(folder: Path, cohort: str) -> str:
    here = [made.path.name for made in store.find(folder, "ingest") if made.manifest()["cohort"] == cohort]
    where = (
        f"none of {', '.join(here)} holds"
        if here
        else f"{folder} has no shard set of {cohort} that could hold"
    )
    return f"{where} this subject; give the id as `sessions.parquet` or the raw folder has it, without `sub-`"


def _holds(made: Artefact, manifest: dict[str, Any], names: frozenset[str]) -> bool:
    groups = {group["subject"] for entry in manifest["shards"] for group in entry["row_groups"]}
    tables = (pq.read_table(made.path / name, columns=["subject"]) for name in shardset.TABLES)
    return not names.isdisjoint(groups.union(*(table["subject"].to_pylist() for table in tables)))


# ---- what depends on it ---------------------------------------------------------------------------------------------


def _tombstones(folder: Path, who: _Subject, plan: dict[str, Any], done: Forgotten, tell: Tell) -> None:
    """Remove results made from the subject's rows, mark weights that have seen them and what those made."""
    removed, marked = _dependents(folder, who.cohort, plan)
    plan |= {"removed": sorted(made.id for made in removed), "marked": sorted(made.id for made in marked)}
    identity.write_private(identity.private(folder) / f"forget-{who.key}.json", plan)
    for made in marked:
        message = (
            f"{made.id} comes of weights that have seen a subject forgotten on {done.date}; run the experiment again "
            f"for new ones, or remove {store.TOMBSTONE} there if you may keep what was learned"
        )
        store.tombstone(made.path, {"date": done.date, "subject": who.key, "kept": True, "message": message})
        place.remove_folder(made.path / capture.FOLDER)  # names whose rows a step was made of
        done.marked.append(made.id)
        tell(f"marked: {made.id}")
    for made in removed:
        message = (
            f"{made.id} was removed because a subject was forgotten on {done.date}; run the experiment again"
        )
        store.tombstone(made.path, {"date": done.date, "subject": who.key, "kept": False, "message": message})
        _empty(made)
        if made.path.parent.name == "sweep":
            for tuned in (made.path.parent / ".tune").glob(f"{made.path.name}-*"):
                place.remove_folder(tuned)
        done.removed.append(made.id)
        tell(f"removed: {made.id}")


def _dependents(folder: Path, cohort: str, plan: dict[str, Any]) -> tuple[list[Artefact], list[Artefact]]:
    """Artefacts that name the plan's shard sets, their shards or each other, by what becomes of them: removed, marked.

    An artefact names what it was made from in its manifest, its key and its config. Pretrained weights are kept; what
    names only them is kept with them; all else goes. Unfinished work on the cohort goes too. What an earlier attempt
    had found stays found, for what it removed names nothing any more.
    """
    words = {made: _words(made) for made in _results(folder)}
    removed = {Artefact(folder / name) for name in plan["removed"]}
    removed |= {made for made in words if _begun(made, cohort, words[made])}
    kept = {made for made in words if made.path.parent.name == "pretrain"}
    gone = {*plan["sets"], *plan["shards"]}
    removed |= _naming(words, gone | {made.path.name for made in removed}, besides=kept)
    gone |= {made.path.name for made in removed}
    marked = {Artefact(folder / name) for name in plan["marked"]}
    marked |= {made for made in kept if any(name in words[made] for name in gone)}
    marked |= _naming(words, {made.path.name for made in marked}, besides=removed)
    in_order = [sorted(found, key=lambda made: made.id) for found in (removed, marked - removed)]
    return in_order[0], in_order[1]


def _naming(words: Mapping[Artefact, str], names: set[str], besides: set[Artefact]) -> set[Artefact]:
    """Artefacts that name one of `names`, or one that does, and so on."""
    found: set[Artefact] = set()
    while fresh := {m for m in words.keys() - found - besides if any(name in words[m] for name in names)}:
        found |= fresh
        names = {made.path.name for made in fresh}
    return found


def _results(folder: Path) -> Iterator[Artefact]:
    for stage in sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in OURS):
        for path in sorted(p for p in stage.iterdir() if p.is_dir() and not p.name.startswith(".")):
            begun = stage.name in STAGES and any(p.name != store.TOMBSTONE for p in path.iterdir())
            if begun or Artefact(path).done:
                yield Artefact(path)


def _words(made: Artefact) -> str:
    """What an artefact says of how it was made: the small texts at the top of its folder."""
    texts = [p for p in sorted(made.path.iterdir()) if p.suffix in (".json", ".yaml") and p.is_file()]
    return "\n".join(p.read_text(errors="replace") for p in texts if p.stat().st_size <= READ_BYTES)


def _begun(made: Artefact, cohort: str, words: str) -> bool:
    """Work that was never finished and may hold the subject: it names nothing yet, or only its cohort."""
    if made.done or made.path.parent.name == "pretrain":
        return False
    return made.path.parent.name in ("adapt", "report") or cohort in made.path.name or cohort in words


def _empty(made: Artefact) -> None:
    """Remove everything but the tombstone, the manifest first."""
    (made.path / store.MANIFEST).unlink(missing_ok=True)
    for path in sorted(made.path.iterdir()):
        if path.is_dir() and not path.is_symlink():
            place.remove_folder(path)
        elif path.name != store.TOMBSTONE:
            path.unlink()


def _discard(made: Artefact) -> None:
    base = shard.base(made.path)
    if base != str(made.path):
        place.remove_folder(base)
    store.discard(made.path)


# ---- beside the artefacts -------------------------------------------------------------------------------------------


def _private_names(folder: Path, who: _Subject) -> None:
    """Take the subject out of the files that tie keys to ids and paths."""
    for path in sorted(identity.private(folder).glob("names-*.json")):
        names = json.loads(path.read_text())
        keys = {key for subject, key in names["subjects"].items() if subject in who.names} & who.names
        if keys:
            names["subjects"] = {s: k for s, k in names["subjects"].items() if k not in keys}
            names["sessions"] = {k: s for k, s in names["sessions"].items() if k not in keys}
            names["paths"] = {p: s for p, s in names["paths"].items() if s.partition("/")[0] not in keys}
            identity.write_private(path, names)


def _scrub_logs(folder: Path, pattern: re.Pattern[str]) -> int:
    """Replace every line of the logs that names the subject; how many there were."""
    count = 0
    for path in sorted(folder.glob("*.log")) if folder.is_dir() else ():
        lines = path.read_text(errors="surrogateescape").splitlines(keepends=True)
        named = [bool(pattern.search(line)) for line in lines]
        if any(named):
            kept = [
                "(this line named a forgotten subject)\n" if n else line
                for n, line in zip(named, lines, strict=True)
            ]
            store.write_atomic(path, "".join(kept).encode(errors="surrogateescape"))
            count += sum(named)
    return count


def _leftovers(folder: Path) -> None:
    """Remove hidden files at the top of a folder: what a killed process had begun to write."""
    for path in folder.glob(".*.*"):
        if path.is_file():
            path.unlink()


def _tag_runs(machine: Machine, plan: dict[str, Any], done: Forgotten) -> int:
    """Tag MLflow's runs of what was removed or marked, and take the splits out of its artefacts; how many runs."""
    concerned = {*plan["removed"], *plan["marked"]}
    folder = machine.store / "tracked" / fingerprint(machine.tracking)[:8]
    runs: set[str] = set()
    for mark in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        known = json.loads(mark.read_text())
        named = {f"adapt/{name}" for name in known if name != "run"} & concerned
        if mark.stem.removesuffix(".part") in {name.replace("/", "-") for name in concerned}:
            named |= {"run"}
        runs |= {known[name.removeprefix("adapt/")] for name in named}
    if runs:
        try:
            track.forget(machine.tracking, sorted(runs), done.date, ("splits.json",))
        except track.TrackingError as error:
            raise UserError(
                "TRACKING", f"the store is done, but MLflow was not reached ({error}); run the same again", 1
            ) from error
    return len(runs)
