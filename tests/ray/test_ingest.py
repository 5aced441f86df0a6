from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import phantoms
from cranium import conform, ending, ingest, shardset, store, trust
from cranium.cards import Card
from cranium.config import Machine, UserError
from cranium.store import Artefact
from cranium.volume import nifti, normalise, shard, slices
from ingests import CARD, SPEC

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six subjects; T2w missing in three; one truncated T1w; nothing of subject 004 can be read."""
    root = phantoms.bids_tree(tmp_path_factory.mktemp("raw"), num_subjects=6)
    cut(root / "sub-002/anat/sub-002_T1w.nii.gz")
    for path in (root / "sub-004/anat").iterdir():
        path.write_bytes(b"<html>")
    return root


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture(scope="module")
def made(ray_cluster: Any, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return ingest.ingest(CARD, raw, SPEC, Machine(store=tmp_path_factory.mktemp("store")))


def rows(of: Artefact) -> Iterator[Any]:
    for entry in of.manifest()["shards"]:
        for index in range(len(entry["row_groups"])):
            table = shard.read_row_group(of.path / entry["file"], index, verify=True)
            shard.check_rows(table, entry["file"])
            yield table


def test_counts_add_up(made: Artefact) -> None:
    counts = made.manifest()["counts"]
    assert counts == {
        "scans": 15,
        "accepted": 12,
        "warned": 0,
        "rejected": 3,
        "sessions": 5,
        "subjects": 5,
        "stacks": sum(table.num_rows for table in rows(made)),
    }
    assert made.manifest()["rejections"] == {"GZ_TRUNCATED": 1, "NOT_NIFTI": 2}
    quarantine = pq.read_table(made.path / "quarantine.parquet").to_pylist()
    assert [(q["subject"], q["contrast"], q["code"]) for q in quarantine] == [
        ("002", "T1w", "GZ_TRUNCATED"),
        ("004", "FLAIR", "NOT_NIFTI"),
        ("004", "T1w", "NOT_NIFTI"),
    ]
    assert all(q["cohort"] == "phantom" and q["path"] and q["reason"] for q in quarantine)


def test_rows_are_what_the_scans_say(made: Artefact, raw: Path) -> None:
    """Pixels of a subject equal a conformation made here, by hand, from the raw files."""
    read = {
        contrast: normalise.masked(
            nifti.read(raw / f"sub-003/anat/sub-003_{contrast}.nii.gz"),
            nifti.read(raw / f"derivatives/masks/sub-003/anat/sub-003_{contrast}_mask.nii.gz"),
        )
        for contrast in phantoms.CONTRASTS
    }
    expected = normalise.conform(
        read,
        phantoms.CONTRASTS,
        size=56,
        spacing_mm=4.0,
        slice_spacing_mm=4.0,
        percentiles=SPEC.percentiles,
        min_brain=SPEC.min_brain,
    )
    of_subject = [table for table in rows(made) if table["subject"][0].as_py() == "003"]
    stacks = np.concatenate([shard.pixels(table) for table in of_subject])
    np.testing.assert_array_equal(stacks, slices.to_stacks(expected.volumes, expected.slices))
    assert [s for t in of_subject for s in t["slice"].to_pylist()] == list(expected.slices)
    (session,) = [s for s in sessions(made) if s["subject"] == "003"]
    assert session["slice_first"] == expected.slices.start and session["num_slices"] == len(expected.slices)
    np.testing.assert_allclose(json.loads(session["stack_affine"]), expected.grid.affine, atol=1e-6)
    sources = json.loads(session["sources"])
    path = "sub-003/anat/sub-003_T2w.nii.gz"
    assert sources["T2w"] == {"contrast": "T2w", "path": path, "sha256": store.sha256(raw / path)}


def sessions(of: Artefact) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = pq.read_table(of.path / "sessions.parquet").to_pylist()
    return table


def test_missing_contrasts_are_a_bit_and_a_zero_channel(made: Artefact) -> None:
    present = {s["subject"]: s["present"] for s in sessions(made)}
    assert present == {"001": 0b111, "002": 0b110, "003": 0b111, "005": 0b101, "006": 0b101}
    for table in rows(made):
        expected = present[table["subject"][0].as_py()]
        assert set(table["present"].to_pylist()) == {expected}
        channels = shard.pixels(table).any(axis=(0, 2, 3, 4))
        assert channels.tolist() == [bool(expected >> i & 1) for i in range(3)]
    assert made.manifest()["missing"] == {"T1w": 1, "T2w": 2, "FLAIR": 0}


def test_order_and_manifest(made: Artefact) -> None:
    keys = [
        key for t in rows(made) for key in zip(t["subject"].to_pylist(), t["slice"].to_pylist(), strict=True)
    ]
    assert keys == sorted(keys)
    manifest = made.manifest()
    assert manifest["channels"] == ["T1w", "T2w", "FLAIR"] and manifest["shape"] == [3, 1, 56, 56]
    assert manifest["simulated"] is True and manifest["stage"] == "ingest"
    listed = {entry["file"] for entry in manifest["shards"]}
    assert len(listed) > 1  # 1 MB shards of about 240 kB a session
    assert {f"shards/{p.name}" for p in (made.path / "shards").iterdir()} == listed
    for entry in manifest["shards"]:
        path = made.path / entry["file"]
        assert store.sha256(path) == entry["sha256"] and path.stem == entry["sha256"][:16]
        assert path.stat().st_size == entry["bytes"]
        assert [g["rows"] for g in entry["row_groups"]] == list(shard.read_footer(path).row_groups)
    first = {s["subject"]: s["slice_first"] for s in sessions(made)}
    for entry in manifest["shards"]:
        for group in entry["row_groups"]:
            assert group["first_slice"] == first[group["subject"]]  # one row group a session here
    assert sorted(p.name for p in made.path.iterdir()) == [
        "manifest.json",
        "quarantine.parquet",
        "records.parquet",
        "sessions.parquet",
        "shards",
        "verified.json",
    ]


def test_what_is_known_of_a_session_stands_beside_it(made: Artefact) -> None:
    second = sessions(made)[1]
    known = {key: second[key] for key in ("cohort", "session", "age", "sex", "site", "head", "condition")}
    assert known == {
        "cohort": "phantom",
        "session": "",
        "age": 57.0,
        "sex": "M",
        "site": "site1",
        "head": "head1",
        "condition": "lesion",
    }


def test_again_is_at_once_and_elsewhere_is_the_same(made: Artefact, raw: Path, machine: Machine) -> None:
    before = time.perf_counter()
    again = ingest.ingest(CARD, raw, SPEC, Machine(store=made.path.parents[1]))
    assert time.perf_counter() - before < 1
    assert again == made
    one_worker = SPEC.model_copy(update={"compute": SPEC.compute.model_copy(update={"num_workers": 1})})
    other = ingest.ingest(CARD, raw, one_worker, machine)
    assert other.path.name == made.path.name
    assert other.manifest() == made.manifest()


def test_a_changed_file_or_setting_is_another_artefact(made: Artefact, raw: Path, machine: Machine) -> None:
    neighbours = SPEC.model_copy(update={"stack": "neighbours", "contrasts": ("FLAIR",), "codec": "zstd"})
    other = ingest.ingest(CARD, raw, neighbours, machine)
    assert other.path.name != made.path.name
    assert other.manifest()["shape"] == [1, 3, 56, 56] and other.manifest()["channels"] == ["FLAIR"]
    assert other.manifest()["counts"]["scans"] == 6
    for table in rows(other):
        stacks = shard.pixels(table)
        np.testing.assert_array_equal(stacks[1:, 0, 0], stacks[:-1, 0, 1])


def test_masks_are_shared_or_asked_for(ray_cluster: Any, tmp_path: Path, machine: Machine) -> None:
    root = phantoms.bids_tree(tmp_path, num_subjects=3, missing=(), tilt=False)
    masks = root / "derivatives/masks"
    (masks / "sub-001/anat/sub-001_T2w_mask.nii.gz").unlink()
    shutil.rmtree(masks / "sub-002")
    cut(masks / "sub-003/anat/sub-003_FLAIR_mask.nii.gz")
    made = ingest.ingest(CARD, root, SPEC, machine)
    counts = made.manifest()["counts"]
    assert (counts["accepted"], counts["warned"], counts["rejected"], counts["scans"]) == (4, 1, 4, 9)
    assert made.manifest()["rejections"] == {"MASK_MISSING": 3, "GZ_TRUNCATED": 1}
    (note,) = json.loads(sessions(made)[0]["warnings"])
    assert (note["contrast"], note["code"]) == ("T2w", "MASK_SHARED")
    fallback = ingest.ingest(CARD, root, SPEC.model_copy(update={"mask": ("otsu",)}), machine)
    assert fallback.manifest()["counts"]["warned"] == 9


def test_channel_map_is_declared_and_recorded(ray_cluster: Any, tmp_path: Path, machine: Machine) -> None:
    root = phantoms.bids_tree(tmp_path, num_subjects=2, contrasts=("T1ce", "FLAIR"), missing=())
    card = Card.model_validate(phantoms.card(contrasts=("T1ce", "FLAIR")))
    made = ingest.ingest(card, root, SPEC.model_copy(update={"channel_map": {"T1w": "T1ce"}}), machine)
    assert [s["present"] for s in sessions(made)] == [0b101, 0b101]
    assert json.loads(sessions(made)[0]["sources"])["T1w"]["contrast"] == "T1ce"


def test_what_the_user_can_mend(ray_cluster: Any, tmp_path: Path, machine: Machine) -> None:
    root = phantoms.bids_tree(tmp_path, num_subjects=1, missing=())
    with pytest.raises(UserError, match=r"no `mask` in") as error:
        ingest.ingest(Card.model_validate(phantoms.card(masks=False)), root, SPEC, machine)
    assert error.value.code == "NO_MASK"
    with pytest.raises(UserError, match="none of PDw") as error:
        ingest.ingest(CARD, root, SPEC.model_copy(update={"contrasts": ("PDw",)}), machine)
    for path in (root / "sub-001/anat").iterdir():
        cut(path)
    with pytest.raises(UserError, match="GZ_TRUNCATED") as error:
        ingest.ingest(CARD, root, SPEC, machine)
    assert (error.value.code, error.value.exit_code) == ("NOTHING_LEFT", 3)
    assert store.find(machine.store, "ingest") == []


def test_a_bug_stays_a_bug(ray_cluster: Any, raw: Path, machine: Machine) -> None:
    broken = SPEC.model_copy(update={"percentiles": ("low", "high")})  # no scan is to blame for this
    with pytest.raises(Exception, match="str"), contextlib.suppress(UserError):
        ingest.ingest(CARD, raw, broken, machine)
    assert store.find(machine.store, "ingest") == []


def test_a_full_disk_is_said(
    ray_cluster: Any, raw: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shardset.pq, "write_table", full)
    with pytest.raises(UserError, match="No space left") as error:
        ingest.ingest(CARD, raw, SPEC, machine)
    assert (error.value.code, error.value.exit_code) == ("NO_SPACE", 1)
    assert store.find(machine.store, "ingest") == []


def test_a_disk_that_fills_in_a_task_is_said(ray_cluster: Any, machine: Machine) -> None:
    job = conform.Job("phantom", machine.store, machine.store, SPEC)
    with pytest.raises(OSError, match="No space left") as error:
        list(ingest._on_ray([{"index": 0}], _fill, job))
    assert error.value.errno in ingest.FULL


def _fill(row: dict[str, Any], job: Any) -> dict[str, Any]:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_a_task_refuses_is_said_as_it_was_raised(
    ray_cluster: Any, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code, mend and exit code of an error that a user can mend survive Ray's wrapping, on one line."""
    job = conform.Job("phantom", machine.store, machine.store, SPEC)

    def work() -> ending.Outcome:
        return ending.Outcome(len(list(ingest._on_ray([{"index": 0}], _refuse, job))), {})

    with pytest.raises(SystemExit) as ended:
        ending.finish("ingest", work, as_json=False, debug=False)
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err.splitlines()[-1] == "error TEMPLATE: /data/t.nii cannot be used; give another"
    )


def _refuse(row: dict[str, Any], job: Any) -> dict[str, Any]:
    raise UserError("TEMPLATE", "/data/t.nii cannot be used; give another")


HOLD = """
import signal, sys
from pathlib import Path
from cranium import store
folder = Path(sys.argv[1])
with store.lock(folder, sys.argv[2]):
    (folder / "held").touch()
    signal.pause()
"""


def test_one_writer_at_a_time(ray_cluster: Any, raw: Path, made: Artefact, machine: Machine) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(machine.store), made.id])
    try:
        while not (machine.store / "held").exists():
            assert holder.poll() is None, "the other process could not take the lock"
            time.sleep(0.05)
        with pytest.raises(UserError) as error:
            ingest.ingest(CARD, raw, SPEC, machine)
        assert error.value.code == "BUSY"
    finally:
        holder.kill()
        holder.wait()
    assert ingest.ingest(CARD, raw, SPEC, machine).manifest() == made.manifest()  # its lock died with it


@pytest.mark.parametrize("after", ["session", "shard"])
def test_an_ingest_that_stopped_half_way_goes_on(
    ray_cluster: Any, raw: Path, made: Artefact, machine: Machine, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """What is left of a killed run: some records, parts and shards, a stray file; never a manifest."""

    def stop(done: int, total: int, text: str) -> None:
        if ("sessions read" if after == "session" else "shards written") in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest.ingest(CARD, raw, SPEC, machine, stop)
    assert store.find(machine.store, "ingest") == []
    folder = machine.store / "ingest" / made.path.name
    records = {p: p.stat().st_mtime_ns for p in (folder / "work").glob("0*.json")}
    assert records
    (folder / "shards" / "0123456789abcdef.parquet").write_bytes(b"left by a killed packer")
    finished = ingest.ingest(CARD, raw, SPEC, machine)
    assert finished.manifest() == made.manifest()
    assert trust.verify(finished) == [] and not (folder / "work").exists()
