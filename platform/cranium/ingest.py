"""Scans -> slice stacks -> Parquet shards, with everything that was rejected and why. [Ray Data]

Each session becomes a part (its row groups, and a record) in `work/`, written by a Ray task; then parts are packed, in
order, into content-named shards, again by tasks. So no pixel passes through the driver or the object store, and an
ingest that was killed goes on where it was: what has a record is not read again. The manifest is committed last.
"""

from __future__ import annotations

import base64
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from cranium import cohort, provisions, shardset, store
from cranium.cards import Card
from cranium.config import Compute, Ingest, Machine, UserError
from cranium.provisions import Provisions
from cranium.store import Artefact
from cranium.volume import fingerprint, labels, measure, nifti, normalise, shard, slices
from cranium.volume.quality import ASIDE, Rejected

Progress = Callable[[int, int, str], None]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


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
    if target.done:
        return target
    with store.lock(machine.store, target.id):
        if not target.done:
            try:
                needs = provisions.provide(spec, machine, target.path / "work" / "provisions")
                _make(card, spec, table, target, needs, progress or (lambda done, total, text: None))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                message = f"{target.path} cannot be written ({error.strerror}); free space and run again"
                raise UserError("NO_SPACE", message, 1) from error
    return target


def artefact(card: Card, raw: Path, spec: Ingest, machine: Machine) -> Artefact:
    """Where the shard set of the files below `raw` lies (it need not exist yet)."""
    return _target(card, spec, _scan(card, raw, machine), machine)


def _scan(card: Card, raw: Path, machine: Machine, progress: Progress | None = None) -> cohort.CohortTable:
    return cohort.scan(card, raw, machine.raw.get(f"{card.name}_tables"), progress)


def _target(card: Card, spec: Ingest, table: cohort.CohortTable, machine: Machine) -> Artefact:
    return store.artefact(machine.store, "ingest", card.name, _key(card, spec, table))


def _check_spec(card: Card, spec: Ingest) -> None:
    wanted = {_source(spec, channel) for channel in spec.channels}
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


def _source(spec: Ingest, channel: str) -> str:
    """The contrast that fills a channel."""
    return {str(k): str(v) for k, v in spec.channel_map.items()}.get(channel, channel)


def _key(card: Card, spec: Ingest, table: cohort.CohortTable) -> dict[str, Any]:
    shapes = {"name", "layouts", "segmentation", "tables", "labels", "groups", "matched", "simulated"}
    return {
        "recipe": shardset.RECIPE,
        "card": card.model_dump(mode="json", include=shapes),
        "preprocessing": spec.preprocessing,
        "codec": spec.codec,
        "shard_mb": spec.shard_mb,
        "files": table.files,
        "tables": [store.sha256(path) for path in table.tables],
        **({"overlap_ids": table.overlap_ids} if table.overlap_ids else {}),
    }


# ---- one session ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What every task needs to know."""

    cohort: str
    root: Path
    folder: Path  # of the artefact
    spec: Ingest
    classes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of a label map, and their raw values
    provisions: Provisions = field(default_factory=Provisions)

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
    ways = provisions.ways(spec.mask, job.provisions)
    volumes, scans, rejected = normalise.read_scans(job.root, wanted, ways, spec.orientation)
    record: dict[str, Any] = {"index": index, "scans": len(wanted), "warned": 0, "row_groups": []}
    record |= {"label_map": "unused" if session["segmentation"] else None, "label_map_rejected": None}
    who = [job.cohort, session["subject"], session["session"]]
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
                slices=slices.Kept(**spec.slices.model_dump()),
                align=spec.align,
                template=provisions.template(job.provisions),
                bias_correction=spec.bias_correction,
                dtype=spec.dtype,
            )
        except Rejected as reason:
            rejected |= {channel: reason for channel in scans}
        else:
            rejected |= conformed.rejected
            label_map = None
            if path := session["segmentation"]:
                label_map, why = _label_map(job, path, scans, conformed)
                record["label_map"] = "rejected" if why else "accepted"
                record["label_map_rejected"] = (
                    [*who, "segmentation", path, why.code, why.reason] if why else None
                )
            record |= _write_part(job, index, session, conformed, volumes, label_map)
    record["rejected"] = [
        [*who, *session["scans"][channel][:2], why.code, why.reason] for channel, why in rejected.items()
    ]
    store.write_atomic(job.record(index), json.dumps(record))
    return {"index": index}


def _label_map(
    job: _Job, path: str, scans: dict[str, normalise.Masked], conformed: normalise.Conformed
) -> tuple[labels.LabelMap | None, Rejected | None]:
    """The label map of a session on its grid, or why there is none: then its scans serve without labels."""
    try:
        found = nifti.read(job.root / path, root=job.root, orientation=job.spec.orientation, labels=True)
        return (
            labels.place(
                found,
                list(job.classes.values()),
                scans,
                conformed.transforms,
                conformed.grid,
                conformed.brain,
                conformed.slices,
            ),
            None,
        )
    except Rejected as reason:
        return None, reason


def _write_part(
    job: _Job,
    index: int,
    session: dict[str, Any],
    conformed: normalise.Conformed,
    volumes: dict[str, nifti.Volume],
    label_map: labels.LabelMap | None,
) -> dict[str, Any]:
    """Write the row groups of a session; what its record says of them."""
    spec, run = job.spec, conformed.slices
    used = {channel: volumes[channel] for channel in spec.channels if channel in conformed.notes}
    present = sum(1 << i for i, channel in enumerate(spec.channels) if channel in used)
    names = {"cohort": job.cohort, "subject": session["subject"], "session": session["session"]}
    stacks = _stacks(spec, conformed.volumes, run)
    drawn = None if label_map is None else _stacks(spec, label_map.classes[None], run)[:, 0]
    tables = [
        shard.encode(
            stacks[start : start + shard.MAX_ROWS],
            channels=spec.channels,
            slices=run[start : start + shard.MAX_ROWS],
            num_slices=len(run),
            present=present,
            masks=None if drawn is None else drawn[start : start + shard.MAX_ROWS],
            **names,
        )
        for start in range(0, len(stacks), shard.MAX_ROWS)
    ]
    shardset.publish(job.part(index), lambda path: shard.write(path, tables, spec.codec))
    warnings = [(channel, note) for channel, notes in conformed.notes.items() for note in notes]
    warned = len({channel for channel, _ in warnings})
    warnings += [("segmentation", note) for note in (label_map.notes if label_map else ())]
    sources = {}
    for channel, volume in used.items():
        contrast, path = session["scans"][channel][:2]
        sources[channel] = {"contrast": contrast, "path": path, "sha256": volume.sha256}
    ml = None if label_map is None else json.dumps(dict(zip(job.classes, label_map.ml, strict=True)))
    looks = (conformed.volumes, conformed.brain, conformed.grid.affine)
    native = {c: (volume.data, conformed.transforms[c] @ volume.affine) for c, volume in used.items()}
    columns = {
        **session["values"],
        **names,
        "present": present,
        "num_slices": len(run),
        "slice_first": run.start,
        "native_shape": json.dumps({channel: volume.data.shape for channel, volume in used.items()}),
        "native_affine": json.dumps({c: volume.affine.round(6).tolist() for c, volume in used.items()}),
        "stack_affine": json.dumps(conformed.grid.affine.round(6).tolist()),
        "crop": json.dumps({"shape": conformed.grid.shape, "slices": [run.start, run.stop, run.step]}),
        "transforms": json.dumps({c: matrix.tolist() for c, matrix in conformed.transforms.items()}),
        "mask_quality": json.dumps(dict(conformed.quality)),
        "label_ml": ml,
        "sources": json.dumps(sources),
        "warnings": json.dumps([{"contrast": c, "code": n.code, "reason": n.reason} for c, n in warnings]),
        "measures": json.dumps(measure.measures(native, spec.channels, *looks)),
        "fingerprint": base64.b64encode(fingerprint.fingerprint(*looks)).decode(),
    }
    return {
        "row_groups": [table.num_rows for table in tables],
        "bytes": job.part(index).stat().st_size,
        "warned": warned,
        "session": columns,
    }


def _stacks(spec: Ingest, volumes: NDArray[Any], run: range) -> NDArray[Any]:
    """Volumes [C, Z, H, W] on the grid -> stacks [n, C, S, H, W] of the slices kept."""
    if spec.stack == "contrasts":
        return slices.to_stacks(volumes, run)
    return slices.to_neighbours(volumes[0], run, spec.neighbours)


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
            first, step = record["session"]["slice_first"], json.loads(record["session"]["crop"])["slices"][2]
            for index, rows in enumerate(record["row_groups"]):
                where = job.part(record["index"])
                table = shard.read_row_group(where, index)
                shard.check_rows(table, str(where))
                names = {name: record["session"][name] for name in ("subject", "session")}
                groups.append({**names, "rows": rows, "first_slice": first})
                first += rows * step
                yield table

    folder = job.folder / "shards"
    beside = folder / f".packing-{row['index']}"
    shardset.publish(beside, lambda path: shard.write(path, tables(), job.spec.codec))
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


def _make(
    card: Card,
    spec: Ingest,
    table: cohort.CohortTable,
    target: Artefact,
    needs: Provisions,
    progress: Progress,
) -> None:
    job = _Job(card.name, table.root, target.path, spec, dict(card.segmentation), needs)
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
    channels = {_source(spec, channel) for channel in spec.channels}
    refused = tuple(
        r for r in table.refused if r.contrast in channels or (not r.contrast and r.code not in ASIDE)
    )
    shardset.commit(target, card, spec, records, shards, refused, table.notes, table.overlap_ids)


def _wanted(session: cohort.Session, spec: Ingest) -> dict[str, Any]:
    """What a task must know of a session: channel -> contrast, path, mask and note of the scan that fills it."""
    found = {channel: session.scans.get(_source(spec, channel)) for channel in spec.channels}
    scans = {channel: (s.contrast, s.path, s.mask, s.note) for channel, s in found.items() if s}
    names = {"subject": session.subject, "session": session.session}
    return {**names, "scans": scans, "values": dict(session.values), "segmentation": session.segmentation}


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
