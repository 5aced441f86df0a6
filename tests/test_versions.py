"""A version over the shards of an earlier one; a set without a subject: what is read, linked, written and removed."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import ingests
import phantoms
from cranium import conform, ingest, place, sources, store, trust, versions
from cranium.config import Machine, UserError
from cranium.store import Artefact
from cranium.volume import shard

SUBJECTS = 7  # two shards of four and three sessions, the second above half of a shard


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`all`, nine subjects; one file of 002 cannot be read."""
    root = tmp_path_factory.mktemp("trees")
    whole = phantoms.bids_tree(
        root, "all", num_subjects=SUBJECTS + 2, contrasts=("T1w", "T2w"), missing=(), tilt=False
    )
    path = whole / "sub-002/anat/sub-002_T1w.nii.gz"
    path.write_bytes(path.read_bytes()[:-100])
    return root


@pytest.fixture(scope="module")
def first(trees: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """The first version: seven subjects, their tree and store below one folder."""
    root = tmp_path_factory.mktemp("first")
    tree(trees, root / "raw", range(1, SUBJECTS + 1))
    return ingests.plainly(root / "raw", Machine(store=root / "store"))


@pytest.fixture
def home(first: Artefact, tmp_path: Path) -> Path:
    shutil.copytree(first.path.parents[2], tmp_path, dirs_exist_ok=True)
    return tmp_path


def tree(trees: Path, raw: Path, numbers: Any) -> None:
    """Add subjects to a raw folder, with their times."""
    for number in numbers:
        for folder in ("", "derivatives/masks/"):
            name = f"{folder}sub-{number:03}"
            shutil.copytree(trees / "all" / name, raw / name, dirs_exist_ok=True)
    shutil.copy2(trees / "all" / "participants.tsv", raw)


def again(
    home: Path, monkeypatch: pytest.MonkeyPatch, spec: Any = ingests.SPEC
) -> tuple[Artefact, list[str]]:
    """Ingest once more; the subjects whose scans were read for it."""
    read: list[str] = []
    real = conform.session

    def watched(row: dict[str, Any], job: Any) -> dict[str, Any]:
        read.append(json.loads(row["session"])["subject"])
        return real(row, job)

    monkeypatch.setattr(conform, "session", watched)
    return ingests.plainly(home / "raw", Machine(store=home / "store"), spec), read


def rows(of: Artefact) -> dict[tuple[str, str], np.ndarray]:
    """The stacks of every session, checked against their CRC."""
    found = {}
    manifest = of.manifest()
    for entry in manifest["shards"]:
        for index, group in enumerate(entry["row_groups"]):
            table = shard.read_row_group(of.path / entry["file"], index)
            shard.check_rows(table, entry["file"])
            assert table["slice"][0].as_py() == group["first_slice"] and table.num_rows == group["rows"]
            found[group["subject"], group["session"]] = shard.pixels(table)
    return found


def same_rows(one: Artefact, other: Artefact) -> None:
    a, b = rows(one), rows(other)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def facts(of: Artefact) -> dict[str, Any]:
    """The manifest without what depends on how the shards were packed."""
    return {k: v for k, v in of.manifest().items() if k not in ("shards", "reused", "tables")}


def entries(of: Artefact) -> dict[str, int]:
    return {entry["file"]: len(entry["row_groups"]) for entry in of.manifest()["shards"]}


def test_added_subjects_are_read_and_the_others_are_not(
    home: Path,
    trees: Path,
    first: Artefact,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree(trees, home / "raw", (8, 9))
    made, read = again(home, monkeypatch)
    assert read == ["008", "009"] and made.path.name != first.path.name
    kept = entries(first).keys() & entries(made).keys()
    assert len(kept) == 2 and len(entries(made)) == 3  # both were large enough to stay as they are
    for file in kept:
        assert (made.path / file).stat().st_ino == (home / "store" / first.id / file).stat().st_ino
    assert made.manifest()["reused"] == {"from": first.id, "sessions": 7, "shards": 2}
    assert trust.verify(made) == []
    fresh = ingests.plainly(home / "raw", Machine(store=tmp_path_factory.mktemp("fresh")))
    assert facts(made) == facts(fresh) and "reused" not in fresh.manifest()
    same_rows(made, fresh)
    for name in ("sessions.parquet", "quarantine.parquet"):
        assert pq.read_table(made.path / name).equals(pq.read_table(fresh.path / name))
    store.discard(home / "store" / first.id)  # the earlier version may go
    assert trust.verify(made) == []


def test_a_small_shard_is_joined_with_what_is_new(
    home: Path, trees: Path, first: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "raw" / "sub-007/anat/sub-007_T1w.nii.gz").unlink()  # touches the second shard: 005, 006 and 007
    tree(trees, home / "raw", (8,))
    made, read = again(home, monkeypatch)
    assert read == ["007", "008"]
    assert len(entries(first).keys() & entries(made).keys()) == 1
    assert sorted(entries(made).values()) == [4, 4]  # 005 and 006 were copied beside 007 and 008
    assert rows(made).keys() == {(f"{n:03}", "") for n in range(1, 9)}
    assert {p.name for p in (made.path / "shards").iterdir()} == {Path(file).name for file in entries(made)}
    assert trust.verify(made) == []


def test_a_relabelling_rewrites_no_pixels(
    home: Path, first: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = home / "raw" / "participants.tsv"
    lines = table.read_text().splitlines()
    header = lines[0].split("\t")
    cells = lines[1].split("\t")
    cells[header.index("condition")] = "lesion"
    table.write_text("\n".join([lines[0], "\t".join(cells), *lines[2:]]) + "\n")
    made, read = again(home, monkeypatch)
    assert read == [] and made.path.name != first.path.name
    assert made.manifest()["shards"] == first.manifest()["shards"]
    new, old = (pq.read_table(of.path / "sessions.parquet").to_pylist() for of in (made, first))
    assert new[0]["condition"] == "lesion" != old[0]["condition"]
    assert new[1:] == old[1:] and new[0] | {"condition": ""} == old[0] | {"condition": ""}
    assert facts(made) == facts(first)


def test_a_removed_subject_is_gone_from_the_next_version(
    home: Path, first: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(home / "raw" / "sub-001")
    made, read = again(home, monkeypatch)
    assert read == [] and ("001", "") not in rows(made) and len(rows(made)) == 6
    assert trust.verify(made) == []


def test_what_was_only_touched_is_not_read_again(
    home: Path, trees: Path, first: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashed once, then remembered; and a next version takes it over."""
    hashed: list[str] = []
    real = sources._hash
    monkeypatch.setattr(sources, "_hash", lambda path: (hashed.append(path.name), real(path))[1])
    os.utime(home / "raw" / "sub-003/anat/sub-003_T1w.nii.gz", (1, 1))
    for known in (False, True):
        hashed.clear()
        made, read = again(home, monkeypatch)
        assert made.id == first.id and read == [] and bool(hashed) != known
    tree(trees, home / "raw", (8,))
    made, read = again(home, monkeypatch)
    assert made.id != first.id and read == ["008"] and trust.verify(made) == []


def test_other_settings_read_everything(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, read = again(home, monkeypatch, ingests.SPEC.model_copy(update={"percentiles": (1.0, 99.0)}))
    assert read == [f"{n:03}" for n in range(1, 8)] and trust.verify(made) == []


@pytest.mark.parametrize("identifiers", ["plain", "salted"])
@pytest.mark.parametrize(
    "path", ["sub-003/anat/sub-003_T1w.nii.gz", "derivatives/masks/sub-003/anat/sub-003_T1w_mask.nii.gz"]
)
def test_a_file_of_the_same_size_makes_a_version(
    home: Path, monkeypatch: pytest.MonkeyPatch, path: str, identifiers: str
) -> None:
    """Another scan or mask in the place of one, no byte longer: its session is read, and its rows are others."""
    spec = ingests.SPEC.model_copy(update={"identifiers": identifiers})
    file = home / "raw" / path
    voxels = gzip.decompress(file.read_bytes())  # after a header of 352 bytes
    before = gzip.compress(voxels, 0)
    file.write_bytes(before)
    old, _ = again(home, monkeypatch, spec)
    file.write_bytes(gzip.compress(voxels[:352] + voxels[-400:] + voxels[352:-400], 0))
    assert file.stat().st_size == len(before)
    new, read = again(home, monkeypatch, spec)
    (other,) = {
        session for session in rows(new) if not np.array_equal(rows(new)[session], rows(old)[session])
    }
    assert new.id != old.id and read == [other[0]] and trust.verify(new) == []
    reused = new.manifest()["reused"]  # of `old`, or of the set of the plain `home`, which shares as much
    assert (reused["sessions"], reused["shards"]) == (6, 1)
    found, read = again(home, monkeypatch, spec)
    assert found.id == new.id and read == []
    file.write_bytes(before)
    found, read = again(home, monkeypatch, spec)
    assert found.id == old.id and read == []


def test_a_version_half_made_of_other_files_is_begun_anew(
    home: Path, first: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = home / "raw" / "sub-003/anat/sub-003_T1w.nii.gz"
    voxels = gzip.decompress(file.read_bytes())  # after a header of 352 bytes
    file.write_bytes(gzip.compress(voxels, 0))
    monkeypatch.setattr(ingest, "_packed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ingests.plainly(home / "raw", Machine(store=home / "store"))
    monkeypatch.undo()
    file.write_bytes(gzip.compress(voxels[:352] + voxels[-400:] + voxels[352:-400], 0))
    made, read = again(home, monkeypatch)
    assert read == ["003"] and trust.verify(made) == []
    clean = ingests.plainly(home / "raw", Machine(store=home / "clean"))
    same_rows(made, clean)


def test_a_damaged_version_is_not_built_upon(
    home: Path, first: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home / "store" / first.id / first.manifest()["shards"][0]["file"]
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    (home / "raw" / "sub-007/anat/sub-007_T1w.nii.gz").unlink()
    made, read = again(home, monkeypatch)
    assert len(read) == 7 and trust.verify(made) == [] and "reused" not in made.manifest()


def test_the_choice_of_an_earlier_version_outlives_it(
    home: Path, trees: Path, first: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the shards were linked, and the earlier version removed before it goes on."""
    tree(trees, home / "raw", (8,))
    monkeypatch.setattr(ingest, "_work", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ingests.plainly(home / "raw", Machine(store=home / "store"))
    monkeypatch.undo()
    store.discard(home / "store" / first.id)
    (begun,) = versions.unfinished(home / "store", "phantom")
    made, read = again(home, monkeypatch)
    assert made == begun and read == ["008"] and trust.verify(made) == []


def test_links_fall_back_to_copies(
    home: Path, trees: Path, first: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(place.os, "link", refuse)
    tree(trees, home / "raw", (8,))
    made, read = again(home, monkeypatch)
    assert read == ["008"] and trust.verify(made) == []
    assert all((made.path / file).stat().st_nlink == 1 for file in entries(made))


# ---- without a subject ----------------------------------------------------------------------------------------------


def test_a_subject_is_taken_out_of_the_shard_that_holds_it(home: Path, first: Artefact) -> None:
    made = Artefact(home / "store" / first.id)
    others = {key: stacks for key, stacks in rows(made).items() if key[0] != "002"}
    gone = rows(made)["002", ""].shape[0]
    before = entries(made)
    taken = versions.rewrite(made, lambda subject, _: subject == "002")
    assert taken == versions.Rewritten(gone, 1, 1)
    assert trust.verify(made) == []
    left = rows(made)
    assert left.keys() == others.keys()
    for key, stacks in others.items():
        np.testing.assert_array_equal(left[key], stacks)
    assert len(before.keys() & entries(made).keys()) == 1
    counts = made.manifest()["counts"]
    assert (counts["scans"], counts["accepted"], counts["rejected"]) == (12, 12, 0)
    assert counts["subjects"] == 6 and made.manifest()["rejections"] == {}
    for path in made.path.rglob(
        "*"
    ):  # nothing of it is left: neither its name in a table nor its rows in a shard
        if path.suffix == ".parquet":
            assert "002" not in pq.read_table(path)["subject"].to_pylist(), path
    assert "002" not in json.dumps(made.manifest()["shards"])
    assert versions.rewrite(made, lambda subject, _: subject == "002") == versions.Rewritten()


def test_the_last_subject_takes_the_set_with_it(home: Path, first: Artefact) -> None:
    made = Artefact(home / "store" / first.id)
    taken = versions.rewrite(made, lambda *_: True)
    assert taken.sessions == 7 and taken.rows == first.manifest()["counts"]["stacks"]
    assert not made.path.exists()


def test_every_version_that_links_the_bytes_is_rewritten(
    home: Path, trees: Path, first: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(trees, home / "raw", (8,))
    again(home, monkeypatch)
    old = Artefact(home / "store" / first.id)
    secret = rows(old)["003", ""][10].tobytes()
    holders = [p for p in (home / "store").rglob("*.parquet") if secret in p.read_bytes()]
    assert len(holders) == 2
    for made in store.find(home / "store", "ingest"):
        versions.rewrite(made, lambda subject, _: subject == "003")
        assert trust.verify(made) == []
    assert not [p for p in (home / "store").rglob("*") if p.is_file() and secret in p.read_bytes()]


@pytest.mark.parametrize("after", range(1, 7))
def test_taking_out_goes_on_after_a_kill(
    home: Path, first: Artefact, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Stopped at every write and removal: what readers find is the old set, the new one, or refused; again mends it."""
    made = Artefact(home / "store" / first.id)
    steps = 0
    real_put, real_remove = place._put, place.remove

    def step(real: Any) -> Any:
        def counted(*arguments: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == after:
                raise KeyboardInterrupt
            real(*arguments)

        return counted

    monkeypatch.setattr(place, "_put", step(real_put))
    monkeypatch.setattr(place, "remove", step(real_remove))
    with pytest.raises(KeyboardInterrupt):
        versions.rewrite(made, lambda subject, _: subject == "002")
    monkeypatch.undo()
    try:
        trust.check(made)
    except UserError as error:
        assert error.code == "TABLE_HASH"
    versions.rewrite(made, lambda subject, _: subject == "002")
    assert trust.verify(made) == [] and ("002", "") not in rows(made)
    assert len(list((made.path / "shards").iterdir())) == 2
