from __future__ import annotations

import pytest

from cranium.config import UserError
from cranium.patterns import compile_pattern, render

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


def test_rendering_inverts_matching() -> None:
    path = "sub-01/ses-a/anat/sub-01_ses-a_run-2_T1w.nii.gz"
    assert render(FILES, {"subject": "01", "session": "a", "run": "2"}) == path
    assert render(FILES, {"subject": "01"}) == "sub-01/anat/sub-01_T1w.nii.gz"
    assert render(FILES, {"session": "a"}) is None
