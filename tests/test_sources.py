"""Whether files are still the same: what their look and their content say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cranium import cohort, sources

WANTED: dict[str, Any] = {
    "scans": {"T1w": ("T1w", "a", None, None), "T2w": ("T2w", "b/t2.nii", "b/mask.nii", None)},
    "segmentation": "c/labels.nii",
}


def tree(root: Path) -> Path:
    """A DICOM series of two files beside a scan, its mask and a label map."""
    for name in ("a/1.dcm", "a/2.dcm", "b/t2.nii", "b/mask.nii", "c/labels.nii", "b/t2.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def look(root: Path) -> str:
    walked = list(cohort._walk(root, []))
    files = tuple((path, size) for path, size, _ in walked)
    times = {path: time for path, _, time in walked}
    layout = cohort.Layout(files={"T1w": "{subject}.nii"}, unverified=True)
    return sources.Listing(cohort.CohortTable(root, layout, (), (), files, (), (), times=times)).look(WANTED)


def test_every_file_of_a_session_counts(tmp_path: Path) -> None:
    root = tree(tmp_path)
    assert sources.paths(WANTED) == ["a", "b/mask.nii", "b/t2.nii", "c/labels.nii"]
    seen, held = {look(root)}, {sources.content(root, WANTED)}
    for number, name in enumerate(("a/2.dcm", "b/t2.nii", "b/mask.nii", "c/labels.nii", "b/t2.json"), 2):
        os.utime(root / name, (1, 1))
        seen.add(look(root))
        assert sources.content(root, WANTED) in held
        (root / name).write_text(name.upper())
        held.add(sources.content(root, WANTED))
        assert len(seen) == len(held) == number
    (root / "a/3.dcm").write_text("")
    assert look(root) not in seen and sources.content(root, WANTED) not in held


def test_what_was_hashed_in_reading_is_not_read_again(tmp_path: Path) -> None:
    root = tree(tmp_path)
    expected = sources.content(root, WANTED)
    known = {"b/t2.nii": sources._hash(root / "b/t2.nii")}
    (root / "b/t2.nii").unlink()
    assert sources.content(root, WANTED, known) == expected != sources.content(root, WANTED)


def test_what_cannot_be_read_has_a_content_too(tmp_path: Path) -> None:
    """A pipe would block whoever opens it."""
    root = tree(tmp_path)
    (root / "b/mask.nii").unlink()
    gone = sources.content(root, WANTED)
    os.mkfifo(root / "b/mask.nii")
    assert sources.content(root, WANTED) == gone
