"""Scans -> slice stacks -> Parquet shards, with everything that was rejected and why. [Ray Data]

Each session becomes a part (its row groups, and a record) in `work/`, written by a Ray task; then parts are packed, in
order, into content-named shards, again by tasks. So no pixel passes through the driver or the object store, and an
ingest that was killed goes on where it was: what has a record is not read again. Sessions that an earlier version of
the set has, from the same files, are taken from its shards. The manifest is committed last.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cranium import (
    cohort,
    config,
    conform,
    identity,
    naming,
    place,
    provisions,
    series,
    shardset,
    sources,
    store,
    versions,
)
from cranium.cards import Card
from cranium.config import Compute, Ingest, Machine, UserError
from cranium.place import Where, at
from cranium.provisions import Provisions
from cranium.store import Artefact
from cranium.volume import shard
from cranium.volume.quality import ASIDE

Progress = Callable[[int, int, str], None]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
# Of a card: what is said of sessions, not of pixels.
OF_SESSIONS = ("labels", "groups", "matched", "simulated")


def ingest(
    card: Card, raw: Path, spec: Ingest, machine: Machine, progress: Progress | None = None
) -> Artefact:
    """Make (or find) the shard set of one cohort from the files below `raw`.

    Needs a connected Ray unless the artefact is done. Raises `UserError`. How many scans were accepted and rejected
    stands in the manifest's `counts`.
    """
    _check_spec(card, spec)
    table = _scan(card, raw, machine, progress)
    target = _target(card, spec, table, machine)
    base = _base(target, machine)
    if target.done and not (target.path / "work").is_dir():
        return target
    try:
        with store.lock(machine.store, target.id), place.reachable(base):
            if target.done:
                shardset.tidy(target, base)  # the last one was killed between its manifest and its end
            else:
                ways = _mask_ways(card, spec, table)
                needs = provisions.provide(spec, ways, machine, target.path / "work" / "provisions")
                _begin(target, base)
                tell = progress or (lambda done, total, text: None)
                _make(card, spec, table, target, base, machine, needs, tell)
    except UserError:
        raise
    except OSError as error:
        if error.errno not in FULL + REFUSED:
            raise
        code, mend = (
            ("NO_SPACE", "free space") if error.errno in FULL else ("NOT_WRITABLE", "make it writable")
        )
        message = f"{base} cannot be written ({os.strerror(error.errno)}); {mend} and run again"
        raise UserError(code, message, 1) from error
    except Exception as error:
        if not place.is_remote(base) or place.absent(at(base, store.MANIFEST)):
            raise
        message = f"{base} was finished by another process meanwhile; run again to use what it made"
        raise UserError("BUSY", message) from error
    return target


def _mask_ways(card: Card, spec: Ingest, table: cohort.CohortTable) -> tuple[str, ...]:
    wanted = [
        [s.scans.get(conform.source(spec, channel)) for channel in spec.channels] for s in table.sessions
    ]
    supplied = [any(scan.mask for scan in scans if scan) for scans in wanted if any(scans)]
    return provisions.mask_ways(spec.mask, stripped=card.stripped, all_supplied=all(supplied))


def artefact(card: Card, raw: Path, spec: Ingest, machine: Machine) -> Artefact:
    """Where the shard set of the files below `raw` lies (it need not exist yet)."""
    return _target(card, spec, _scan(card, raw, machine), machine)


def label_files(card: Card, raw: Path, spec: Ingest, machine: Machine) -> dict[tuple[str, str], str]:
    """(subject, session), as the shard set names them, -> path of the label map below `raw`."""
    table = _scan(card, raw, machine)
    salt = identity.salt(machine.store) if spec.identifiers == "salted" else None
    shown = naming.shown(table, naming.Names(card.name, salt))
    return {shown[s.subject, s.session]: s.segmentation for s in table.sessions if s.segmentation}


def _scan(card: Card, raw: Path, machine: Machine, progress: Progress | None = None) -> cohort.CohortTable:
    return cohort.scan(card, raw, machine.raw.get(f"{card.name}_tables"), progress)


def _target(card: Card, spec: Ingest, table: cohort.CohortTable, machine: Machine) -> Artefact:
    """By names and sizes of the files; where one was replaced by another of its size, by the content of its session."""
    key = _key(card, spec, table)
    target = _fetched(card, key, machine)
    if not target.done:
        return target
    salt = identity.salt(machine.store) if spec.identifiers == "salted" else None
    who = naming.shown(table, naming.Names(card.name, salt))
    now = []
    for one in _wanted(table, spec):
        subject, session = who[one.subject, one.session]
        now.append(replace(one, subject=subject, session=session))
    others = versions.replaced(target, now)
    return _fetched(card, key | {"replaced": others}, machine) if others else target


def _fetched(card: Card, key: dict[str, Any], machine: Machine) -> Artefact:
    target = store.artefact(machine.store, "ingest", card.name, key)
    with place.reachable(_base(target, machine)):
        shardset.fetch(target, _base(target, machine))
    return target


def _wanted(table: cohort.CohortTable, spec: Ingest) -> list[sources.Session]:
    """The sessions that have a scan of a contrast that is asked for."""
    sizes, listing = series.sizes(table.files), sources.Listing(table)
    found = []
    for s in table.sessions:
        wanted = conform.wanted(s, spec, sizes)
        if wanted["scans"]:
            look = listing.look(wanted)
            found.append(sources.Session(s.subject, s.session, table.root, wanted, look, dict(s.values)))
    return found


def _base(target: Artefact, machine: Machine) -> Where:
    """The folder the shards are written to."""
    return at(machine.shards, "ingest", target.path.name) if machine.shards else target.path


def _begin(target: Artefact, base: Where) -> None:
    """Where shards go elsewhere, say so in the store first: whoever tidies up or forgets finds what lies there."""
    if str(base) != str(target.path):
        (target.path / "work").mkdir(parents=True, exist_ok=True)
        place.write(target.path / shard.PLACE, f"{base}\n")


def _check_spec(card: Card, spec: Ingest) -> None:
    wanted = {conform.source(spec, channel) for channel in spec.channels}
    if not wanted & set(card.contrasts):
        have, want = ", ".join(card.contrasts), ", ".join(sorted(wanted))
        raise UserError("NO_CONTRAST", f"{card.name} has {have}, none of {want}; set ingest.contrasts")
    if spec.mask == ("supplied",) and not any(layout.mask for layout in card.layouts):
        raise UserError(
            "NO_MASK",
            f"{card.name}: its card has no `mask` in `layouts`; add it, or set ingest.mask=[deepbet,otsu]",
        )
    if clash := shardset.RECORD.keys() & set(card.columns):
        names = ", ".join(sorted(clash))
        raise UserError(
            "CONFIG", f"{card.name}: ingest has columns {names} of its own; rename tables[].columns"
        )


def _key(card: Card, spec: Ingest, table: cohort.CohortTable) -> dict[str, Any]:
    return {
        "recipe": shardset.RECIPE,
        "card": card.facts("name", "layouts", "segmentation", "stripped", "tables", *OF_SESSIONS),
        "preprocessing": spec.preprocessing,
        "codec": spec.codec,
        "shard_mb": spec.shard_mb,
        "identifiers": spec.identifiers,
        "phi": spec.phi,
        "files": table.files,
        "tables": [store.sha256(path) for path in table.tables],
        "overlaps": sorted(
            overlap.cohort for overlap in card.overlaps
        ),  # the gate reads them in the manifest
        **({"overlap_ids": table.overlap_ids} if table.overlap_ids else {}),
    }


# ---- shards ---------------------------------------------------------------------------------------------------------


def _bins(records: Sequence[dict[str, Any]], limit: int) -> list[list[dict[str, Any]]]:
    """Runs of sessions whose parts fill a shard of about `limit` bytes, in order."""
    bins: list[list[dict[str, Any]]] = []
    filled = limit
    for record in records:
        if filled + record["bytes"] / 2 >= limit:
            bins.append([])
            filled = 0
        bins[-1].append(record)
        filled += record["bytes"]
    return bins


def _pack(row: dict[str, Any], job: conform.Job) -> dict[str, Any]:
    """Row groups of a run of sessions -> one shard; its entry for the manifest."""
    members = json.loads(row["members"])
    sources: list[tuple[Where, int]] = []
    groups: list[dict[str, Any]] = []
    for record in members:
        if "at" in record:
            sources += [(at(job.folder, file), index) for file, index in record["at"]]
        else:
            sources += [(job.part(record["index"]), index) for index in range(len(record["row_groups"]))]
        first, names = record["session"]["slice_first"], ("subject", "session")
        step = json.loads(record["session"]["crop"])["slices"][2]
        for rows in record["row_groups"]:
            groups.append(
                {name: record["session"][name] for name in names} | {"rows": rows, "first_slice": first}
            )
            first += rows * step
    entry = shardset.pack(job.folder, sources, groups, job.spec.codec)
    place.write(at(job.work, f"shard-{row['index']:05}.json"), json.dumps(entry))
    if not place.is_remote(job.folder):  # where no lock keeps a second writer out, it may still need them
        place.remove([job.part(record["index"]) for record in members])  # only now that the shard is on disk
    return {"index": row["index"], "stacks": entry["rows"]}


def _make(
    card: Card,
    spec: Ingest,
    table: cohort.CohortTable,
    target: Artefact,
    base: Where,
    machine: Machine,
    needs: Provisions,
    progress: Progress,
) -> None:
    salted = spec.identifiers == "salted"
    table, called = naming.admit(table, card.name, salted, machine.store, target.path.name)
    job = conform.Job(card.name, table.root, base, spec, dict(card.segmentation), needs)
    for folder in (job.work, at(base, "shards")):
        if not place.is_remote(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
    sessions = _wanted(table, spec)
    pixels = _pixels(card, spec, needs.ways)
    earlier = store.find(machine.store, "ingest", card.name)
    have = _of_these(job, sessions)
    kept = versions.keep(base, earlier, pixels, sessions, spec.shard_mb << 20)
    todo = [
        {"index": i, "session": json.dumps(one.wanted)}
        for i, one in enumerate(sessions)
        if i not in kept.records and f"{i:06}.json" not in have
    ]
    _work(todo, conform.session, job, len(sessions), progress, f"{card.name}: sessions read")
    fresh = [i for i in range(len(sessions)) if i not in kept.records]
    read = map(json.loads, place.read_all([job.record(i) for i in fresh]))
    by_index = kept.records | dict(zip(fresh, read, strict=True))
    records = naming.cover([by_index[i] for i in range(len(sessions))], sessions, called)
    records = identity.without_copies(records)
    shards = sorted([*kept.shards, *_packed(job, records, have, progress)], key=_first)
    done = [_done(one, record) for one, record in zip(sessions, records, strict=True)]
    version: dict[str, Any] = {"pixels": pixels, "forgotten": list(called.forgotten)}
    if kept.source:
        version["reused"] = {"from": kept.source, "sessions": len(kept.records), "shards": len(kept.shards)}
    channels = {conform.source(spec, channel) for channel in spec.channels}
    refused = tuple(
        r for r in table.refused if r.contrast in channels or (not r.contrast and r.code not in ASIDE)
    )
    version["identifiers"] = spec.identifiers
    version["overlap_ids"] = table.overlap_ids  # other cohort -> our subject -> theirs, where one is mapped
    shardset.commit(target, base, card, spec, done, shards, refused, table.notes, version)


def _of_these(job: conform.Job, sessions: Sequence[sources.Session]) -> Collection[str]:
    """What an earlier attempt left in `work`; nothing, and it is removed, where that began with other files."""
    have, mark = place.names(job.work), config.fingerprint([one.look for one in sessions])
    path = at(job.work, "sources")
    if "sources" in have and place.read(path).decode() != mark:
        place.remove([at(job.work, name) for name in have])
        have = {}
    place.write(path, mark)
    return have


def _done(one: sources.Session, record: dict[str, Any]) -> shardset.Done:
    told = [*record["rejected"], *filter(None, [record["label_map_rejected"]])]
    look = "" if any(row[5] == "IO" for row in told) else one.look
    of = {key: value for key, value in record.items() if key not in OURS}
    return shardset.Done(one.subject, one.session, look, record["content"], of)


def _packed(
    job: conform.Job, records: Sequence[dict[str, Any]], have: Collection[str], progress: Progress
) -> list[dict[str, Any]]:
    """Shards of the sessions that no earlier version has: their entries for the manifest."""
    fresh = [r for r in records if r["row_groups"] and "kept" not in r]
    bins = _bins(fresh, job.spec.shard_mb << 20)
    names = [f"shard-{i:05}.json" for i in range(len(bins))]
    todo = [
        {"index": i, "members": json.dumps(members)} for i, members in enumerate(bins) if names[i] not in have
    ]
    _work(todo, _pack, job, len(bins), progress, f"{job.cohort}: shards written")
    return list(map(json.loads, place.read_all([at(job.work, name) for name in names])))


def _first(entry: dict[str, Any]) -> tuple[str, str]:
    """The subject and session a shard begins with: shards are listed in this order."""
    group = entry["row_groups"][0]
    return group["subject"], group["session"]


OURS = ("index", "at", "kept", "content")  # of a record, while work goes on


def _pixels(card: Card, spec: Ingest, ways: tuple[str, ...]) -> str:
    """Fingerprint of what shapes rows beside the files: versions that share it can share shards."""
    facts = card.facts("name", "layouts", "segmentation", "stripped")
    settings = [spec.preprocessing, spec.codec, spec.shard_mb, spec.phi]
    return config.fingerprint([shardset.RECIPE, facts, ways, *settings])


def _work(
    todo: list[dict[str, Any]],
    work: Callable[..., dict[str, Any]],
    job: conform.Job,
    total: int,
    progress: Progress,
    text: str,
) -> None:
    """Do what is left of `total`, telling how far it is and how fast it goes."""
    begun, stacks = time.monotonic(), 0
    for done, row in enumerate(_on_ray(todo, work, job), total - len(todo) + 1):
        stacks += row["stacks"]
        progress(done, total, f"{text}, {stacks / max(1e-3, time.monotonic() - begun):,.0f} stacks/s")


def _on_ray(
    items: list[dict[str, Any]], work: Callable[..., dict[str, Any]], job: conform.Job
) -> Iterator[dict[str, Any]]:
    """`work(item, job)` for every item as Ray Data tasks, each result as soon as its block is done."""
    if not items:
        return
    import ray.data

    compute: Compute = job.spec.compute
    blocks = min(len(items), max(200, 8 * compute.num_workers))  # many, to report progress and share the load
    tasks = ray.data.TaskPoolStrategy(min(compute.num_workers, blocks))
    dataset = ray.data.from_items(items, override_num_blocks=blocks)
    done = dataset.map(_guarded, fn_args=(work, job), num_cpus=compute.cpus_per_worker, compute=tasks)
    for row in done.iter_rows():
        _raise(row)
        yield row


def _guarded(row: dict[str, Any], work: Callable[..., dict[str, Any]], job: conform.Job) -> dict[str, Any]:
    """What the user can mend is told as a value: Ray Data turns an exception into text, and its kind is lost."""
    nothing = {"index": row["index"], "stacks": 0, "errno": 0, "refused": ""}
    try:
        return nothing | work(row, job)
    except UserError as error:
        return nothing | {"refused": json.dumps([error.code, str(error), error.exit_code])}
    except OSError as error:
        if error.errno not in FULL + REFUSED:
            raise
        return nothing | {"errno": error.errno}


def _raise(row: dict[str, Any]) -> None:
    """Raise what a task told."""
    if row["refused"]:
        raise UserError(*json.loads(row["refused"]))
    if row["errno"]:
        raise OSError(row["errno"], os.strerror(row["errno"]))
