"""Artefacts: found by what shaped them, visible only when whole, never made by two at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cranium import config, store
from cranium.config import UserError


def test_an_artefact_is_named_by_what_shaped_it(tmp_path: Path) -> None:
    one = store.artefact(tmp_path, "ingest", "adni", {"a": 1, "b": [1, 2]})
    same = store.artefact(tmp_path, "ingest", "adni", {"b": (1, 2), "a": 1, "compute": {"num_workers": 9}})
    other = store.artefact(tmp_path, "ingest", "adni", {"a": 2, "b": [1, 2]})
    assert one == same != other
    assert (
        one.path.parent == tmp_path / "ingest"
        and one.path.name.startswith("adni-")
        and len(one.path.name) == 13
    )


def test_done_means_committed(tmp_path: Path) -> None:
    made = store.artefact(tmp_path, "embed", "x", 1)
    made.path.mkdir(parents=True)
    (made.path / "features").write_text("half")
    assert not made.done and store.find(tmp_path, "embed") == []
    with pytest.raises(UserError) as unfinished:
        made.manifest()
    assert unfinished.value.code == "NOT_DONE"
    store.commit(made.path, {"stage": "embed"})
    assert made.done and made.manifest()["stage"] == "embed" and store.find(tmp_path, "embed") == [made]
    store.discard(made.path)
    assert not made.path.exists()
    store.discard(made.path)  # nothing to remove is no error


@pytest.mark.parametrize(
    ("content", "code"),
    [("{", "MANIFEST"), ("[]", "MANIFEST_VERSION"), ('{"schema_version": 99}', "MANIFEST_VERSION")],
)
def test_a_damaged_or_foreign_manifest_is_refused(tmp_path: Path, content: str, code: str) -> None:
    (tmp_path / store.MANIFEST).write_text(content)
    with pytest.raises(UserError) as refused:
        store.read_manifest(tmp_path)
    assert refused.value.code == code


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    store.write_atomic(path, "old")

    def fail(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        store.write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_lock_is_exclusive_between_processes_and_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from cranium import store\n"
        "with store.lock(Path(sys.argv[1]), 'embed/x'): print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(store.__file__).parents[1])}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError) as busy, store.lock(tmp_path, "embed/x"):
        pass
    assert busy.value.code == "BUSY" and str(holder.pid) in str(busy.value)
    with store.lock(tmp_path, "embed/y"):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with store.lock(tmp_path, "embed/x"):
        pass


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert (
        store.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert config.fingerprint("abc") != store.sha256(tmp_path / "abc")  # of the JSON text, quotes included
