"""Rows to sessions: ids spelt otherwise, scans as keys, dated visits, cross-sheets, small rules."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

import phantoms
from cranium import clinical
from cranium.cards import Card, Column, Visit
from cranium.clinical import Known
from cranium.config import UserError
from cranium.tables import Folder


def joined(
    root: Path, sessions: list[Known], *specs: dict[str, Any], layout: str | None = None, **files: str
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    for name, text in files.items():
        (root / f"{name}.csv").write_text(text)
    content = phantoms.card("tiny", contrasts=("T1w",)) | {"labels": {}, "groups": [], "tables": list(specs)}
    content["layouts"] = [content["layouts"][0] | {"name": "one"}, content["layouts"][0] | {"name": "two"}]
    card = Card.model_validate(content)
    folder = Folder(root, sorted(p.name for p in root.iterdir()))
    _, notes = clinical.join(card, layout, sessions, [folder])
    return [session.values for session in sessions], notes


def table(file: str, **spec: Any) -> dict[str, Any]:
    return {"file": f"{file}.csv", "subject": "id", **spec}


def on(day: int, subject: str = "S1") -> Known:
    return Known(subject, f"d{day:04}", day=day)


def dated(date: str, subject: str = "S1") -> Known:
    return Known(subject, date, day=datetime.date.fromisoformat(date).toordinal(), dated=True)


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_rows_keyed_by_scan(tmp_path: Path) -> None:
    spec = table("t", ids=r"UPENN-GBM-(?P<subject>\d+)_(?P<session>\d+)", columns={"age": "Age"})
    values, notes = joined(
        tmp_path,
        [Known("00001", "11"), Known("00001", "21"), Known("00002", "11")],
        spec,
        t="id,Age\nUPENN-GBM-00001_11,60\nUPENN-GBM-00001_21,62.5\nbad id,1\n",
    )
    assert values == [{"age": 60.0}, {"age": 62.5}, {"age": None}]
    assert notes == (
        "1 subjects have no row in t.csv: <00002>",
        "1 rows of t.csv have ids of another form, such as bad id",
    )


def test_ids_with_other_zeros_are_one_number_only_if_declared(tmp_path: Path) -> None:
    ids = r"UCSF-PDGM-(?P<subject>\d+)(_(?P<session>FU\w+))?"
    rows = "id,Grade\nUCSF-PDGM-004,4\nUCSF-PDGM-0433_FU007d,3\nUCSF-PDGM-433,2\n"
    sessions = [Known("0004", ""), Known("0433", ""), Known("0433", "FU007d")]
    values, notes = joined(
        tmp_path, sessions, table("t", ids=ids, numbers=True, columns={"grade": "Grade"}), t=rows
    )
    assert [v["grade"] for v in values] == ["4", "2", "3"] and notes == ()
    values, notes = joined(tmp_path, sessions, table("t", ids=ids, columns={"grade": "Grade"}), t=rows)
    assert [v["grade"] for v in values] == [None, None, "3"]


def test_a_cross_sheet_gives_the_key_of_the_next_table_and_is_not_kept(tmp_path: Path) -> None:
    values, notes = joined(
        tmp_path,
        [Known("002_S_0413", "a", {"image": "I863056"}), Known("003_S_0001", "a")],
        table("list", keys={"IMAGE": "image"}, columns={"_rid": "RID"}),
        table("dx", subject=None, keys={"RID": "_rid"}, columns={"diagnosis": "DX"}),
        list="id,IMAGE,RID\n002_S_0413,I1,7\n002_S_0413,I863056,0413\n",
        dx="RID,DX\n413,CN\n7,AD\n",
    )
    assert values == [{"diagnosis": "CN"}, {"diagnosis": None}]
    assert notes == (
        "1 subjects have no row in list.csv: <003_S_0001>",
        "1 subjects have no row in dx.csv: <003_S_0001>",
    )


def test_later_tables_fill_only_what_is_absent(tmp_path: Path) -> None:
    one = table("one", columns={"age": "Age", "sex": "Sex"})
    two = table("two", columns={"sex": "Sex", "site": "Site"})
    values, _ = joined(
        tmp_path, [Known("S1", "")], one, two, one="id,Age,Sex\nS1,60,\n", two="id,Sex,Site\nS1,F,x\n"
    )
    assert values == [{"age": 60.0, "sex": "F", "site": "x"}]


def test_tables_of_another_layout_are_left_alone(tmp_path: Path) -> None:
    specs = [table("t", layout="one", columns={"dx": "A"}), table("t", layout="two", columns={"dx": "B"})]
    values, _ = joined(tmp_path, [Known("S1", "")], *specs, layout="two", t="id,A,B\nS1,a,b\n")
    assert values == [{"dx": "b"}]


def test_a_missing_table_is_refused_or_noted(tmp_path: Path) -> None:
    spec = table("none", columns={"age": "Age"})
    with pytest.raises(UserError, match=r"none.csv is missing.*raw.tiny_tables=DIR") as refused:
        joined(tmp_path, [Known("S1", "")], spec)
    assert refused.value.code == "NO_TABLE"
    values, (note,) = joined(tmp_path, [Known("S1", "")], spec | {"optional": True})
    assert values == [{"age": None}] and "none.csv is missing, so age are absent" in note


def test_rows_of_others_are_not_even_parsed(tmp_path: Path) -> None:
    spec = table("t", columns={"age": "Age"})
    values, _ = joined(tmp_path, [Known("S1", "")], spec, t="id,Age\nS2,old\nS1,60\n")
    assert values == [{"age": 60.0}]


def test_a_file_for_every_subject(tmp_path: Path) -> None:
    for subject, dx in (("01", "CN"), ("02", "AD")):
        folder = tmp_path / f"sub-{subject}"
        folder.mkdir()
        (folder / f"sub-{subject}_sessions.tsv").write_text(
            f"session_id\tdiagnosis\nses-M000\t{dx}\nses-M012\tMCI\n"
        )
    spec = {
        "file": "sub-{subject}/sub-{subject}_sessions.tsv",
        "session": "session_id",
        "columns": {"dx": "diagnosis"},
    }
    card = Card.model_validate(phantoms.card("tiny") | {"labels": {}, "groups": [], "tables": [spec]})
    sessions = [Known("01", "M000"), Known("01", "M012"), Known("02", "M000"), Known("03", "M000")]
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.tsv"))
    read, notes = clinical.join(card, None, sessions, [Folder(tmp_path, files)])
    assert [s.values["dx"] for s in sessions] == ["CN", "MCI", "AD", None]
    assert [p.name for p in read] == ["sub-01_sessions.tsv", "sub-02_sessions.tsv"]
    assert notes == ("1 subjects have no row in sub-{subject}/sub-{subject}_sessions.tsv: <03>",)


# ---- dated visits ---------------------------------------------------------------------------------------------------

DAYS = table(
    "dx", visit={"column": "days", "within_days": 180}, columns={"dx": {"column": "DX", "missing": ["-4"]}}
)
VISITS = "id,days,DX\nS1,0,CN\nS1,400,MCI\nS1,700,AD\nS2,0,CN\nS2,,AD\n"


@pytest.mark.parametrize(
    ("day", "dx"),
    [
        (0, "CN"),
        (180, "CN"),
        (181, None),
        (199, None),
        (220, "MCI"),
        (549, "MCI"),
        (551, "AD"),
        (880, "AD"),
        (881, None),
    ],
)
def test_the_nearest_visit_within_so_many_days(tmp_path: Path, day: int, dx: str | None) -> None:
    values, notes = joined(tmp_path, [on(day)], DAYS, dx=VISITS)
    assert values == [{"dx": dx}]
    far = f"1 sessions have no visit within 180 days in dx.csv: <S1 d{day:04}>"
    assert notes == (() if dx else (far,))


def test_two_visits_equally_near_give_none_unless_they_agree(tmp_path: Path) -> None:
    values, notes = joined(tmp_path, [on(550), on(550, "S3")], DAYS, dx=VISITS + "S3,450,CN\nS3,650,CN\n")
    assert values == [{"dx": None}, {"dx": "CN"}]
    assert notes == ("1 sessions lie between two visits that differ in dx.csv, none taken: <S1 d0550>",)


def test_visits_that_say_nothing_are_passed_over(tmp_path: Path) -> None:
    values, _ = joined(tmp_path, [on(100)], DAYS, dx="id,days,DX\nS1,90,-4\nS1,101,\nS1,130,MCI\n")
    assert values == [{"dx": "MCI"}]


def test_a_session_that_is_not_dated_takes_no_visit(tmp_path: Path) -> None:
    values, notes = joined(tmp_path, [Known("S1", "M000"), dated("2010-01-01")], DAYS, dx=VISITS)
    assert [v["dx"] for v in values] == [None, None] and notes[0].startswith("2 sessions have no visit")


def test_visits_by_date_in_any_of_the_declared_forms(tmp_path: Path) -> None:
    visit = {"column": "EXAMDATE", "dates": ["%Y-%m-%d", "%m/%d/%Y"], "within_days": 30}
    rows = "id,EXAMDATE,DX\nS1,2010-01-20,CN\nS1,2/10/2011,MCI\n"
    sessions = [dated("2010-01-01"), dated("2011-02-28"), dated("2012-01-01")]
    values, _ = joined(tmp_path, sessions, table("dx", visit=visit, columns={"dx": "DX"}), dx=rows)
    assert [v["dx"] for v in values] == ["CN", "MCI", None]
    with pytest.raises(UserError, match=r"line 2: `20.1.2010` is no date of the form %Y-%m-%d or %m/%d/%Y"):
        joined(
            tmp_path,
            sessions,
            table("dx", visit=visit, columns={"dx": "DX"}),
            dx="id,EXAMDATE,DX\nS1,20.1.2010,CN\n",
        )


def test_a_scan_list_dates_the_session_for_visits_in_three_columns(tmp_path: Path) -> None:
    scans = table("mri", keys={"N": "session"}, columns={"_date": "when"})
    visit = {"column": ["Y", "M", "D"], "dates": "%Y-%m-%d", "within_days": 90, "at": "_date"}
    values, _ = joined(
        tmp_path,
        [Known("S1", "01"), Known("S1", "02")],
        scans,
        table("dx", visit=visit, columns={"dx": "DX"}),
        mri="id,N,when\nS1,1,2010-05-01\nS1,2,2012-05-01\n",
        dx="id,Y,M,D,DX\nS1,2010,4,9,CN\nS1,2012,6,1,AD\n",
    )
    assert values == [{"dx": "CN"}, {"dx": "AD"}]


def test_age_at_scan_is_age_at_entry_and_the_days_since(tmp_path: Path) -> None:
    spec = table("t", columns={"age": {"column": "AgeatEntry", "plus_session_days": True}})
    values, _ = joined(
        tmp_path, [on(0), on(3653), Known("S1", "x"), on(0, "S2")], spec, t="id,AgeatEntry\nS1,65.149\nS2,\n"
    )
    assert [v["age"] for v in values] == [65.15, 75.15, None, None]


# ---- rules of a column ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("1", "M"),
        ("2.0", "F"),
        ("3", "3"),
        ("-4", None),
        ("-4.0", None),
        ("888", None),
        ("n/a", None),
        (" ", None),
    ],
)
def test_codes_and_missing_codes(cell: str, value: str | None) -> None:
    spec = Column(column="SEX", values={"1": "M", "2": "F"}, missing=("-4", "888"))
    assert clinical.value_of("sex", spec, {"SEX": cell}, "here") == value


CASES = {
    "CN": [{"NORMCOG": ["1"]}],
    "AD": [{"DEMENTED": "1", "PROBAD": "1"}, {"DEMENTED": "1", "alzdis": "1", "alzdisif": "1"}],
}


@pytest.mark.parametrize(
    ("cells", "value"),
    [
        ("1,0,,,", "CN"),
        ("1.0,1,1,,", "CN"),  # the first that fits
        ("0,1,1,,", "AD"),
        ("0,1,0,1,1", "AD"),
        ("0,1,0,1,2", None),
        ("0,0,1,,", None),
        (",,,,", None),
    ],
)
def test_cases_over_several_columns(cells: str, value: str | None) -> None:
    spec = Column.model_validate({"cases": CASES})
    assert spec.needs == ("NORMCOG", "DEMENTED", "PROBAD", "alzdis", "alzdisif")
    row = dict(zip(spec.needs, cells.split(","), strict=True))
    assert clinical.value_of("dx", spec, row, "here") == value


def test_a_number_that_is_none_is_named_with_its_line() -> None:
    with pytest.raises(UserError, match=r"t\.csv line 3: age `old` is no number"):
        clinical.value_of("age", Column(column="a"), {"a": "old"}, "t.csv line 3")
    with pytest.raises(UserError, match="`x` is no number of days"):
        clinical.day_of(Visit(column=("d",), within_days=1), {"d": "x"}, "here")
