"""What a stream may read: the sessions that finished shard sets list in their manifests, filtered; and their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cranium.config import Stream, UserError
from cranium.store import Artefact
from cranium.volume import plan, shard


@dataclass(frozen=True)
class Corpus:
    """What a plan is made from: the sessions of some shard sets, and the form of their stacks."""

    sessions: tuple[plan.Session, ...]
    shape: tuple[int, int, int, int]
    channels: tuple[str, ...]
    shard_sets: tuple[Artefact, ...] = ()

    @property
    def rows(self) -> int:
        return sum(session.rows for session in self.sessions)


def corpus(shard_sets: Sequence[Artefact], spec: Stream | None = None) -> Corpus:
    """The sessions of finished shard sets that `spec` admits, from their manifests: nothing else is ever read.

    Refuses sets of different channels, shapes or preprocessing, and a manifest that does not add up.
    """
    manifests = [artefact.manifest() for artefact in shard_sets]
    for key in ("channels", "shape", "preprocessing_hash"):
        values = {str(m[key]): m["cohort"] for m in manifests}
        if len(values) > 1:
            raise UserError(
                "SHARDS_DIFFER", f"cohorts {sorted(values.values())} differ in {key}; ingest them alike"
            )
    sessions: list[plan.Session] = []
    for artefact, manifest in zip(shard_sets, manifests, strict=True):
        sessions += _sessions(artefact, manifest)
    channels = tuple(manifests[0]["channels"])
    if spec:
        sessions = list(_admitted(sessions, channels, spec))
    if not sessions:
        raise UserError("NO_ROWS", f"no stacks in {[str(a.path) for a in shard_sets]} pass stream's filters")
    return Corpus(tuple(sessions), tuple(manifests[0]["shape"]), channels, tuple(shard_sets))


def _sessions(artefact: Artefact, manifest: Mapping[str, Any]) -> list[plan.Session]:
    groups: dict[tuple[str, str], list[plan.RowGroup]] = {}
    base = shard.base(artefact.path)
    for entry in manifest["shards"]:
        file = f"{base}/{entry['file']}"
        for index, group in enumerate(entry["row_groups"]):
            key = (group["subject"], group["session"])
            groups.setdefault(key, []).append(plan.RowGroup(file, index, group["rows"]))
    if (rows := sum(g.rows for gs in groups.values() for g in gs)) != manifest["counts"]["stacks"]:
        raise UserError(
            "SHARD_ROWS", f"{artefact.path}: {rows} rows listed, {manifest['counts']['stacks']} counted"
        )
    table = pq.read_table(artefact.path / "sessions.parquet", columns=["subject", "session", "present"])
    present = {(row["subject"], row["session"]): row["present"] for row in table.to_pylist()}
    if absent := sorted(set(groups) - set(present)):
        raise UserError("SHARD_ROWS", f"{artefact.path}: sessions.parquet lacks {absent[0]}; ingest again")
    return [
        plan.Session(manifest["cohort"], *key, tuple(groups[key]), present[key])
        for key in sorted(groups, key="/".join)
    ]


def _admitted(
    sessions: Sequence[plan.Session], channels: Sequence[str], spec: Stream
) -> tuple[plan.Session, ...]:
    if unknown := sorted(set(spec.contrasts) - set(channels)):
        raise UserError("FILTER", f"stream.contrasts names {unknown}; the shards hold {list(channels)}")
    bits = sum(1 << channels.index(contrast) for contrast in spec.contrasts)
    try:
        return plan.select(sessions, cohorts=spec.cohorts, present=bits, subjects=spec.subjects)
    except ValueError as error:
        raise UserError("FILTER", f"stream: {error}") from None


def labels(corpus: Corpus, name: str) -> np.ndarray:
    """Column `name` of each session, from `sessions.parquet`: object [sessions], None where it is absent.

    `labels(corpus, "diagnosis")[batch.sessions]` are those of a batch. A relabelling rewrites no pixels.
    """
    found: dict[str, Any] = {}
    known: set[str] = set()
    for artefact in corpus.shard_sets:
        path = artefact.path / "sessions.parquet"
        known |= set(names := pq.read_schema(path).names)
        if name in names:
            for row in pq.read_table(path, columns=["cohort", "subject", "session", name]).to_pylist():
                found[f"{row['cohort']}/{row['subject']}/{row['session']}"] = row[name]
    if name not in known:
        raise UserError("NO_LABEL", f"no cohort has a column {name}; there are {sorted(known)}")
    return np.array([found.get(session.key) for session in corpus.sessions], object)
