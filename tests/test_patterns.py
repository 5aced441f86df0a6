from __future__ import annotations

import pytest

from cranium.config import UserError
from cranium.patterns import belongs, compile_pattern

FILES = "sub-{subject}[/ses-{session}]/anat/sub-{subject}[_ses-{session}][_run-{run}]_T1w.nii.gz"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("sub-01/anat/sub-01_T1w.nii.gz", ("01", None, None)),
        ("sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz", ("01", "a", None)),
        ("sub-01/anat/sub-01_run-2_T1w.nii.gz", ("01", None, "2")),
        ("sub-01/ses-a/anat/sub-01_ses-a_run-2_T1w.nii.gz", ("01", "a", "2")),
        ("sub-01/anat/sub-02_T1w.nii.gz", None),
        ("sub-01/ses-a/anat/sub-01_ses-b_T1w.nii.gz", None),
        ("sub-01/ses-a/anat/sub-01_T1w.nii.gz", None),
        ("sub-01/anat/sub-01_ses-a_T1w.nii.gz", None),
        ("sub-01/anat/sub-01_acq-x_T1w.nii.gz", None),
        ("derivatives/sub-01/anat/sub-01_T1w.nii.gz", None),
        ("sub-01/anat/sub-01_T1wxnii.gz", None),
    ],
)
def test_patterns(path: str, fields: tuple[str | None, ...] | None) -> None:
    match = compile_pattern(FILES).fullmatch(path)
    assert (match.group("subject", "session", "run") if match else None) == fields


def test_patterns_of_other_collections() -> None:
    brats = compile_pattern("{subject}/{subject}_flair.nii.gz")
    match = brats.fullmatch("BraTS20_Training_001/BraTS20_Training_001_flair.nii.gz")
    assert match and match["subject"] == "BraTS20_Training_001"
    flat = compile_pattern("sub-{subject}[_run-{run}]_T1w.nii")
    assert flat.fullmatch("sub-01_run-2_T1w.nii").group("subject", "run") == ("01", "2")  # type: ignore[union-attr]


@pytest.mark.parametrize("pattern", ["sub-{subject", "a[b", "x]{subject}", "sub-{}", "anat/T1w.nii.gz"])
def test_bad_patterns(pattern: str) -> None:
    with pytest.raises(UserError) as found:
        compile_pattern(pattern)
    assert found.value.code == "PATTERN" and pattern in str(found.value)


@pytest.mark.parametrize(
    ("pattern", "path", "fields"),
    [
        (
            "sub-{subject:label}[_acq-{acq:label}]_T1w.nii",
            "sub-01_acq-hi_T1w.nii",
            {"subject": "01", "acq": "hi"},
        ),
        ("sub-{subject:label}[_acq-{acq:label}]_T1w.nii", "sub-01_acq-hi_ce-gd_T1w.nii", None),
        ("sub-{subject}[_acq-{acq:label}]_T1w.nii", "sub-01_T1w.nii", {"subject": "01", "acq": None}),
        ("I{subject:number}", "I12", {"subject": "12"}),
        ("I{subject:number}", "I12a", None),
        (
            "{subject}/{session:date}_{t}",
            "1/2017-06-21_13_2.0",
            {"subject": "1", "session": "2017-06-21", "t": "13_2.0"},
        ),
        ("{subject}/{session:date}_{t}", "1/M012_x", None),
        ("**/{subject}_T1.nii", "P1_T1.nii", {"subject": "P1"}),
        ("**/{subject}_T1.nii", "a/b/P1_T1.nii", {"subject": "P1"}),
        ("a/**/{subject}.nii", "ab/P1.nii", None),
    ],
)
def test_kinds_of_fields_and_any_folders(
    pattern: str, path: str, fields: dict[str, str | None] | None
) -> None:
    match = compile_pattern(pattern).fullmatch(path)
    assert (match.groupdict() if match else None) == fields


def test_an_unknown_kind_of_field_is_refused() -> None:
    with pytest.raises(UserError, match="number or date, not word"):
        compile_pattern("{subject:word}")


def test_what_belongs_to_a_scan() -> None:
    mask, scan = "{subject}[_{session}][_run-{run}]", {"subject": "1", "session": "a", "run": "2"}
    assert belongs({"subject": "1", "session": "a", "run": "2"}, scan, mask) == 4
    assert belongs({"subject": "1", "session": "a"}, scan, mask) == 3  # one mask for all runs
    assert belongs({"subject": "1", "session": "b"}, scan, mask) == 0
    assert belongs({"subject": "1"}, scan, mask) == 0  # of a scan without a session
    assert belongs({"subject": "1"}, scan, "{subject}") == 2  # one mask for all sessions, declared so
