"""Scans -> slice stacks -> Parquet shards, with everything that was rejected and why. [Ray Data]

Each session becomes a part (its row groups, and a record) in `work/`, written by a Ray task; then parts are packed, in
order, into content-named shards, again by tasks. So no pixel passes through the driver or the object store, and an
ingest that was killed goes on where it was: what has a record is not read again. The manifest is committed last.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import cranium
from cranium import cohort, store
from cranium.config import Card, Compute, Ingest, Machine, UserError, fingerprint
from cranium.store import Artefact
from cranium.volume import nifti, normalise, shard, slices
from cranium.volume.quality import Rejected

Progress = Callable[[int, int, str], None]
RECIPE = 1  # raise it when the same scans and settings give other bytes
RECORD = {  # columns of sessions.parquet beside those of the card; a string holds JSON where it has structure
    "cohort": pa.string(),
    "subject": pa.string(),
    "session": pa.string(),
    "present": pa.int64(),  # bit i: channel i
    "num_slices": pa.int32(),
    "slice_first": pa.int32(),
    "native_shape": pa.string(),  # of each channel
    "native_affine": pa.string(),  # of each channel: voxel -> RAS mm
    "stack_affine": pa.string(),  # (row, column, slice, 1) -> RAS mm
    "crop": pa.string(),  # the whole grid's shape [Z, H, W] and the run of slices kept
    "sources": pa.string(),  # of each channel: contrast, path, sha256
    "warnings": pa.string(),
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
QUARANTINE = ("cohort", "subject", "session", "contrast", "path", "code", "reason")


def ingest(
    card: Card, raw: Path, spec: Ingest, machine: Machine, progress: Progress | None = None
) -> Artefact:
    """Make (or find) the shard set of one cohort from the files below `raw`.

    Needs a connected Ray unless the artefact is done. Raises `UserError`. How many scans were accepted and rejected
    stands in the manifest's `counts`.
    """
    _check_spec(card, spec)
    table = cohort.scan(card, raw)
    target = _target(card, spec, table, machine)
    if target.done:
        return target
    with store.lock(machine.store, target.id):
        if not target.done:
            try:
                _make(card, spec, table, target, progress or (lambda done, total, text: None))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                message = f"{target.path} cannot be written ({error.strerror}); free space and run again"
                raise UserError("NO_SPACE", message, 1) from error
    return target


def artefact(card: Card, raw: Path, spec: Ingest, machine: Machine) -> Artefact:
    """Where the shard set of the files below `raw` lies (it need not exist yet)."""
    return _target(card, spec, cohort.scan(card, raw), machine)


def _target(card: Card, spec: Ingest, table: cohort.CohortTable, machine: Machine) -> Artefact:
    return store.artefact(machine.store, "ingest", card.name, _key(card, spec, table))


def _check_spec(card: Card, spec: Ingest) -> None:
    wanted = {_source(spec, channel) for channel in spec.channels}
    if not wanted & set(card.layout.files):
        have, want = ", ".join(card.layout.files), ", ".join(sorted(wanted))
        raise UserError("NO_CONTRAST", f"{card.name} has {have}, none of {want}; set ingest.contrasts")
    if spec.mask == "supplied" and card.layout.mask is None:
        raise UserError(
            "NO_MASK", f"{card.name}: its card has no `layout.mask`; add it, or set ingest.mask=otsu"
        )
    if clash := RECORD.keys() & set(card.participants.columns if card.participants else ()):
        names = ", ".join(sorted(clash))
        raise UserError(
            "CONFIG", f"{card.name}: ingest has columns {names} of its own; rename participants.columns"
        )


def _source(spec: Ingest, channel: str) -> str:
    """The contrast that fills a channel."""
    return {str(k): str(v) for k, v in spec.channel_map.items()}.get(channel, channel)


def _key(card: Card, spec: Ingest, table: cohort.CohortTable) -> dict[str, Any]:
    participants = table.root / card.participants.file if card.participants else None
    shapes = {"name", "layout", "participants", "labels", "groups", "matched", "simulated"}
    return {
        "recipe": RECIPE,
        "card": card.model_dump(mode="json", include=shapes),
        "preprocessing": spec.preprocessing,
        "codec": spec.codec,
        "shard_mb": spec.shard_mb,
        "files": table.files,
        "participants": store.sha256(participants) if participants and participants.is_file() else None,
    }


# ---- one session ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What every task needs to know."""

    cohort: str
    root: Path
    folder: Path  # of the artefact
    spec: Ingest

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def part(self, index: int) -> Path:
        return self.work / f"{index:06}.parquet"

    def record(self, index: int) -> Path:
        return self.work / f"{index:06}.json"


def _ingest_session(row: dict[str, Any], job: _Job) -> dict[str, Any]:
    """One session: read, conform, write its part and its record. Only `Rejected` is an outcome; the rest are bugs."""
    spec, index, session = job.spec, int(row["index"]), json.loads(row["session"])
    slices.limit_threads(spec.compute.threads or max(1, int(spec.compute.cpus_per_worker)))
    wanted = {channel: normalise.Wanted(*scan[1:]) for channel, scan in session["scans"].items()}
    volumes, scans, rejected = normalise.read_scans(job.root, wanted, spec.mask == "supplied")
    record: dict[str, Any] = {"index": index, "scans": len(wanted), "warned": 0, "row_groups": []}
    if scans:
        try:
            conformed = normalise.conform(
                scans,
                spec.channels,
                size=spec.size,
                spacing_mm=spec.spacing_mm,
                slice_spacing_mm=spec.slice_spacing_mm,
                percentiles=spec.percentiles,
                min_brain=spec.min_brain,
            )
        except Rejected as reason:
            rejected |= dict.fromkeys(scans, reason)
        else:
            rejected |= conformed.rejected
            record |= _write_part(job, index, session, conformed, volumes)
    who = [job.cohort, session["subject"], session["session"]]
    record["rejected"] = [
        [*who, *session["scans"][channel][:2], why.code, why.reason] for channel, why in rejected.items()
    ]
    store.write_atomic(job.record(index), json.dumps(record))
    return {"index": index}


def _write_part(
    job: _Job,
    index: int,
    session: dict[str, Any],
    conformed: normalise.Conformed,
    volumes: dict[str, nifti.Volume],
) -> dict[str, Any]:
    """Write the row groups of a session; what its record says of them."""
    spec, run = job.spec, conformed.slices
    used = {channel: volumes[channel] for channel in spec.channels if channel in conformed.notes}
    present = sum(1 << i for i, channel in enumerate(spec.channels) if channel in used)
    if spec.stack == "contrasts":
        stacks = slices.to_stacks(conformed.volumes, run)
    else:
        stacks = slices.to_neighbours(conformed.volumes[0], run, spec.neighbours)
    names = {"cohort": job.cohort, "subject": session["subject"], "session": session["session"]}
    tables = [
        shard.encode(
            stacks[start : start + shard.MAX_ROWS],
            channels=spec.channels,
            slices=run[start : start + shard.MAX_ROWS],
            num_slices=len(run),
            present=present,
            **names,
        )
        for start in range(0, len(stacks), shard.MAX_ROWS)
    ]
    _publish(job.part(index), lambda path: shard.write(path, tables, spec.codec))
    warnings = [(channel, note) for channel, notes in conformed.notes.items() for note in notes]
    sources = {}
    for channel, volume in used.items():
        contrast, path = session["scans"][channel][:2]
        sources[channel] = {"contrast": contrast, "path": path, "sha256": volume.sha256}
    columns = {
        **session["values"],
        **names,
        "present": present,
        "num_slices": len(run),
        "slice_first": run.start,
        "native_shape": json.dumps({channel: volume.data.shape for channel, volume in used.items()}),
        "native_affine": json.dumps({c: volume.affine.round(6).tolist() for c, volume in used.items()}),
        "stack_affine": json.dumps(conformed.grid.affine.round(6).tolist()),
        "crop": json.dumps({"shape": conformed.grid.shape, "slices": [run.start, run.stop]}),
        "sources": json.dumps(sources),
        "warnings": json.dumps([{"contrast": c, "code": n.code, "reason": n.reason} for c, n in warnings]),
    }
    return {
        "row_groups": [table.num_rows for table in tables],
        "bytes": job.part(index).stat().st_size,
        "warned": len({channel for channel, _ in warnings}),
        "session": columns,
    }


def _publish(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside, flush to disk, rename: the file is there whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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


def _pack(row: dict[str, Any], job: _Job) -> dict[str, Any]:
    """Parts of a run of sessions -> one shard named by its content; its entry for the manifest."""
    members = json.loads(row["members"])
    groups: list[dict[str, Any]] = []

    def tables() -> Iterator[pa.Table]:
        for record in members:
            first = record["session"]["slice_first"]
            for index, rows in enumerate(record["row_groups"]):
                where = job.part(record["index"])
                table = shard.read_row_group(where, index)
                shard.check_rows(table, str(where))
                names = {name: record["session"][name] for name in ("subject", "session")}
                groups.append({**names, "rows": rows, "first_slice": first})
                first += rows
                yield table

    folder = job.folder / "shards"
    beside = folder / f".packing-{row['index']}"
    _publish(beside, lambda path: shard.write(path, tables(), job.spec.codec))
    digest = store.sha256(beside)
    final = folder / f"{digest[:16]}.parquet"
    os.replace(beside, final)
    entry = {
        "file": f"shards/{final.name}",
        "sha256": digest,
        "bytes": final.stat().st_size,
        "rows": sum(group["rows"] for group in groups),
        "row_groups": groups,
    }
    store.write_atomic(job.work / f"shard-{row['index']:05}.json", json.dumps(entry))
    for record in members:  # only now that the shard is on disk
        job.part(record["index"]).unlink(missing_ok=True)
    return {"index": row["index"]}


def _make(card: Card, spec: Ingest, table: cohort.CohortTable, target: Artefact, progress: Progress) -> None:
    job = _Job(card.name, table.root, target.path, spec)
    for folder in (job.work, target.path / "shards"):
        folder.mkdir(parents=True, exist_ok=True)
    sessions = [wanted for session in table.sessions if (wanted := _wanted(session, spec))["scans"]]
    todo = [
        {"index": i, "session": json.dumps(wanted)}
        for i, wanted in enumerate(sessions)
        if not job.record(i).is_file()
    ]
    for done, _ in enumerate(_on_ray(todo, _ingest_session, job), len(sessions) - len(todo) + 1):
        progress(done, len(sessions), f"{card.name}: sessions read")
    records = [json.loads(job.record(i).read_text()) for i in range(len(sessions))]
    bins = _bins([record for record in records if record["row_groups"]], spec.shard_mb << 20)
    entry_paths = [job.work / f"shard-{i:05}.json" for i in range(len(bins))]
    todo = [
        {"index": i, "members": json.dumps(members)}
        for i, members in enumerate(bins)
        if not entry_paths[i].is_file()
    ]
    for done, _ in enumerate(_on_ray(todo, _pack, job), len(bins) - len(todo) + 1):
        progress(done, len(bins), f"{card.name}: shards written")
    shards = [json.loads(path.read_text()) for path in entry_paths]
    _finish(card, spec, table, target, records, shards)


def _wanted(session: cohort.Session, spec: Ingest) -> dict[str, Any]:
    """What a task must know of a session: channel -> contrast, path, mask and note of the scan that fills it."""
    found = {channel: session.scans.get(_source(spec, channel)) for channel in spec.channels}
    scans = {channel: (s.contrast, s.path, s.mask, s.note) for channel, s in found.items() if s}
    names = {"subject": session.subject, "session": session.session}
    return {**names, "scans": scans, "values": dict(session.values)}


def _on_ray(
    items: list[dict[str, Any]], work: Callable[..., dict[str, Any]], job: _Job
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
        if row["errno"]:
            raise OSError(row["errno"], os.strerror(row["errno"]))
        yield row


def _guarded(row: dict[str, Any], work: Callable[..., dict[str, Any]], job: _Job) -> dict[str, Any]:
    """A disk that takes no more is told as a value: Ray Data turns an exception into text, and its kind is lost."""
    try:
        return {**work(row, job), "errno": 0}
    except OSError as error:
        if error.errno not in FULL:
            raise
        return {"index": row["index"], "errno": error.errno}


# ---- the end of it --------------------------------------------------------------------------------------------------


def _finish(
    card: Card,
    spec: Ingest,
    table: cohort.CohortTable,
    target: Artefact,
    records: list[dict[str, Any]],
    shards: list[dict[str, Any]],
) -> None:
    """Write the tables, check that everything adds up, commit the manifest, remove what was in the way."""
    channels = {_source(spec, channel) for channel in spec.channels}
    refused = [
        [card.name, r.subject, r.session, r.contrast, r.path, r.code, r.reason]
        for r in table.refused
        if r.contrast in channels
    ]
    rejected = sorted([row for record in records for row in record["rejected"]] + refused)
    sessions = [record["session"] for record in records if record["row_groups"]]
    scans = sum(record["scans"] for record in records) + len(refused)
    warned = sum(record["warned"] for record in records)
    counts = {
        "scans": scans,
        "accepted": scans - warned - len(rejected),
        "warned": warned,
        "rejected": len(rejected),
        "sessions": len(sessions),
        "subjects": len({session["subject"] for session in sessions}),
        "stacks": sum(entry["rows"] for entry in shards),
    }
    codes = dict(Counter(row[5] for row in rejected))
    if not sessions:
        raise UserError(
            "NOTHING_LEFT", f"{card.name}: every scan was rejected ({codes}), e.g. {rejected[0][4:]}", 3
        )
    _agree(target, records, shards, counts, sum(bin(s["present"]).count("1") for s in sessions))
    _publish(
        target.path / "sessions.parquet", lambda path: pq.write_table(_sessions_table(card, sessions), path)
    )
    columns = {name: pa.array([row[i] for row in rejected], pa.string()) for i, name in enumerate(QUARANTINE)}
    _publish(target.path / "quarantine.parquet", lambda path: pq.write_table(pa.table(columns), path))
    listed = {Path(entry["file"]).name for entry in shards}
    for stray in (target.path / "shards").iterdir():  # of an attempt that was killed
        if stray.name not in listed:
            stray.unlink()
    manifest = {
        "stage": "ingest",
        "cohort": card.name,
        "card": card.model_dump(mode="json"),
        "preprocessing": spec.preprocessing.model_dump(mode="json"),
        "preprocessing_hash": fingerprint(spec.preprocessing),
        "channels": list(spec.channels),
        "shape": list(spec.shape),
        "dtype": "uint8",
        "codec": spec.codec,
        "counts": counts,
        "missing": {c: sum(not s["present"] >> i & 1 for s in sessions) for i, c in enumerate(spec.channels)},
        "shards": shards,
        "rejections": codes,
        "notes": list(table.notes),
        "code_version": cranium.__version__,
        "recipe": RECIPE,
        "simulated": card.simulated,
    }
    store.commit(target.path, manifest)
    shutil.rmtree(target.path / "work")


def _agree(
    target: Artefact,
    records: list[dict[str, Any]],
    shards: list[dict[str, Any]],
    counts: dict[str, int],
    channels: int,
) -> None:
    """Rows read back from the shards are the rows that sessions made; every scan has one outcome. Else a bug."""
    made = [rows for record in records for rows in record["row_groups"]]
    stored = [rows for entry in shards for rows in shard.read_footer(target.path / entry["file"]).row_groups]
    if made != stored or counts["stacks"] != sum(made):
        raise RuntimeError(f"{target.id}: sessions made row groups {made}, the shards hold {stored}")
    if counts["accepted"] < 0 or counts["accepted"] + counts["warned"] != channels:
        raise RuntimeError(
            f"{target.id}: the counts do not add up: {counts}, {channels} channels are present"
        )


def _sessions_table(card: Card, sessions: list[dict[str, Any]]) -> pa.Table:
    columns = card.participants.columns if card.participants else ()
    layout = RECORD | {name: pa.float64() if name in cohort.FLOATS else pa.string() for name in columns}
    return pa.Table.from_pylist(sessions, schema=pa.schema(list(layout.items())))


# ---- trust ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    code: str  # SHARD_MISSING | SHARD_CORRUPT | SHARD_SCHEMA | SHARD_HASH | SHARD_UNKNOWN
    file: str
    message: str


def verify(artefact: Artefact, full: bool = True) -> list[Problem]:
    """Compare the shards with the manifest: presence, size, footer; stray files; with `full` also SHA-256."""
    manifest = artefact.manifest()
    problems = [p for entry in manifest["shards"] if (p := _problem(artefact, manifest, entry, full))]
    listed = {Path(entry["file"]).name for entry in manifest["shards"]}
    folder = artefact.path / "shards"
    strays = (
        sorted(p.name for p in folder.glob("*.parquet") if p.name not in listed) if folder.is_dir() else []
    )
    unknown = [
        Problem("SHARD_UNKNOWN", f"shards/{name}", "is in no manifest, so it is never read")
        for name in strays
    ]
    return problems + unknown


def check(artefact: Artefact) -> None:
    """The cheap check before a step is made: presence, size, footer. Raises `UserError` naming the first problem."""
    if problems := [p for p in verify(artefact, full=False) if p.code != "SHARD_UNKNOWN"]:
        first, more = problems[0], f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        remedy = f"restore it, or remove {artefact.path} and ingest again"
        raise UserError(first.code, f"{artefact.id}/{first.file} {first.message}{more}; {remedy}")


def _problem(
    artefact: Artefact, manifest: dict[str, Any], entry: dict[str, Any], full: bool
) -> Problem | None:
    path = artefact.path / entry["file"]
    try:
        footer = shard.read_footer(path)
    except shard.ShardError as error:
        return Problem(
            error.code, entry["file"], "is missing" if error.code == "SHARD_MISSING" else str(error)
        )
    if path.stat().st_size != entry["bytes"]:
        return Problem(
            "SHARD_CORRUPT", entry["file"], f"has {path.stat().st_size} bytes, not {entry['bytes']}"
        )
    rows = tuple(group["rows"] for group in entry["row_groups"])
    expected = shard.Footer(rows, tuple(manifest["shape"]), tuple(manifest["channels"]))
    if footer != expected:
        return Problem(
            "SHARD_CORRUPT", entry["file"], "has other row groups, shape or channels than the manifest says"
        )
    if full and store.sha256(path) != entry["sha256"]:
        return Problem("SHARD_HASH", entry["file"], "has other bytes than the manifest says")
    return None
