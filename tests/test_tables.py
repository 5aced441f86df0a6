"""Files beside the scans: which one is meant, and that it is read as it is written."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from cranium import tables
from cranium.cards import Overlap
from cranium.config import UserError
from cranium.tables import Folder


def folder(root: Path, **files: str) -> Folder:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Folder(root, sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()))


def workbook(path: Path, **sheets: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def found(names: list[str], *folders: Folder, needed: tuple[str, ...] = ("id",)) -> str | None:
    path = tables.find(names, None, needed, folders)
    return path and path.name


def test_a_dated_release_is_found_by_its_pattern(tmp_path: Path) -> None:
    here = folder(tmp_path, DXSUM_16Nov2024_dot_csv="id,DX\n", other_dot_csv="id,DX\n")
    assert found(["DXSUM_*.csv"], here) == "DXSUM_16Nov2024.csv"
    assert found(["DXSUM.csv", "DXSUM_*.csv"], here) == "DXSUM_16Nov2024.csv"
    assert found(["APOE_*.csv"], here) is None


def test_two_releases_are_refused_not_guessed(tmp_path: Path) -> None:
    here = folder(tmp_path, DXSUM_2023_dot_csv="id,DX\n", DXSUM_2024_dot_csv="id,DX\n")
    with pytest.raises(UserError, match=r"DXSUM_2023.csv, DXSUM_2024.csv.*leave one there"):
        found(["DXSUM_*.csv"], here)


def test_of_several_files_only_those_with_the_columns_count(tmp_path: Path) -> None:
    here = folder(
        tmp_path, a_dot_csv="Subject,Age\n", b_dot_csv="Subject,Sex\n", c_dot_csv="", _hidden_dot_csv="Age\n"
    )
    assert found(["*.csv"], here, needed=("Subject", "Age")) == "a.csv"


def test_the_shallowest_file_is_meant_and_a_given_folder_goes_first(tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", t_dot_tsv="id\n", derivatives__t_dot_tsv="id\n")
    given = folder(tmp_path / "given", deep__t_dot_tsv="id\n")
    assert tables.find(["t.tsv"], None, ["id"], [raw]) == tmp_path / "raw/t.tsv"
    assert tables.find(["t.tsv"], None, ["id"], [given, raw]) == tmp_path / "given/deep/t.tsv"
    assert tables.find(["derivatives/t.tsv"], None, ["id"], [raw]) == tmp_path / "raw/derivatives/t.tsv"


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    for name in ("../t.tsv", "/etc/passwd"):
        with pytest.raises(UserError) as refused:
            found([name], Folder(tmp_path, []))
        assert refused.value.code == "PATH_ESCAPE"


def test_a_workbook_reads_like_a_table(tmp_path: Path) -> None:
    date = datetime.datetime(2010, 3, 4)
    rows = [
        ["LONI_ID", "VISIT", "DATE", "DX", None],
        ["1_S_0001", 1, date, "BV", None],
        [],
        ["1_S_0002", 2.0, None, "SV"],
    ]
    path = workbook(tmp_path / "b.xlsx", Notes=[["x"]], Data=rows)
    read = list(tables.read(path, "Data", ["LONI_ID", "VISIT", "DATE", "DX"]))
    assert read == [
        (2, {"LONI_ID": "1_S_0001", "VISIT": "1", "DATE": "2010-03-04", "DX": "BV"}),
        (4, {"LONI_ID": "1_S_0002", "VISIT": "2", "DATE": "", "DX": "SV"}),
    ]
    assert tables.header(path, None) == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.tsv", b"id\tage\n1\t2\n3\n", "line 3: 1 cells under 2 columns"),
        ("t.csv", b"id,age\r\n1,2\r\n\r\n3,4,5\r\n", "line 4: 3 cells under 2 columns"),
        ("t.csv", b"id,age\n1,\xff\n", "UTF-8"),
        ("t.xlsx", b"not a workbook", "no Excel workbook"),
        ("t.csv", b"id;age\n1;2\n", "has no column id, age; it has id;age"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        list(tables.read(tmp_path / name, None, ["id", "age"]))
    assert refused.value.code == "TABLE" and said in str(refused.value)


def test_a_missing_sheet_names_those_there(tmp_path: Path) -> None:
    path = workbook(tmp_path / "b.xlsx", One=[["id"]])
    with pytest.raises(UserError, match="no sheet Two; it has One"):
        list(tables.read(path, "Two", ["id"]))


CHAIN = {
    "cohort": "ucsf_pdgm",
    "reason": "both",
    "mapping": [
        {"file": "years.csv", "have": "BraTS2020", "want": "BraTS2021"},
        {
            "file": "meta.csv",
            "have": "BraTS21 ID",
            "want": "ID",
            "want_ids": r"P-(?P<id>\d+)(_FU\w+)?",
            "digits": 4,
        },
    ],
}


def test_ids_are_translated_step_by_step(tmp_path: Path) -> None:
    here = folder(
        tmp_path,
        years_dot_csv="BraTS2020,BraTS2021\nT_001,B_1\nT_002,B_2\nT_003,N/A\nT_004,B_4\n",
        meta_dot_csv="ID,BraTS21 ID\nP-004,B_1\nP-0004_FU1d,B_1\nP-007,\nother,B_2\nP-009,B_4\n",
    )
    overlap = Overlap.model_validate(CHAIN)
    assert tables.translate(overlap, ["T_001", "T_002", "T_003", "T_005"], [here]) == {"T_001": ("0004",)}
    (tmp_path / "meta.csv").unlink()
    assert tables.translate(overlap, ["T_001"], [folder(tmp_path)]) is None
    assert tables.translate(Overlap(cohort="x", reason="y"), ["T_001"], [here]) is None
