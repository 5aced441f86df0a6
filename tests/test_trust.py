"""Rows P1 to P5 of the fault matrix: a shard set that is not as it was committed is refused or reported, never read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import ingests
import phantoms
from cranium import cli, store, trust
from cranium.config import Machine, UserError
from cranium.store import Artefact
from cranium.volume import shard


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    raw = phantoms.bids_tree(tmp_path_factory.mktemp("raw"), num_subjects=6)
    return ingests.plainly(raw, Machine(store=tmp_path_factory.mktemp("store")))


@pytest.fixture
def copied(made: Artefact, tmp_path: Path) -> Artefact:
    shutil.copytree(made.path, tmp_path / "ingest" / made.path.name)
    return Artefact(tmp_path / "ingest" / made.path.name)


def first_shard(of: Artefact) -> Path:
    return Path(of.path / of.manifest()["shards"][0]["file"])


def damage(path: Path, how: str) -> None:
    whole = bytearray(path.read_bytes())
    match how:
        case "missing":
            path.unlink()
        case "renamed":
            path.rename(path.with_name("other.parquet"))
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(whole[:-50])
        case "longer":
            path.write_bytes(whole + b"x")
        case "another":
            shutil.copy(next(p for p in path.parent.iterdir() if p != path), path)
        case "footer":  # P3: same size, one bit of the footer's length
            whole[-8] ^= 4
            path.write_bytes(whole)
        case "flipped":  # P2: same size, same footer
            whole[len(whole) // 2] ^= 1
            path.write_bytes(whole)


def test_what_was_committed_is_found_right(copied: Artefact) -> None:
    trust.check(copied)
    assert trust.verify(copied) == []


@pytest.mark.parametrize(
    ("how", "code"),
    [
        pytest.param("missing", "SHARD_MISSING", id="P1-missing"),
        pytest.param("renamed", "SHARD_MISSING", id="P1-renamed"),
        pytest.param("empty", "SHARD_CORRUPT", id="P1-empty"),
        pytest.param("cut", "SHARD_CORRUPT", id="P3-cut"),
        pytest.param("longer", "SHARD_CORRUPT", id="P3-longer"),
        pytest.param("another", "SHARD_CORRUPT", id="P3-another"),
        pytest.param("footer", "SHARD_CORRUPT", id="P3-footer"),
    ],
)
def test_damage_is_seen_before_the_first_step(copied: Artefact, how: str, code: str) -> None:
    path = first_shard(copied)
    damage(path, how)
    with pytest.raises(UserError, match=path.name) as error:
        trust.check(copied)
    assert (error.value.code, error.value.exit_code) == (code, 1)
    assert "shard 1 of 2" in str(error.value) and "restore" in str(error.value)
    problems = trust.verify(copied)
    assert (problems[0].code, problems[0].file) == (code, f"shards/{path.name}")
    assert [p.code for p in problems[1:]] == (["SHARD_UNKNOWN"] if how == "renamed" else [])


@pytest.mark.parametrize("before", ["stamp", "no stamp"])
def test_a_changed_shard_is_hashed_before_the_first_step(copied: Artefact, before: str) -> None:
    """P2: a new time stamp makes the cheap check look at the content."""
    if before == "stamp":
        trust.check(copied)
    else:
        (copied.path / trust.VERIFIED).unlink()
    damage(first_shard(copied), "flipped")
    with pytest.raises(UserError) as error:
        trust.check(copied)
    assert error.value.code == "SHARD_HASH"
    assert [p.code for p in trust.verify(copied)] == ["SHARD_HASH"]


def test_a_change_that_keeps_its_time_trips_the_row_crc(copied: Artefact) -> None:
    """P2: the cheap check believes size, footer and time; no changed row comes out of the shard all the same."""
    trust.check(copied)
    path = first_shard(copied)
    time = path.stat().st_mtime_ns
    pixels = shard.pixels(shard.read_row_group(path, 0))[3].tobytes()
    whole = bytearray(path.read_bytes())
    whole[whole.index(pixels) + len(pixels) // 2] ^= 1
    path.write_bytes(whole)
    os.utime(path, ns=(time, time))
    trust.check(copied)
    table = shard.read_row_group(path, 0)
    with pytest.raises(shard.ShardError, match="row 3"):
        shard.check_rows(table, str(path))
    assert [p.code for p in trust.verify(copied)] == ["SHARD_HASH"]
    with pytest.raises(UserError):  # and now it is known
        trust.check(copied)


def test_the_stamp_spares_the_reading(copied: Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    trust.check(copied)  # a copy has other times: read once
    monkeypatch.setattr(shard, "read_footer", None)
    trust.check(copied)
    (copied.path / trust.VERIFIED).write_text("{")  # a damaged stamp is none
    with pytest.raises(TypeError):
        trust.check(copied)


def test_strays_are_reported_and_never_read(copied: Artefact) -> None:
    """P1 and P5: what no manifest lists does no harm; only a shard among it is worth a word."""
    shutil.copy(first_shard(copied), copied.path / "shards" / "stray.parquet")
    for name in ("_SUCCESS", ".DS_Store", "x.crc"):
        (copied.path / "shards" / name).touch()
    trust.check(copied)
    assert [(p.code, p.file) for p in trust.verify(copied)] == [("SHARD_UNKNOWN", "shards/stray.parquet")]


@pytest.mark.parametrize("name", ["sessions.parquet", "quarantine.parquet", "records.parquet"])
def test_tables_are_checked_too(copied: Artefact, name: str) -> None:
    (copied.path / name).write_bytes((copied.path / name).read_bytes()[:-1] + b"x")
    assert [(p.code, p.file) for p in trust.verify(copied)] == [("TABLE_HASH", name)]
    (copied.path / name).unlink()
    with pytest.raises(UserError) as error:
        trust.check(copied)
    assert error.value.code == "TABLE_MISSING"


def test_every_problem_is_listed_with_its_mend(copied: Artefact) -> None:
    for entry, how in zip(copied.manifest()["shards"], ("missing", "flipped"), strict=True):
        damage(copied.path / entry["file"], how)
    heard: list[tuple[int, int, str]] = []
    problems = trust.verify(copied, lambda *told: heard.append(told))
    assert [p.code for p in problems] == ["SHARD_MISSING", "SHARD_HASH"]
    assert all(p.mend.startswith("restore ") and "ingest again" in p.mend for p in problems)
    assert heard[-1][0] <= heard[-1][1] and heard[-1][2].startswith("shards/")


@pytest.mark.parametrize(
    ("content", "code", "mend"),
    [
        pytest.param(lambda m: m[: len(m) // 2], "MANIFEST", "run the stage again", id="P4-cut"),
        pytest.param(lambda m: "", "MANIFEST", "run the stage again", id="P4-empty"),
        pytest.param(
            lambda m: m.replace('"schema_version": 1', '"schema_version": 2'),
            "MANIFEST_VERSION",
            "upgrade Cranium",
            id="P4-newer",
        ),
        pytest.param(
            lambda m: m.replace('"schema_version": 1', '"schema_version": 0'),
            "MANIFEST_VERSION",
            "run the stage again",
            id="P4-older",
        ),
    ],
)
def test_a_manifest_is_read_whole_or_refused(copied: Artefact, content, code: str, mend: str) -> None:  # type: ignore[no-untyped-def]
    path = copied.path / store.MANIFEST
    path.write_text(content(path.read_text()))
    for look in (trust.check, trust.verify):
        with pytest.raises(UserError, match=mend) as error:
            look(copied)
        assert error.value.code == code


@pytest.mark.parametrize(
    "name",
    [
        "../../secret.parquet",
        "/etc/passwd",
        "C:\\x.parquet",
        "shards/%2e%2e/x.parquet",
        "shards/../x.parquet",
        "x\0",
        "x",
    ],
)
def test_a_manifest_that_names_what_is_outside_is_refused(copied: Artefact, name: str) -> None:  # X2
    path = copied.path / store.MANIFEST
    whole = json.loads(path.read_text())
    (copied.path.parent.parent / "secret.parquet").write_bytes(b"x")
    for change in ({"shards": [whole["shards"][0] | {"file": name}]}, {"tables": {name: "0" * 64}}):
        path.write_text(json.dumps(whole | change))
        for look in (trust.check, trust.verify):
            with pytest.raises(UserError, match="not written by Cranium") as refused:
                look(copied)
            assert refused.value.code == "PATH_ESCAPE"


def test_a_manifest_with_other_counts_is_reported(copied: Artefact) -> None:
    path = copied.path / store.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["counts"]["stacks"] += 1
    path.write_text(json.dumps(manifest))
    assert [p.code for p in trust.verify(copied)] == ["SHARD_ROWS"]


# ---- cranium verify -------------------------------------------------------------------------------------------------


def verified(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", *map(str, words), "--json"])
    printed = capsys.readouterr()
    return int(str(ended.value.code)), json.loads(printed.out.splitlines()[-1]), printed.err


def test_verify_takes_a_card_or_a_folder(copied: Artefact, capsys: pytest.CaptureFixture[str]) -> None:
    card = phantoms.write_card(copied.path.parents[1] / "datasets", "phantom")
    store_folder = f"store={copied.path.parents[1]}"
    for words in ((card, store_folder), (copied.path,)):
        code, facts, errors = verified(capsys, *words)
        assert (code, facts["sets"], facts["problems"], errors) == (0, [copied.id], [], "")
    one, two = copied.manifest()["shards"]
    damage(copied.path / one["file"], "missing")
    damage(copied.path / two["file"], "flipped")
    for words in ((card, store_folder), (copied.path,)):
        code, facts, errors = verified(capsys, *words)
        assert code == 1 and [p["code"] for p in facts["problems"]] == ["SHARD_MISSING", "SHARD_HASH"]
        first, second = errors.splitlines()
        assert first.startswith(f"error SHARD_MISSING: {copied.id}/{one['file']} ") and "restore" in first
        assert second.startswith(f"error SHARD_HASH: {copied.id}/{two['file']} ")


def test_verify_notes_strays_and_goes_on_past_a_bad_manifest(
    copied: Artefact, capsys: pytest.CaptureFixture[str]
) -> None:
    card = phantoms.write_card(copied.path.parents[1] / "datasets", "phantom")
    shutil.copy(first_shard(copied), copied.path / "shards" / "stray.parquet")
    code, facts, errors = verified(capsys, copied.path)
    assert code == 0 and errors.startswith("note SHARD_UNKNOWN")
    other = copied.path.with_name("phantom-00000000")
    shutil.copytree(copied.path, other)
    (other / store.MANIFEST).write_text("{")
    code, facts, errors = verified(capsys, card, f"store={copied.path.parents[1]}")
    assert code == 1 and sorted(facts["sets"]) == sorted([copied.id, "ingest/phantom-00000000"])
    assert [p["code"] for p in facts["problems"] if p["set"] != copied.id] == ["MANIFEST"]


def test_verify_of_nothing_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = phantoms.write_card(tmp_path / "datasets", "phantom")
    assert verified(capsys, card, f"store={tmp_path}")[1]["error"] == "NOT_INGESTED"
    code, facts, _ = verified(capsys, tmp_path)
    assert (code, [p["code"] for p in facts["problems"]]) == (1, ["NOT_DONE"])
