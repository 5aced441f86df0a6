"""What outputs call subjects, sessions and paths: short ids and dates are the hard cases."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import dicoms
import phantoms
import trees
from cranium import cohort, identity, ingest, naming, trust
from cranium.cards import Card
from cranium.config import Ingest, Machine
from cranium.store import Artefact

SPEC = Ingest(
    contrasts=("T1w",),
    mask=("otsu",),
    size=28,
    spacing_mm=8.0,
    slice_spacing_mm=16.0,
    align="none",
    min_brain=0.01,
)


@pytest.fixture(autouse=True)
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(
        items: list[dict[str, Any]], work: Callable[..., dict[str, Any]], job: Any
    ) -> Iterator[dict[str, Any]]:
        return (work(item, job) for item in items)

    monkeypatch.setattr(ingest, "_on_ray", run)


def card(**layout: Any) -> Card:
    content = phantoms.card(contrasts=("T1w",), masks=False)
    content |= {"tables": [], "labels": {}, "groups": [], "layouts": [{"source": "a test", **layout}]}
    return Card.model_validate(content)


def made(of: Card, root: Path, store: Path, identifiers: str) -> Artefact:
    spec = SPEC.model_copy(update={"identifiers": identifiers})
    done = ingest.ingest(of, root, spec, Machine(store=store))
    assert trust.verify(done) == []
    return done


def table(of: Artefact, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(of.path / f"{name}.parquet").to_pylist()
    return rows


def private(store: Path) -> dict[str, Any]:
    return dict(json.loads(next((store / "private").glob("names-*.json")).read_text()))


def test_short_ids_and_paths_leave_all_else_as_it_is(tmp_path: Path) -> None:
    """Subjects 1 to 4, each a folder of DICOM: "1" is in every number. 3 lacks a slice, 4 is a copy of 1's series."""
    root = tmp_path / "raw"
    for number in (1, 2, 3):
        missing = [7] if number == 3 else []
        dicoms.series(root / str(number), "mprage", number=1, subject=str(number), seed=number, skip=missing)
    of = card(format="dicom", series=["{subject}"])
    plain = made(of, root, tmp_path / "plain", "plain")
    salted = made(of, root, tmp_path / "salted", "salted")
    keys = private(tmp_path / "salted")["subjects"]
    assert set(keys) == {"1", "2", "3"}
    shown = {row["subject"]: row for row in table(salted, "sessions")}
    for row in table(plain, "sessions"):
        other = shown.pop(keys[row["subject"]])
        (origin,) = json.loads(other["sources"]).values()
        assert origin["path"].startswith(f"{other['subject']}/")
        for column in row.keys() - {"subject", "sources"}:
            assert row[column] == other[column], column
    (here,), (there,) = table(plain, "quarantine"), table(salted, "quarantine")
    assert here["code"] == "SLICES_MISSING" and here["reason"] == there["reason"]
    assert there["path"].startswith(f"{keys['3']}/") and here["path"] == "3"
    assert plain.manifest()["counts"] == salted.manifest()["counts"]
    assert not shown


def test_a_choice_names_the_file_by_its_key(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    for seed, acq in enumerate(("DOE", "ROE")):
        trees.scan(root / f"sub-J1_acq-{acq}_T1w.nii.gz", "T1w", seed)
    of = card(files={"T1w": "sub-{subject}_acq-{acq}_T1w.nii.gz"})
    of_plain, of_salted = (made(of, root, tmp_path / how, how) for how in ("plain", "salted"))
    reasons = []
    for done in (of_plain, of_salted):
        (row,) = table(done, "sessions")
        (note,) = (n for n in json.loads(row["warnings"]) if n["code"] == "RUN_CHOSEN")
        reasons.append(note["reason"])
    assert reasons[0] == "<sub-J1_acq-DOE_T1w.nii.gz> taken of 2: the first by run and name"
    assert re.fullmatch(
        rf"<{row['subject']}/[0-9a-f]{{16}}> taken of 2: the first by run and name", reasons[1]
    )
    held = [str(table(of_salted, name)) for name in ("sessions", "records")]
    assert not any(word in text for text in held for word in ("DOE", "J1"))


def scans(of: Card, *who: tuple[str, str]) -> cohort.CohortTable:
    scan = {"T1w": cohort.Scan("T1w", "x", None)}
    sessions = tuple(cohort.Session(subject, session, scan, {"visit": session}) for subject, session in who)
    notes = (
        "1 subjects have no row in t_1.csv: <1>",
        "1 sessions have no visit within 1 days in t_1.csv: <1 2006-10-20>",
    )
    return cohort.CohortTable(Path(), of.layouts[0], sessions, (), (), (), notes)


DATED = card(files={"T1w": "{subject}/{session}/t1.nii"}, when=r"(?P<date>\d{4}-\d{2}-\d{2})")


def test_dates_become_days_of_the_subjects_own(tmp_path: Path) -> None:
    """Order and intervals stay; no date does, and two subjects seen on one day have two names for it."""
    days = ("1999-12-31", "2006-10-20", "2006-10-20_repeat", "2007-01-18")
    found = scans(DATED, *(("1", day) for day in days), ("2", "2006-10-20"))
    covered, _ = naming.admit(found, "adni", True, tmp_path, "x")
    tied = private(tmp_path)
    first, second = tied["subjects"]["1"], tied["subjects"]["2"]
    back = tied["sessions"][first]
    of_first = [s.session for s in covered.sessions if s.subject == first]
    assert of_first == sorted(of_first) and [back[name] for name in of_first] == list(days)
    numbers = [int(name[1:6]) for name in of_first]
    true = [datetime.date.fromisoformat(day[:10]).toordinal() for day in days]
    assert [n - numbers[0] for n in numbers] == [t - true[0] for t in true] and numbers[0] != true[0]
    (other,) = [s.session for s in covered.sessions if s.subject == second]
    assert other != of_first[1] and tied["sessions"][second] == {other: "2006-10-20"}
    assert all(s.values["visit"] == s.session for s in covered.sessions)
    assert covered.notes == (
        f"1 subjects have no row in t_1.csv: <{first}>",
        f"1 sessions have no visit within 1 days in t_1.csv: <{first} {of_first[1]}>",
    )
    assert "20" + "06" not in repr(
        [(s.subject, s.session, s.values) for s in covered.sessions] + [covered.notes]
    )
    plain, _ = naming.admit(found, "adni", False, tmp_path, "y")
    assert plain.sessions == found.sessions and plain.notes == found.notes


def test_other_names_of_sessions_stay_unless_they_may_identify(tmp_path: Path) -> None:
    sessions = ("M006", "d0129", "01", "", "20061020", "DOE^JANE", "1850-01-01")
    found = scans(DATED, *(("A", session) for session in sessions))
    names = naming.Names("adni", identity.salt(tmp_path))
    shown = {session: name for (_, session), (_, name) in naming.shown(found, names).items()}
    assert all(shown[session] == session for session in ("M006", "d0129", "01", ""))
    for session in ("20061020", "DOE^JANE", "1850-01-01"):
        assert len(shown[session]) == 16 and int(shown[session], 16) >= 0


def test_a_salted_set_with_dates_is_known_again(tmp_path: Path) -> None:
    """Nothing in the store but its private folder holds a date; the next ingest finds it, a version builds on it."""
    root = tmp_path / "raw"
    for seed, where in enumerate(("A/2006-10-20", "A/2007-10-20", "B/2006-10-20")):
        trees.scan(root / where / "t1.nii.gz", "T1w", seed)
    of = card(files={"T1w": "{subject}/{session}/t1.nii.gz"}, when=r"(?P<date>\d{4}-\d{2}-\d{2})")
    first = made(of, root, tmp_path / "store", "salted")
    (root / "B/2006-10-20/t1.nii.gz").touch()
    assert made(of, root, tmp_path / "store", "salted").id == first.id
    trees.scan(root / "B/2007-01-01/t1.nii.gz", "T1w", 3)
    second = made(of, root, tmp_path / "store", "salted")
    assert second.manifest()["reused"]["sessions"] == 3 and second.manifest()["counts"]["sessions"] == 4
    held = b"".join(
        p.read_bytes() for p in (tmp_path / "store").rglob("*") if p.is_file() and "private" not in p.parts
    )
    for name in ("sessions", "quarantine", "records"):
        held += str(table(second, name)).encode()
    assert b"2006-" not in held and b"2007-" not in held
