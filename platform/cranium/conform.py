"""One session of an ingest: its scans are read, conformed and written as a part, with a record of what became of them.

It runs in Ray's tasks and knows nothing of Ray. `ingest.py` says which sessions there are, and packs their parts.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cranium import cohort, place, provisions, series, sources
from cranium.config import Ingest
from cranium.place import Where, at
from cranium.provisions import Provisions
from cranium.volume import dicom, fingerprint, labels, measure, nifti, normalise, shard, slices
from cranium.volume.quality import Rejected


@dataclass(frozen=True)
class Job:
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


def session(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """One session: read, conform, write its part and its record. Only `Rejected` is an outcome; the rest are bugs."""
    spec, index, session = job.spec, int(row["index"]), json.loads(row["session"])
    slices.limit_threads(spec.compute.threads or max(1, int(spec.compute.cpus_per_worker)))
    wanted = {channel: normalise.Wanted(*scan[1:]) for channel, scan in session["scans"].items()}
    ways = provisions.ways(job.provisions)
    changed = series.changed(job.root, session["sizes"])
    late = {c: changed[p] for c, scan in wanted.items() for p in (scan.path, scan.mask) if p in changed}
    here = {channel: scan for channel, scan in wanted.items() if channel not in late}
    volumes, scans, rejected = normalise.read_scans(job.root, here, ways, spec.orientation, spec.phi)
    rejected |= late
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
            label_map: labels.LabelMap | None = None
            if path := session["segmentation"]:
                found = changed.get(path) or _label_map(job, path, scans, conformed, rejected)
                if isinstance(found, Rejected):
                    told = [*who, "segmentation", path, found.code, found.reason]
                    record |= {"label_map": "rejected", "label_map_rejected": told}
                else:
                    label_map = found
                    record["label_map"] = "warned" if found.notes else "accepted"
            record |= _write_part(job, index, session, conformed, volumes, label_map)
    record["rejected"] = [
        [*who, *session["scans"][channel][:2], why.code, why.reason] for channel, why in rejected.items()
    ]
    hashes = {
        wanted[c].path: v.sha256 for c, v in volumes.items() if not dicom.is_series(job.root / wanted[c].path)
    }
    record["content"] = sources.content(job.root, session, hashes)
    place.write(job.record(index), json.dumps(record))
    return {"index": index, "stacks": sum(record["row_groups"])}


def _label_map(
    job: Job,
    path: str,
    scans: dict[str, normalise.Masked],
    conformed: normalise.Conformed,
    rejected: dict[str, Rejected],
) -> labels.LabelMap | Rejected:
    """The label map of a session on its grid, or why there is none: then its scans serve without labels."""
    spec, at = job.spec, (conformed.transforms, conformed.grid, conformed.brain, conformed.slices)
    try:
        found = nifti.read(
            job.root / path, root=job.root, orientation=spec.orientation, labels=True, phi=spec.phi
        )
        return labels.place(found, list(job.classes.values()), scans, *at, rejected)
    except Rejected as reason:
        return reason


def _write_part(
    job: Job,
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
    stacks = slices.to_stacks(conformed.volumes, run, spec.depth)
    drawn = None if label_map is None else slices.to_stacks(label_map.classes[None], run, spec.depth)[:, 0]
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
    origins = {}
    for channel, volume in used.items():
        contrast, path = session["scans"][channel][:2]
        origins[channel] = {"contrast": contrast, "path": path, "sha256": volume.sha256}
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
        "sources": json.dumps(origins),
        "acquisition": json.dumps({channel: dict(volume.acquisition) for channel, volume in used.items()}),
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


# ---- what is asked of a session ------------------------------------------------------------------------------------


def source(spec: Ingest, channel: str) -> str:
    """The contrast that fills a channel."""
    return {str(k): str(v) for k, v in spec.channel_map.items()}.get(channel, channel)


def wanted(session: cohort.Session, spec: Ingest, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What a task must know of a session: channel -> contrast, path, mask and note of the scan that fills it."""
    found = {channel: session.scans.get(source(spec, channel)) for channel in spec.channels}
    scans = {channel: (s.contrast, s.path, s.mask, s.note) for channel, s in found.items() if s}
    names = {"subject": session.subject, "session": session.session}
    values, label_map = dict(session.values), session.segmentation
    paths = {path for scan in scans.values() for path in scan[1:3] if path} | (
        {label_map} if label_map else set()
    )
    listed = series.listed(paths, sizes)
    return {**names, "scans": scans, "values": values, "segmentation": label_map, "sizes": listed}
