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
        ingest._raise(row)
        yield row


def plainly(
    raw: Path, machine: Machine, spec: Ingest = SPEC, progress: Any = None, card: Card = CARD
) -> Artefact:
    """`ingest.ingest` of phantoms, in this process."""
    before, ingest._on_ray = ingest._on_ray, in_turn
    try:
        return ingest.ingest(card, raw, spec, machine, progress)
    finally:
        ingest._on_ray = before


def faulty(root: Path, num_subjects: int, title: str) -> Artefact:
    """Subjects at two sites: one scan cut short, three that are web pages, a copy in place of a T2w."""
    raw = phantoms.bids_tree(
        root / "raw",
        num_subjects=num_subjects,
        conditions=("control",),
        missing=((), (), ("FLAIR",)),
        shape=(40, 48, 36),
    )

    def scan(subject: str, contrast: str) -> Path:
        return raw / f"sub-{subject}/anat/sub-{subject}_{contrast}.nii.gz"

    cut = scan("001", "FLAIR")
    cut.write_bytes(cut.read_bytes()[:-100])
    for path in (raw / "sub-004/anat").iterdir():
        path.write_bytes(b"<html>")
    masks = raw / "derivatives/masks"
    for folder, end in ((raw, ".nii.gz"), (masks, "_mask.nii.gz")):
        files = [folder / f"sub-007/anat/sub-007_{contrast}{end}" for contrast in ("T1w", "T2w")]
        files[1].write_bytes(files[0].read_bytes())
    fields = {"title": title, "expected": {"subjects": num_subjects, "source": "the test"}}
    card = Card.model_validate({**phantoms.card(), **fields})
    spec = Ingest(size=56, spacing_mm=4.0, slice_spacing_mm=4.0, shard_mb=1)
    return plainly(raw, Machine(store=root / "store"), spec, card=card)


def content(of: Artefact) -> dict[str, bytes]:
    """Every file of an artefact but the stamp, which holds times, and the records, which hold those of the scans."""
    return {
        str(path.relative_to(of.path)): path.read_bytes()
        for path in sorted(of.path.rglob("*"))
        if path.is_file() and path.name != "verified.json"
    }
