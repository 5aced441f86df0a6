from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import phantoms
from cranium import cohort
from cranium.cards import Card, Label
from cranium.config import UserError

FILES = "sub-{subject}[/ses-{session}]/anat/sub-{subject}[_ses-{session}][_run-{run}]_T1w.nii.gz"
MASK = "masks/sub-{subject}[_ses-{session}][_run-{run}]_{contrast}.nii.gz"


def card(files: Any = (FILES,), mask: str | None = None, **table: Any) -> Card:
    content = phantoms.card("tiny", contrasts=("T1w",))
    content["layouts"][0] |= {"files": {"T1w": list(files)}, "mask": mask}
    content |= {"labels": {}, "groups": [], "tables": [table] if table else []}
    return Card.model_validate(content)


def tree(root: Path, *paths: str, table: bytes | None = None) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x" * len(path))
    root.mkdir(parents=True, exist_ok=True)
    if table is not None:
        (root / "participants.tsv").write_bytes(table)
    return root


def error(call: Any, code: str) -> str:
    with pytest.raises(UserError) as found:
        call()
    assert found.value.code == code
    return str(found.value)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_bids_tree(tmp_path: Path) -> None:
    root = phantoms.bids_tree(
        tmp_path, num_subjects=6, sessions=("a", "b"), shape=(11, 13, 10), spacing=(16,) * 3
    )
    table = cohort.scan(Card.model_validate(phantoms.card()), root)
    assert [(s.subject, s.session) for s in table.sessions] == [
        (f"00{i}", v) for i in range(1, 7) for v in "ab"
    ]
    assert [sorted(s.scans) for s in table.sessions[::2]] == [["FLAIR", "T1w", "T2w"]] * 3 + [
        ["FLAIR", "T1w"]
    ] * 3
    assert table.missing == {"FLAIR": 0, "T1w": 0, "T2w": 6}
    assert table.sessions[2].values == {
        "age": 57.0,
        "sex": "M",
        "site": "site1",
        "head": "head1",
        "condition": "lesion",
    }
    scan = table.sessions[0].scans["T2w"]
    assert scan.path == "sub-001/ses-a/anat/sub-001_ses-a_T2w.nii.gz"
    assert scan.mask == "derivatives/masks/sub-001/ses-a/anat/sub-001_ses-a_T2w_mask.nii.gz"
    assert dict(table.files)[scan.mask] == (root / scan.mask).stat().st_size
    assert len(table.files) == 2 * 30 and not table.refused and not table.notes


def test_the_lowest_run_is_taken_and_said(tmp_path: Path) -> None:
    root = tree(
        tmp_path, *(f"sub-01/anat/sub-01_run-{r}_T1w.nii.gz" for r in (10, 9, 2)), "masks/sub-01_T1w.nii.gz"
    )
    table = cohort.scan(card(mask=MASK), root)
    (session,) = table.sessions
    assert session.scans["T1w"].path.endswith("run-2_T1w.nii.gz")
    assert session.scans["T1w"].note == "run 2 taken of 3: the lowest"
    assert session.scans["T1w"].mask == "masks/sub-01_T1w.nii.gz"
    assert not table.refused


def test_two_files_for_one_scan(tmp_path: Path) -> None:
    plain = FILES.removesuffix(".gz")
    root = tree(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T1w.nii")
    table = cohort.scan(card((FILES, plain)), root)
    (refused,) = table.refused
    assert (refused.code, refused.path) == ("DUP_ID", "sub-01/anat/sub-01_T1w.nii")
    assert table.sessions[0].scans["T1w"].path == "sub-01/anat/sub-01_T1w.nii.gz"
    assert {path for path, _ in table.files} == {refused.path, "sub-01/anat/sub-01_T1w.nii.gz"}


def test_folders_that_are_links_are_not_entered(tmp_path: Path) -> None:
    outside = tree(tmp_path / "outside", "sub-02/anat/sub-02_T1w.nii.gz")
    root = tree(tmp_path / "raw", "sub-01/anat/sub-01_T1w.nii.gz")
    (root / "sub-02").symlink_to(outside / "sub-02")
    (root / "loop").symlink_to(root)
    found = cohort.scan(card(), root)
    assert [s.subject for s in found.sessions] == ["01"]
    assert any("2 folders that are links are not followed, such as loop, sub-02" in n for n in found.notes)
    (only := tmp_path / "only").mkdir()
    (only / "sub-02").symlink_to(outside / "sub-02")
    assert "1 folders that are links" in error(lambda: cohort.scan(card(), only), "NO_SCANS")


def test_near_collisions_are_said(tmp_path: Path) -> None:
    root = tree(tmp_path, *(f"sub-{s}/anat/sub-{s}_T1w.nii.gz" for s in ("1", "01", "10", "2")))
    (note,) = cohort.scan(card(), root).notes
    assert "<01>, <1> " in note and "10" not in note


def test_a_wrong_folder_is_one_clear_line(tmp_path: Path) -> None:
    assert "raw.tiny=DIR" in error(lambda: cohort.scan(card(), tmp_path / "none"), "NO_RAW")
    assert "it is empty" in error(lambda: cohort.scan(card(), tmp_path), "NO_SCANS")
    root = tree(tmp_path, "nested/sub-01/anat/sub-01_T1w.nii.gz", "README")
    message = error(lambda: cohort.scan(card(), root), "NO_SCANS")
    assert FILES in message and "2 files, such as nested/sub-01/anat/sub-01_T1w.nii.gz" in message


# ---- participants ---------------------------------------------------------------------------------------------------

SCANS = ("sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz")


def values(root: Path, table: bytes, **spec: Any) -> list[Any]:
    spec = {"columns": {"age": "age", "sex": "sex"}, **spec}
    found = cohort.scan(card(**spec), tree(root, *SCANS, table=table))
    return [session.values for session in found.sessions]


def test_oddities_of_tables_are_read(tmp_path: Path) -> None:
    table = (
        "\ufeffparticipant_id\tage\tsex\r\n\r\nsub-02\t89+\tn/a\r\n01\t 41.5\tF \r\nsub-99\t1\tM\r\n".encode()
    )
    assert values(tmp_path, table) == [{"age": 41.5, "sex": "F"}, {"age": 89.0, "sex": None}]


def test_commas_quotes_and_formulas_stay_text(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('id,sex,age\n01,"a, ""b""",1\n02,=cmd(),2\n')
    found = values(tmp_path, b"", file="c.csv", subject="id")
    assert [v["sex"] for v in found] == ['a, "b"', "=cmd()"]


@pytest.mark.parametrize(
    ("table", "code", "said"),
    [
        (b"participant_id\tage\tsex\nsub-01\t1\tF\nsub-02\t2\n", "TABLE", "line 3: 2 cells under 3 columns"),
        (b"participant_id\tage\tsex\nsub-01\t1\tF\tx\n", "TABLE", "line 2: 4 cells under 3 columns"),
        (b"participant_id\tage\tsex\nsub-01\told\tF\n", "TABLE", "line 2: age `old`"),
        (b"participant_id\tyears\tsex\n", "TABLE", "no column age; it has participant_id, years, sex"),
        (
            b"participant_id\tage\tsex\nsub-01\t1\tF\n01\t2\tF\n",
            "DUP_ID",
            "line 2 and participants.tsv line 3 differ",
        ),
        (b"participant_id\tage\tsex\nsub-01\t1\t\xff\n", "TABLE", "UTF-8"),
        (b"", "TABLE", "no column"),
    ],
)
def test_tables_that_cannot_be_trusted(tmp_path: Path, table: bytes, code: str, said: str) -> None:
    assert said in error(lambda: values(tmp_path, table), code)


def test_missing_tables_and_rows(tmp_path: Path) -> None:
    root = tree(tmp_path, *SCANS)
    assert "participants.tsv" in error(lambda: cohort.scan(card(columns={"age": "age"}), root), "NO_TABLE")
    assert cohort.scan(card(columns={}), root).sessions[0].values == {}
    tree(tmp_path, table=b"participant_id\tage\nsub-01\t5\n")
    found = cohort.scan(card(columns={"age": "age"}), root)
    assert found.sessions[1].values == {"age": None}
    assert found.notes == ("1 subjects have no row in participants.tsv: <02>",)
    assert error(lambda: cohort.scan(card(file="../up.tsv", columns={}), root), "PATH_ESCAPE")


def test_values_may_differ_by_session(tmp_path: Path) -> None:
    paths = [f"sub-01/ses-{s}/anat/sub-01_ses-{s}_T1w.nii.gz" for s in "ab"]
    table = b"participant_id\tvisit\tage\nsub-01\tses-a\t50\nsub-01\tb\t52\n"
    found = cohort.scan(card(session="visit", columns={"age": "age"}), tree(tmp_path, *paths, table=table))
    assert [s.values["age"] for s in found.sessions] == [50.0, 52.0]


def test_labels() -> None:
    label = Label(column="dx", classes={"control": ("0", "CN"), "patient": ("1",)})
    raw = ["0", "0.0", 0.0, "CN ", "1", "2", None, "cn"]
    assert [cohort.label_of(label, value) for value in raw] == [*["control"] * 4, "patient", None, None, None]


# ---- repeats, label maps, counts ------------------------------------------------------------------------------------

ACQ = "sub-{subject}/anat/sub-{subject}[_acq-{acq:label}][_run-{run}]_T1w.nii[.gz]"
REPEATS = ("acq-b_run-1", "acq-a_run-1", "acq-a_run-2")


def with_layout(change: dict[str, Any], **more: Any) -> Card:
    content = card((ACQ,)).model_dump(mode="json", exclude_none=True)
    content["layouts"][0] |= change
    return Card.model_validate(content | more)


@pytest.mark.parametrize(
    ("repeats", "extra", "taken"),
    [
        ("first", (), "acq-a_run-1"),
        ("last", (), "acq-a_run-2"),
        ("first", ("T1w",), "T1w"),  # without entities, so without a run: before all others
    ],
)
def test_several_acquisitions_are_repeats(
    tmp_path: Path, repeats: str, extra: tuple[str, ...], taken: str
) -> None:
    names = [*(f"{entities}_T1w" for entities in REPEATS), *extra]
    root = tree(tmp_path, *(f"sub-01/anat/sub-01_{name}.nii.gz" for name in names))
    table = cohort.scan(with_layout({"repeats": repeats}), root)
    (session,) = table.sessions
    scan = session.scans["T1w"]
    assert (
        scan.path
        == f"sub-01/anat/sub-01_{taken.removesuffix('_T1w')}{'' if taken == 'T1w' else '_T1w'}.nii.gz"
    )
    assert not table.refused and f"of {len(names)}: the " in str(scan.note)
    assert ("lowest" in str(scan.note)) == ("run" in taken and repeats == "first")


def test_a_file_is_one_claim_and_of_one_contrast(tmp_path: Path) -> None:
    path = "sub-01/anat/sub-01_acq-a_T1w.nii.gz"
    wide = "sub-{subject}/anat/sub-{subject}_{rest}.nii.gz"
    scan = (
        cohort.scan(with_layout({"files": {"T1w": [ACQ, wide]}}), tree(tmp_path, path))
        .sessions[0]
        .scans["T1w"]
    )
    assert (scan.path, scan.note) == (path, None)
    both = with_layout({"files": {"T1w": [ACQ], "T1ce": [wide]}}, contrasts=["T1w", "T1ce"])
    assert f"{path} fits patterns of T1w and of T1ce" in error(lambda: cohort.scan(both, tmp_path), "PATTERN")


def test_compressed_and_plain_are_one_scan_twice(tmp_path: Path) -> None:
    root = tree(tmp_path, *(f"sub-01/anat/sub-01_acq-a_T1w.nii{gz}" for gz in ("", ".gz")))
    table = cohort.scan(with_layout({}), root)
    assert [r.code for r in table.refused] == ["DUP_ID"] and table.sessions[0].scans["T1w"].note is None


def test_the_best_label_map_is_taken_and_belongs_to_its_session(tmp_path: Path) -> None:
    maps = ["manual/{subject}_seg.nii.gz", "auto/{subject}_approx.nii[.gz]"]
    scans = [f"sub-{s}/anat/sub-{s}_T1w.nii.gz" for s in ("01", "02", "03")]
    root = tree(tmp_path, *scans, "auto/01_approx.nii", "manual/01_seg.nii.gz", "auto/02_approx.nii.gz")
    table = cohort.scan(with_layout({"segmentation": maps}, segmentation={"tumour": [1, 4]}), root)
    assert [s.segmentation for s in table.sessions] == ["manual/01_seg.nii.gz", "auto/02_approx.nii.gz", None]
    assert {path for path, _ in table.files} == {*scans, "manual/01_seg.nii.gz", "auto/02_approx.nii.gz"}


def test_what_no_pattern_takes_is_noted(tmp_path: Path) -> None:
    names = (
        "sub-01/anat/sub-01_T1w.nii.gz",
        "seg/01.nii",
        "sub-01/anat/sub-01_T1map.nii.gz",
        "x/._y.nii.gz",
        "a.txt",
    )
    layout = {"segmentation": "seg/{subject}.nii"}
    table = cohort.scan(with_layout(layout, segmentation={"tumour": [1]}), tree(tmp_path, *names))
    assert table.notes == (
        "1 NIfTI files fit no pattern of the card, such as sub-01/anat/sub-01_T1map.nii.gz",
    )


def test_other_counts_than_published_are_noted(tmp_path: Path) -> None:
    root = tree(tmp_path, *(f"sub-{s}/anat/sub-{s}_T1w.nii.gz" for s in ("01", "02")))
    expected = {"subjects": 2, "scans": 5, "source": "a paper"}
    assert cohort.scan(with_layout({}, expected=expected), root).notes == (
        "2 scans found, 5 are in the published collection (a paper)",
    )


def test_tables_may_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    root = tree(tmp_path / "raw", *SCANS)
    given = tree(tmp_path / "tables", table=b"participant_id\tage\nsub-01\t5\nsub-02\t6\n")
    table = cohort.scan(card(columns={"age": "age"}), root, given)
    assert [s.values["age"] for s in table.sessions] == [5.0, 6.0]
    assert table.tables == (given.resolve() / "participants.tsv",)
    assert "raw.tiny_tables" in error(lambda: cohort.scan(card(), root, tmp_path / "none"), "NO_RAW")


def test_the_name_of_a_session_dates_it(tmp_path: Path) -> None:
    scans = [f"sub-01/ses-{s}/anat/sub-01_ses-{s}_T1w.nii.gz" for s in ("d0000", "d0129", "x")]
    root = tree(tmp_path, *scans)
    (root / "dx.csv").write_text("id,days,dx\n01,100,MCI\n")
    spec = {
        "file": "dx.csv",
        "subject": "id",
        "visit": {"column": "days", "within_days": 90},
        "columns": {"dx": "dx"},
    }
    content = card().model_dump(mode="json", exclude_none=True) | {"tables": [spec]}
    content["layouts"][0]["when"] = r"d(?P<day>\d+)"
    table = cohort.scan(Card.model_validate(content), root)
    assert [(s.session, s.values["dx"]) for s in table.sessions] == [
        ("d0000", None),
        ("d0129", "MCI"),
        ("x", None),
    ]
