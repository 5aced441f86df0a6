from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dicoms
import phantoms
from cranium import cohort, series
from cranium.cards import Card, Layout
from cranium.config import UserError
from cranium.volume import normalise

SMALL = (8, 8, 4)


def layout(*patterns: str, **more: Any) -> Layout:
    return Layout.model_validate({"format": "dicom", "series": list(patterns), "source": "a test", **more})


def found(root: Path, *patterns: str, progress: series.Progress | None = None, **more: Any) -> series.Found:
    return series.matches(layout(*patterns, **more), root, files(root), progress)


def files(root: Path) -> dict[str, int]:
    return {p.relative_to(root).as_posix(): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()}


def chosen(claims: dict[series.Key, list[Any]]) -> dict[series.Key, list[str]]:
    return {key: [match.path for match in group] for key, group in claims.items()}


def test_a_tcia_download(tmp_path: Path) -> None:
    dicoms.nbia_tree(tmp_path)
    said: list[tuple[int, int, str]] = []
    told = found(tmp_path, "UPENN-GBM/{subject}/{session}/{series}", progress=lambda *step: said.append(step))
    assert sorted(told.claims) == [
        (f"UPENN-GBM-0000{n}", f"01-0{n + 1}-2020-NA-BRAIN ROUTINE-{9999 + n}", contrast)
        for n in (1, 2)
        for contrast in ("FLAIR", "T1ce", "T1w", "T2w")
    ]
    for (subject, _, contrast), group in told.claims.items():
        assert len(group) == 1 and group[0].fields["subject"] == subject
        assert dicoms.SEQUENCES[_sequence(group[0].path)]["contrast"] == contrast
        assert told.reasons[group[0].path]
    refused = {(r.subject, r.code) for r in told.refused}
    codes = ("LOCALIZER", "NOT_STRUCTURAL", "DERIVED", "NOT_MR")
    assert refused == {(f"UPENN-GBM-0000{n}", code) for n in (1, 2) for code in codes}
    assert len(told.refused) == 8  # one for each series: with the claims, they add up to the 16 there are
    assert [step[:2] for step in said] == [(i, 16) for i in range(1, 17)]
    assert told.notes == (
        "8 DICOM series are of another kind than a cohort's scans: 2 DERIVED, 2 LOCALIZER, 2 NOT_MR, 2 NOT_STRUCTURAL",
        "AGENT_SILENT, 2 DICOM series: T1w because nothing in its study tells of contrast agent before it; such as "
        "UPENN-GBM/UPENN-GBM-00001/01-02-2020-NA-BRAIN ROUTINE-10000/2.000000-t1 axial-20002",
    )


def _sequence(path: str) -> str:
    order = ("localizer", "t1", "flair", "t2", "dwi", "adc", "t1_post", "ct")
    return order[int(path.rsplit("/", 1)[1].split(".")[0]) - 1]


def test_a_loni_download_with_a_repeat_and_a_dual_echo(tmp_path: Path) -> None:
    dicoms.loni_tree(tmp_path, num_subjects=1)
    told = found(tmp_path, "ADNI/{subject}/{series}/{session}_{time}/{image}")
    day = ("002_S_0413", "2006-05-02")
    assert sorted(told.claims) == [(*day, "PDw"), (*day, "T1w"), (*day, "T2w")]
    assert [match.fields["series"] for match in told.claims[*day, "T1w"]] == ["MPRAGE", "MPRAGE_REPEAT"]
    (proton,), (t2,) = told.claims[*day, "PDw"], told.claims[*day, "T2w"]
    assert proton.path.removesuffix("@13") == t2.path.removesuffix("@80") != t2.path
    used = dict(series.identity([proton.path, "ADNI/x.nii"], {**files(tmp_path), "ADNI/x.nii": 5}))
    folder = proton.path.partition("#")[0]
    assert used == {p: n for p, n in files(tmp_path).items() if p.startswith(f"{folder}/")} | {
        "ADNI/x.nii": 5
    }


def test_repeats_are_ordered_by_kind_then_time(tmp_path: Path) -> None:
    plan = {
        "late": {"number": 1, "time": "120000"},
        "early": {"number": 2, "time": "100000"},
        "derived": {"number": 3, "time": "090000", "ImageType": ["DERIVED", "PRIMARY", "M"]},
        "flat": {"number": 4, "time": "080000", "sequence": "t1"},
    }
    for name, place in plan.items():
        dicoms.series(tmp_path / "P1" / name, shape=SMALL, **place)
    (claims,) = found(tmp_path, "{subject}/{series}").claims.values()
    assert [m.path for m in claims] == ["P1/early", "P1/late", "P1/flat", "P1/derived"]
    kinds = [m.order[0] for m in claims]
    assert kinds[0] == kinds[1] < kinds[2] < kinds[3], "only repeats of one kind compete for first and last"
    assert [m.fields["run"] for m in claims] == ["1", "2", "3", "4"]
    assert sorted(claims, key=lambda m: m.order) == claims


def test_without_times_series_numbers_order_repeats(tmp_path: Path) -> None:
    for name, number, time in (("a", 7, None), ("b", 3, "101500")):
        nothing: dict[str, Any] = dict.fromkeys(("AcquisitionTime", "SeriesTime"), time)
        dicoms.series(tmp_path / "P1" / name, shape=SMALL, number=number, **nothing)
    (claims,) = found(tmp_path, "{subject}/{series}").claims.values()
    assert [m.path for m in claims] == ["P1/b", "P1/a"]


def test_the_same_series_downloaded_twice_is_one_scan(tmp_path: Path) -> None:
    for name in ("a", "b"):
        dicoms.series(tmp_path / "P1" / name, shape=SMALL)
    told = found(tmp_path, "{subject}/{series}")
    assert chosen(told.claims) == {("P1", "", "T1w"): ["P1/a"]}
    assert [(r.path, r.code, r.contrast) for r in told.refused] == [("P1/b", "DUP_ID", "T1w")]


@pytest.mark.parametrize(("repeats", "day"), [("first", "a"), ("last", "b")])
def test_days_are_not_mixed_in_one_session(tmp_path: Path, repeats: str, day: str) -> None:
    for number, (name, sequence, date) in enumerate(
        (
            ("a1", "t1", "20200102"),
            ("a2", "t2", "20200102"),
            ("b1", "t1", "20210102"),
            ("b2", "flair", "20210102"),
        ),
        1,
    ):
        dicoms.series(tmp_path / "P1" / name, sequence, shape=SMALL, study=date, date=date, number=number)
    told = found(tmp_path, "{subject}/{series}", repeats=repeats)
    assert {m.path[3] for group in told.claims.values() for m in group} == {day}
    assert {(r.path[3], r.code) for r in told.refused} == {("b" if day == "a" else "a", "SESSION_MIXED")}


def test_agent_is_judged_over_the_folders_of_a_study(tmp_path: Path) -> None:
    for name, sequence, time in (
        ("pre", "t1", "100000"),
        ("gad", "t1_post", "110000"),
        ("after", "t1", "120000"),
    ):
        number = {"pre": 1, "gad": 2, "after": 3}[name]
        dicoms.series(tmp_path / "P1" / name, sequence, shape=SMALL, number=number, time=time)
    told = found(tmp_path, "{subject}/{series}")
    assert chosen(told.claims) == {("P1", "", "T1ce"): ["P1/gad"], ("P1", "", "T1w"): ["P1/pre"]}
    assert [(r.path, r.code) for r in told.refused] == [("P1/after", "AGENT_UNDECIDED")]
    declared = found(tmp_path, "{subject}/{series}", descriptions={"T1w": ["^t1 axial$"]})
    assert [m.path for m in declared.claims["P1", "", "T1w"]] == ["P1/pre", "P1/after"]


def test_folders_that_cannot_be_read_are_refused_one_by_one(tmp_path: Path) -> None:
    dicoms.series(tmp_path / "P1" / "good", shape=SMALL)
    for name, content in (("text", b"nothing"), ("broken", b"\0" * 128 + b"DICM" + b"\xff" * 900)):
        (tmp_path / "P1" / name).mkdir()
        (tmp_path / "P1" / name / "1.dcm").write_bytes(content)
    (tmp_path / "beside.dcm").write_bytes(b"fits no pattern")
    told = found(tmp_path, "{subject}/{series}")
    assert chosen(told.claims) == {("P1", "", "T1w"): ["P1/good"]}
    assert [(r.path, r.code) for r in told.refused] == [
        ("P1/broken", "DICOM_INVALID"),
        ("P1/text", "NOT_DICOM"),
    ]


def test_no_more_is_read_than_headers_of_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cranium.volume import folder

    dicoms.series(tmp_path / "P1" / "a")
    looked: list[Path] = []
    real = folder.look
    monkeypatch.setattr(folder, "look", lambda path, root: looked.append(path) or real(path, root))
    assert found(tmp_path, "{subject}/{series}").claims
    assert len(looked) == 4 < dicoms.SHAPE[2]


# ---- in a cohort ----------------------------------------------------------------------------------------------------


def card(*patterns: str, **more: Any) -> Card:
    content = phantoms.card("tiny", contrasts=("T1w", "T1ce", "T2w", "FLAIR"))
    content |= {"layouts": [layout(*patterns, **more)], "labels": {}, "groups": [], "tables": []}
    return Card.model_validate({k: v for k, v in content.items() if k != "participants"})


def test_a_cohort_of_dicom_series(tmp_path: Path) -> None:
    dicoms.nbia_tree(tmp_path, num_subjects=1)
    late = {"number": 9, "time": "130000", "subject": "UPENN-GBM-00001", "shape": SMALL}
    study = "UPENN-GBM/UPENN-GBM-00001/01-02-2020-NA-BRAIN ROUTINE-10000"
    dicoms.series(tmp_path / study / "9.000000-AX FLAIR-20009", "flair", **late)
    pattern = "UPENN-GBM/{subject}/{session}/{series}"
    table = cohort.scan(card(pattern), tmp_path)
    (session,) = table.sessions
    assert {c: s.path.rsplit("/", 1)[1].split(".")[0] for c, s in session.scans.items()} == {
        "FLAIR": "3",
        "T1ce": "7",
        "T1w": "2",
        "T2w": "4",
    }
    assert session.scans["FLAIR"].note and not session.scans["T1w"].note
    assert sorted(r.code for r in table.refused) == ["DERIVED", "LOCALIZER", "NOT_MR", "NOT_STRUCTURAL"]
    assert any(note.startswith("4 DICOM series are of another kind") for note in table.notes)
    last = cohort.scan(card(pattern, repeats="last"), tmp_path)
    assert last.sessions[0].scans["FLAIR"].path.endswith("20009")
    assert last.files != table.files, "what is read is what counts"
    grown = tmp_path / table.sessions[0].scans["T1w"].path / "1-05.dcm"
    grown.write_bytes(grown.read_bytes() + b"\0\0")
    assert cohort.scan(card(pattern), tmp_path).files != table.files


def test_a_series_is_read_where_a_file_is(tmp_path: Path) -> None:
    dicoms.series(tmp_path / "scan", "t2")
    wanted = {"T2w": normalise.Wanted("scan"), "FLAIR": normalise.Wanted("scan#0123456789ab")}
    volumes, scans, rejected = normalise.read_scans(tmp_path, wanted, {"otsu": None})
    assert volumes["T2w"].acquisition["te_ms"] == 80.0 and scans["T2w"].brain.any()
    assert rejected["FLAIR"].code == "NOT_DICOM"


def test_a_tree_without_any_scan_says_what_it_holds(tmp_path: Path) -> None:
    dicoms.series(tmp_path / "P1" / "a", "dwi", shape=SMALL)
    with pytest.raises(UserError, match="1 NOT_STRUCTURAL") as error:
        cohort.scan(card("{subject}/{series}"), tmp_path)
    assert error.value.code == "NO_SCANS"
