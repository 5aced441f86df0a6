"""Rows of the fault matrix that span reading and the table of a cohort: I21, I22, I25; no Ray, tasks run in place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import phantoms
from cranium import cohort, conform, identity, ingest, store, track
from cranium.cards import Card
from cranium.config import Ingest, Machine
from cranium.patterns import tidy
from cranium.store import Artefact

SPEC = Ingest(contrasts=("T1w",), size=56, spacing_mm=4.0, slice_spacing_mm=8.0, shard_mb=1)
CARD = Card.model_validate(phantoms.card(contrasts=("T1w",)))


@pytest.fixture(autouse=True)
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of an ingest in this process."""

    def run(items: list[dict[str, Any]], work: Any, job: Any) -> Iterator[dict[str, Any]]:
        yield from (ingest._guarded(item, work, job) for item in items)

    monkeypatch.setattr(ingest, "_on_ray", run)


def ingested(root: Path, machine: Machine, **settings: Any) -> Artefact:
    return ingest.ingest(CARD, root, SPEC.model_copy(update=settings), machine)


def table(made: Artefact, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(made.path / f"{name}.parquet").to_pylist()
    return rows


def tree(folder: Path, count: int = 3) -> Path:
    return phantoms.bids_tree(
        folder,
        num_subjects=count,
        contrasts=("T1w",),
        missing=(),
        spacing=(6, 6, 6),
        shape=(30, 36, 26),
        tilt=False,
    )


def renamed(root: Path, old: str, new: str) -> None:
    """Give a subject another id: folders, files and the row of participants.tsv."""
    for path in sorted(root.rglob(f"*{old}*"), key=lambda p: -len(p.parts)):
        path.rename(path.with_name(path.name.replace(old, new)))
    people = root / "participants.tsv"
    rows = people.read_text().replace(f"sub-{old}\t", '"sub-' + new.replace('"', '""') + '"\t')
    people.write_text(rows, errors="surrogateescape")


# ---- I21 ------------------------------------------------------------------------------------------------------------


def test_the_same_bytes_under_two_ids(tmp_path: Path, machine: Machine) -> None:  # I21
    root = tree(tmp_path)
    scans = [root / f"sub-00{i}/anat/sub-00{i}_T1w.nii.gz" for i in (1, 2, 3)]
    shutil.copy(scans[0], scans[1])
    made = ingested(root, machine)
    assert [s["subject"] for s in table(made, "sessions")] == ["001", "003"]
    (row,) = table(made, "quarantine")
    assert (row["subject"], row["code"]) == ("002", "DUP_CONTENT") and store.sha256(scans[0])[:16] in row[
        "reason"
    ]
    counts = made.manifest()["counts"]
    assert (counts["scans"], counts["accepted"], counts["rejected"], counts["sessions"]) == (3, 2, 1, 2)


def test_the_rule_for_copies() -> None:  # I21
    def record(subject: str, digest: str, **more: Any) -> dict[str, Any]:
        sources = {"T1w": {"contrast": "T1w", "path": "p", "sha256": digest}}
        of = {"cohort": "c", "subject": subject, "session": "", "sources": json.dumps(sources)}
        return {"row_groups": [5], "warned": 1, "rejected": [], "session": of, **more}

    def left(*records: dict[str, Any]) -> list[bool]:
        return [bool(r["row_groups"]) for r in identity.without_copies(records)]

    assert left(record("a", "1"), record("b", "2"), record("c", "1")) == [True, True, False]
    assert left(record("a", "1"), record("a", "1")) == [True, True]  # of one subject: nothing leaks
    assert left(record("a", "1"), record("b", "1", kept=True)) == [False, True]  # who was there stays
    empty = {"row_groups": [], "warned": 0, "rejected": []}
    assert left(empty, record("a", "1")) == [False, True]


# ---- I22 ------------------------------------------------------------------------------------------------------------

IDS = {
    "composed": "é1",
    "decomposed": unicodedata.normalize("NFD", "ö2"),
    "right to left": "א\u200f3",
    "emoji": "👩‍🔬4",
    "long": "x" * 200,
    "device": "con",
    "newline": "a\nb",
    "tab": "a\tb",
    "spaces": " two  words ",
    "formula": "=1+1",
    "markup": "<b>&amp;",
    "percent": "50%25",
    "no UTF-8": b"\xff8".decode(errors="surrogateescape"),
}


def test_ids_of_every_kind(tmp_path: Path, machine: Machine) -> None:  # I22
    """Odd ids reach the tables tidy and apart, come out of CSV and JSON whole, and name no file."""
    root, shown = tree(tmp_path, len(IDS)), sorted(map(tidy, IDS.values()))
    for number, name in enumerate(IDS, 1):
        renamed(root, f"{number:03}", IDS[name])
    nothing = {"tables": [], "labels": {}, "groups": []}
    card = Card.model_validate(phantoms.card(contrasts=("T1w",)) | nothing)
    made = ingest.ingest(card, root, SPEC, machine)
    assert [s["subject"] for s in table(made, "sessions")] == shown
    assert all(name.isprintable() for name in shown) and len(set(shown)) == len(IDS)
    out = io.StringIO()
    csv.writer(out).writerow(shown)
    assert next(csv.reader(io.StringIO(out.getvalue()))) == shown == json.loads(json.dumps(shown))
    odd = [name for name in shown if len(name) > 3]
    assert not [p for p in machine.store.rglob("*") if any(name in p.name for name in odd)]


def test_odd_ids_join_their_table(tmp_path: Path) -> None:  # I22
    names = [
        IDS[n] for n in IDS if n not in ("newline", "tab", "spaces", "no UTF-8")
    ]  # no cell can hold those
    root = tree(tmp_path, len(names))
    for number, name in enumerate(names, 1):
        renamed(root, f"{number:03}", unicodedata.normalize("NFD", name))
    found = cohort.scan(CARD, root)
    assert [s.values["site"] is not None for s in found.sessions] == [True] * len(names)


def test_odd_ids_in_mlflow(mlflow_db: str) -> None:  # I22: a param holds any text, so also an id
    tracker = track.Tracker(mlflow_db, "ids")
    given = {f"id.{i}": tidy(name) for i, name in enumerate(IDS.values())}
    run = tracker.run("sweep", "ids", {})
    tracker.record("cell", "ids", run, {"subject": tidy(IDS["emoji"])}, given, {})
    (back,) = tracker.children(run)
    assert dict(back.params) == given and back.tags["subject"] == tidy(IDS["emoji"])


def test_two_spellings_are_one_subject(tmp_path: Path, machine: Machine) -> None:  # I22
    root = tree(tmp_path, 2)
    for number, spelling in (("001", "é"), ("002", unicodedata.normalize("NFD", "é"))):
        renamed(root, number, spelling)
    people = root / "participants.tsv"
    people.write_text("".join(people.read_text().splitlines(keepends=True)[:2]))
    if len(list(root.glob("sub-*"))) < 2:
        pytest.skip("this file system composes names itself")
    made = ingested(root, machine)
    assert [s["subject"] for s in table(made, "sessions")] == ["é"]
    assert [q["code"] for q in table(made, "quarantine")] == ["DUP_ID"]


def test_a_file_that_grows_after_it_was_listed(  # I23
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path)
    run = ingest._on_ray

    def late(items: list[dict[str, Any]], work: Any, job: Any) -> Iterator[dict[str, Any]]:
        if work is conform.session:
            scan = root / "sub-002/anat/sub-002_T1w.nii.gz"
            scan.write_bytes(scan.read_bytes() + b"more")
            (root / "sub-003/anat/sub-003_T1w.nii.gz").unlink()
        yield from run(items, work, job)

    monkeypatch.setattr(ingest, "_on_ray", late)
    made = ingested(root, machine)
    assert [s["subject"] for s in table(made, "sessions")] == ["001"]
    found = {q["subject"]: (q["code"], q["reason"]) for q in table(made, "quarantine")}
    assert found["002"][0] == found["003"][0] == "IO" and "when the folder was listed" in found["002"][1]


# ---- I25 ------------------------------------------------------------------------------------------------------------

PLANTED = ("DOE^JANE", "JANE", "19501231", "1950-12-31", "7654321", "jane.doe@clinic.example", "Mayo")


def plant(root: Path) -> None:
    """Words that identify a person around the scans of two subjects: one is used, one is damaged."""
    for number in ("001", "002"):
        path = root / f"sub-{number}/anat/sub-{number}_T1w.nii.gz"
        image = nib.load(path)
        image.header["descrip"], image.header["aux_file"], image.header["db_name"] = (
            b"DOE^JANE",
            b"19501231",
            b"7654321",
        )
        image.header.extensions.append(
            nib.nifti1.Nifti1Extension("comment", b"jane.doe@clinic.example, MRN 7654321")
        )
        content = gzip.compress(nib.Nifti1Image(image.dataobj, image.affine, image.header).to_bytes(), 1)
        told = path.with_name(f"sub-{number}_run-DOE^JANE_1950-12-31_T1w.nii.gz")
        path.unlink()
        told.write_bytes(content if number == "001" else content[:-40])
        sidecar = {"PatientName": "DOE^JANE", "PatientBirthDate": "19501231", "InstitutionName": "Mayo"}
        told.with_name(told.name.replace(".nii.gz", ".json")).write_text(json.dumps(sidecar))


def everything(folder: Path) -> bytes:
    """Every byte below a folder, and every cell of its Parquet files in the clear; not the private folder."""
    parts = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "private" not in p.parts):
        parts += [str(path.relative_to(folder)).encode(), path.read_bytes()]
        if path.suffix == ".parquet":
            of = pq.read_table(path)
            parts += [repr(of.schema.metadata).encode()]
            parts += [
                repr(of[n].to_pylist()).encode()
                for n in of.column_names
                if of.schema.field(n).type == pa.string()
            ]
    return b"\0".join(parts)


@pytest.mark.parametrize("identifiers", ["plain", "salted"])
def test_nothing_planted_leaves(tmp_path: Path, machine: Machine, identifiers: str) -> None:  # I25
    root = tree(tmp_path)
    plant(root)
    made = ingested(root, machine, identifiers=identifiers)
    held = everything(machine.store)
    assert b"PHI_SUSPECT" in held and b"GZ_" in held
    for word in PLANTED:
        assert word.encode() not in held and word.lower().encode() not in held.lower(), word
    assert len(table(made, "sessions")) == 2
    if identifiers == "salted":
        assert not re.search(rb"sub-00|[\"']00[123][\"'/]", held)
        keys = json.loads(next((machine.store / "private").glob("names-*.json")).read_text())
        assert {s["subject"] for s in table(made, "sessions")} | {
            q["subject"] for q in table(made, "quarantine")
        } == set(keys["subjects"].values())
        assert set(keys["subjects"]) == {"001", "002", "003"}
        (bad,) = table(made, "quarantine")
        (where,) = [raw for raw, shown in keys["paths"].items() if shown == bad["path"]]
        assert (root / where).is_file()  # who holds the store's secret finds the scan
        assert {s["site"] for s in table(made, "sessions")} <= {
            "site0",
            "site1",
        }  # labels and groups still join


def test_suspects_may_be_refused(tmp_path: Path, machine: Machine) -> None:  # I25
    root = tree(tmp_path)
    plant(root)
    made = ingested(root, machine, phi="reject")
    assert made.manifest()["rejections"] == {"PHI_SUSPECT": 1, "GZ_TRUNCATED": 1}
    assert len(table(made, "sessions")) == 1
