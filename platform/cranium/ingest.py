"""Scans -> slice stacks -> Parquet shards, with everything that was rejected and why. [Ray Data]

Each session becomes a part (its row groups, and a record) in `work/`, written by a Ray task; then parts are packed, in
order, into content-named shards, again by tasks. So no pixel passes through the driver or the object store, and an
ingest that was killed goes on where it was: what has a record is not read again. Sessions that an earlier version of
the set has, from the same files, are taken from its shards. The manifest is committed last.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cranium import cohort, config, identity, place, provisions, series, shardset, store, versions
from cranium.cards import Card
from cranium.config import Compute, Ingest, Machine, UserError
from cranium.place import Where, at
from cranium.provisions import Provisions
from cranium.store import Artefact
from cranium.volume import dicom, fingerprint, labels, measure, nifti, normalise, shard, slices
from cranium.volume.quality import ASIDE, Rejected

Progress = Callable[[int, int, str], None]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
OF_SESSIONS = (
    "labels",
    "groups",
    "matched",
    "simulated",
)  # of a card: what is said of sessions, not of pixels


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
                _begin(target, base)
                ways = _mask_ways(card, spec, table)
                needs = provisions.provide(spec, ways, machine, target.path / "work" / "provisions")
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
    wanted = [[s.scans.get(_source(spec, channel)) for channel in spec.channels] for s in table.sessions]
    supplied = [any(scan.mask for scan in scans if scan) for scans in wanted if any(scans)]
    return provisions.mask_ways(spec.mask, stripped=card.stripped, all_supplied=all(supplied))


def artefact(card: Card, raw: Path, spec: Ingest, machine: Machine) -> Artefact:
    """Where the shard set of the files below `raw` lies (it need not exist yet)."""
    return _target(card, spec, _scan(card, raw, machine), machine)


def _scan(card: Card, raw: Path, machine: Machine, progress: Progress | None = None) -> cohort.CohortTable:
    return cohort.scan(card, raw, machine.raw.get(f"{card.name}_tables"), progress)


def _target(card: Card, spec: Ingest, table: cohort.CohortTable, machine: Machine) -> Artefact:
    target = store.artefact(machine.store, "ingest", card.name, _key(card, spec, table))
    with place.reachable(_base(target, machine)):
        shardset.fetch(target, _base(target, machine))
    return target


def _base(target: Artefact, machine: Machine) -> Where:
    """The folder the shards are written to."""
    return at(machine.shards, "ingest", target.path.name) if machine.shards else target.path


def _begin(target: Artefact, base: Where) -> None:
    """Where shards go elsewhere, say so in the store first: whoever tidies up or forgets finds what lies there."""
    if str(base) != str(target.path):
        (target.path / "work").mkdir(parents=True, exist_ok=True)
        place.write(target.path / shard.PLACE, f"{base}\n")


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
    return {
        "recipe": shardset.RECIPE,
        "card": card.facts("name", "layouts", "segmentation", "stripped", "tables", *OF_SESSIONS),
        "preprocessing": spec.preprocessing,
        "codec": spec.codec,
        "shard_mb": spec.shard_mb,
        "identifiers": spec.identifiers,
        "suspects": spec.suspects,
        "files": table.files,
        "tables": [store.sha256(path) for path in table.tables],
        "overlaps": sorted(
            overlap.cohort for overlap in card.overlaps
        ),  # the gate reads them in the manifest
        **({"overlap_ids": table.overlap_ids} if table.overlap_ids else {}),
    }


# ---- one session ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What every task needs to know."""

    cohort: str
    root: Path
    folder: Where  # of the shard set
    spec: Ingest
    classes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of a label map, and their raw values
    provisions: Provisions = field(default_factory=Provisions)

    @property
    def work(self) -> Where:
        return at(self.folder, "work")

    def part(self, index: int) -> Where:
        return at(self.work, f"{index:06}.parquet")

    def record(self, index: int) -> Where:
        return at(self.work, f"{index:06}.json")


def _ingest_session(row: dict[str, Any], job: _Job) -> dict[str, Any]:
    """One session: read, conform, write its part and its record. Only `Rejected` is an outcome; the rest are bugs."""
    spec, index, session = job.spec, int(row["index"]), json.loads(row["session"])
    slices.limit_threads(spec.compute.threads or max(1, int(spec.compute.cpus_per_worker)))
    wanted = {channel: normalise.Wanted(*scan[1:]) for channel, scan in session["scans"].items()}
    ways = provisions.ways(job.provisions)
    changed = series.changed(job.root, session["sizes"])
    late = {c: changed[p] for c, scan in wanted.items() for p in (scan.path, scan.mask) if p in changed}
    here = {channel: scan for channel, scan in wanted.items() if channel not in late}
    volumes, scans, rejected = normalise.read_scans(job.root, here, ways, spec.orientation)
    rejected |= late
    if spec.suspects == "reject":
        rejected |= (refused := nifti.refuse_suspects(volumes))
        scans = {channel: scan for channel, scan in scans.items() if channel not in refused}
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
                late_map = changed.get(path)
                label_map, why = (None, late_map) if late_map else _label_map(job, path, scans, conformed)
                record["label_map"] = "rejected" if why else "accepted"
                record["label_map_rejected"] = (
                    [*who, "segmentation", path, why.code, why.reason] if why else None
                )
            record |= _write_part(job, index, session, conformed, volumes, label_map)
    record["rejected"] = [
        [*who, *session["scans"][channel][:2], why.code, why.reason] for channel, why in rejected.items()
    ]
    place.write(job.record(index), json.dumps(record))
    return {"index": index, "stacks": sum(record["row_groups"])}


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
    size = place.publish(job.part(index), lambda path: shard.write(path, tables, spec.codec))
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
        "bytes": size,
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
    table, names = identity.admit(table, card.name, salted, machine.store, target.path.name)
    job = _Job(card.name, table.root, base, spec, dict(card.segmentation), needs)
    for folder in (job.work, at(base, "shards")):
        if not place.is_remote(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
    sizes = series.sizes(table.files)
    sessions = [(s, wanted) for s in table.sessions if (wanted := _wanted(s, spec, sizes))["scans"]]
    known = [
        versions.Session(s.subject, s.session, _inputs(table.root, s, wanted), dict(s.values))
        for s, wanted in sessions
    ]
    pixels = _pixels(card, spec, needs.ways)
    earlier = store.find(machine.store, "ingest", card.name)
    kept = versions.keep(base, earlier, pixels, known, spec.shard_mb << 20)
    have = place.names(job.work)
    todo = [
        {"index": i, "session": json.dumps(wanted)}
        for i, (_, wanted) in enumerate(sessions)
        if i not in kept.records and f"{i:06}.json" not in have
    ]
    _work(todo, _ingest_session, job, len(sessions), progress, f"{card.name}: sessions read")
    fresh = [i for i in range(len(sessions)) if i not in kept.records]
    read = map(json.loads, place.read_all([job.record(i) for i in fresh]))
    by_index = kept.records | dict(zip(fresh, read, strict=True))
    records = identity.cover([by_index[i] for i in range(len(sessions))], [s for s, _ in sessions], names)
    records = identity.without_copies(records)
    bins = _bins([r for r in records if r["row_groups"] and "kept" not in r], spec.shard_mb << 20)
    todo = [
        {"index": i, "members": json.dumps(members)}
        for i, members in enumerate(bins)
        if f"shard-{i:05}.json" not in have
    ]
    _work(todo, _pack, job, len(bins), progress, f"{card.name}: shards written")
    entries = place.read_all([at(job.work, f"shard-{i:05}.json") for i in range(len(bins))])
    shards = sorted(
        [*kept.shards, *map(json.loads, entries)],
        key=lambda entry: (entry["row_groups"][0]["subject"], entry["row_groups"][0]["session"]),
    )
    done = [
        shardset.Done(
            one.subject, one.session, one.inputs, {k: v for k, v in record.items() if k not in OURS}
        )
        for one, record in zip(known, records, strict=True)
    ]
    version: dict[str, Any] = {"pixels": pixels, "forgotten": list(names.forgotten)}
    if kept.source:
        version["reused"] = {"from": kept.source, "sessions": len(kept.records), "shards": len(kept.shards)}
    channels = {_source(spec, channel) for channel in spec.channels}
    refused = tuple(
        r for r in table.refused if r.contrast in channels or (not r.contrast and r.code not in ASIDE)
    )
    version["identifiers"] = spec.identifiers
    version["overlap_ids"] = table.overlap_ids  # other cohort -> our subject -> theirs, where one is mapped
    shardset.commit(target, base, card, spec, done, shards, refused, table.notes, version)


OURS = ("index", "at", "kept")  # of a record, while work goes on


def _pixels(card: Card, spec: Ingest, ways: tuple[str, ...]) -> str:
    """Fingerprint of what shapes rows beside the files: versions that share it can share shards."""
    facts = card.facts("name", "layouts", "segmentation", "stripped")
    settings = [spec.preprocessing, spec.codec, spec.shard_mb, spec.suspects]
    return config.fingerprint([shardset.RECIPE, facts, ways, *settings])


def _inputs(root: Path, session: cohort.Session, wanted: dict[str, Any]) -> str:
    """Fingerprint of what is read for a session: names, and the size and time of every file."""
    paths = {path for scan in session.scans.values() for path in (scan.path, scan.mask) if path}
    paths |= {session.segmentation} if session.segmentation else set()
    asked = {key: value for key, value in wanted.items() if key != "values"}
    return config.fingerprint([asked, {path: _look(root / path) for path in paths}])


def _look(path: Path) -> list[Any] | None:
    """Size and time of a file, or of all files in the folder of a DICOM series."""
    try:
        if dicom.is_series(path):
            path = Path(dicom.split(str(path))[0])
            return [[str(p.relative_to(path)), _look(p)] for p in sorted(path.rglob("*")) if not p.is_dir()]
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _wanted(session: cohort.Session, spec: Ingest, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What a task must know of a session: channel -> contrast, path, mask and note of the scan that fills it."""
    found = {channel: session.scans.get(_source(spec, channel)) for channel in spec.channels}
    scans = {channel: (s.contrast, s.path, s.mask, s.note) for channel, s in found.items() if s}
    names = {"subject": session.subject, "session": session.session}
    values, label_map = dict(session.values), session.segmentation
    paths = {path for scan in scans.values() for path in scan[1:3] if path} | (
        {label_map} if label_map else set()
    )
    listed = series.listed(paths, sizes)
    return {**names, "scans": scans, "values": values, "segmentation": label_map, "sizes": listed}


def _work(
    todo: list[dict[str, Any]],
    work: Callable[..., dict[str, Any]],
    job: _Job,
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
        if error.errno not in FULL + REFUSED:
            raise
        return {"index": row["index"], "stacks": 0, "errno": error.errno}
