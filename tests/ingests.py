"""Ingest without a cluster: the same tasks, one after the other in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import phantoms
from cranium import ingest
from cranium.cards import Card
from cranium.config import Ingest, Machine
from cranium.store import Artefact

SPEC = Ingest(
    size=56,
    spacing_mm=4.0,
    slice_spacing_mm=4.0,
    shard_mb=1,
    mask=("supplied",),
    align="none",
    compute={"num_workers": 2},
)
CARD = Card.model_validate(phantoms.card())


def in_turn(items: list[dict[str, Any]], work: Any, job: Any) -> Iterator[dict[str, Any]]:
    """What `ingest._on_ray` does, without Ray."""
    for item in items:
        row = ingest._guarded(item, work, job)
        if row["errno"]:
            raise OSError(row["errno"], "told by a task")
        yield row


def plainly(raw: Path, machine: Machine, spec: Ingest = SPEC, progress: Any = None) -> Artefact:
    """`ingest.ingest` of phantoms, in this process."""
    before, ingest._on_ray = ingest._on_ray, in_turn
    try:
        return ingest.ingest(CARD, raw, spec, machine, progress)
    finally:
        ingest._on_ray = before


def content(of: Artefact) -> dict[str, bytes]:
    """Every file of an artefact but the stamp, which holds times, and the records, which hold those of the scans."""
    return {
        str(path.relative_to(of.path)): path.read_bytes()
        for path in sorted(of.path.rglob("*"))
        if path.is_file() and path.name != "verified.json"
    }
