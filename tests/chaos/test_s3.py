"""Shard sets in an object store: made, read, checked, shared, taken apart; killed and raced. The server is moto's."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingests
import kills
import phantoms
from cranium import ingest, place, shardset, store, trust, versions
from cranium.config import Machine, UserError
from cranium.store import Artefact
from cranium.volume import shard

pytestmark = pytest.mark.chaos
SECRET = "not-to-be-found-anywhere"


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        process = subprocess.Popen(
            [sys.executable, "-m", "s3server"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        while not (line := process.stdout.readline()).strip().isdigit():
            assert line, "the server did not start"
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.strip()}")
        yield
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def bucket(server: None, request: pytest.FixtureRequest) -> str:
    name = f"b{abs(hash(request.node.name)) % 10**9}"
    place._store().mkdir(name)
    return f"s3://{name}/lab"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.bids_tree(
        tmp_path_factory.mktemp("raw"), num_subjects=6, contrasts=("T1w",), missing=(), tilt=False
    )


@pytest.fixture(scope="module")
def local(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return ingests.plainly(raw, Machine(store=tmp_path_factory.mktemp("local")))


def objects(url: str) -> dict[str, bytes]:
    files = place._store()
    files.invalidate_cache()
    return {name.split("/lab/")[1]: files.cat_file(name) for name in files.find(url)}


def rows(of: Artefact) -> np.ndarray:
    manifest = of.manifest()
    tables = [
        shard.read_row_group(file, index)
        for file, entry in zip(shardset.files(of, manifest), manifest["shards"], strict=True)
        for index in range(len(entry["row_groups"]))
    ]
    for table in tables:
        shard.check_rows(table, "here")
    return np.concatenate([shard.pixels(table) for table in tables])


def test_a_set_in_s3_is_the_set_in_a_folder(bucket: str, raw: Path, local: Artefact, tmp_path: Path) -> None:
    machine = Machine(store=tmp_path, shards=bucket)
    made = ingests.plainly(raw, machine)
    assert made.manifest() == local.manifest()
    there = objects(bucket)
    expected = {f"{local.id}/{name}": data for name, data in ingests.content(local).items()}
    assert there == expected  # no part, no temporary object
    assert sorted(p.name for p in made.path.rglob("*")) == [
        "manifest.json", "place", "quarantine.parquet", "records.parquet", "sessions.parquet", "verified.json",
    ]  # fmt: skip
    assert shardset.files(made, made.manifest())[0].startswith(f"{bucket}/{made.id}/shards/")
    np.testing.assert_array_equal(rows(made), rows(local))
    table = shard.read_row_group(shardset.files(made, made.manifest())[0], 1, ["pixels", "crc"], verify=True)
    assert table.column_names == ["pixels", "crc"]
    trust.check(made)
    assert trust.verify(made) == []
    assert ingests.plainly(raw, machine) == made
    secrets = [p for p in tmp_path.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert secrets == [] and not [name for name, data in there.items() if SECRET.encode() in data]


def test_another_machine_finds_it_there(bucket: str, raw: Path, tmp_path: Path) -> None:
    made = ingests.plainly(raw, Machine(store=tmp_path / "one", shards=bucket))
    other = ingest.artefact(ingests.CARD, raw, ingests.SPEC, Machine(store=tmp_path / "two", shards=bucket))
    assert other.done and other.manifest() == made.manifest() and trust.verify(other) == []


@pytest.mark.parametrize(
    ("how", "checked", "verified"),
    [
        ("missing", "SHARD_MISSING", "SHARD_MISSING"),
        ("cut", "SHARD_CORRUPT", "SHARD_CORRUPT"),
        ("flipped", None, "SHARD_HASH"),
        ("stray", None, "SHARD_UNKNOWN"),
    ],
)
def test_damage_in_s3_is_seen(
    bucket: str, raw: Path, tmp_path: Path, how: str, checked: str | None, verified: str
) -> None:
    """P1, P2, P5 there; the cheap check does not fetch a changed shard to hash it: its rows' CRC stands guard."""
    made = ingests.plainly(raw, Machine(store=tmp_path, shards=bucket))
    file = shardset.files(made, made.manifest())[0]
    data = bytearray(place.read(file))
    data[len(data) // 2] ^= 1
    match how:
        case "missing":
            place.remove([file])
        case "cut":
            place.write(file, bytes(data[:-20]))
        case "flipped":
            place.write(file, bytes(data))
        case "stray":
            place.write(file.replace("shards/", "shards/0"), b"x")
    if checked is None:
        trust.check(made)
    else:
        with pytest.raises(UserError) as error:
            trust.check(made)
        assert error.value.code == checked
    assert [problem.code for problem in trust.verify(made)] == [verified]
    if how == "flipped":
        with pytest.raises(shard.ShardError):
            rows(made)


def test_versions_are_copied_inside_the_store(
    bucket: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(store=tmp_path / "store", shards=bucket)
    more = tmp_path / "more"
    shutil.copytree(raw, more)
    for number in (5, 6):
        shutil.rmtree(more / f"sub-{number:03}")
    first = ingests.plainly(more, machine)
    for number in (5, 6):
        shutil.copytree(raw / f"sub-{number:03}", more / f"sub-{number:03}")
    uploads: list[str] = []
    real = place._put
    monkeypatch.setattr(
        place, "_put", lambda beside, where, *o: (uploads.append(str(where)), real(beside, where, *o))
    )
    second = ingests.plainly(more, machine)
    assert second.manifest()["reused"] == {"from": first.id, "sessions": 4, "shards": 1}
    (kept,) = {e["file"] for e in first.manifest()["shards"]} & {
        e["file"] for e in second.manifest()["shards"]
    }
    assert not [url for url in uploads if url.endswith(kept)]  # its bytes never came here
    assert trust.verify(second) == []
    secret = rows(second)[3].tobytes()
    assert len([name for name, data in objects(bucket).items() if secret in data]) == 2
    for made in store.find(tmp_path / "store", "ingest"):
        versions.rewrite(made, lambda subject, _: subject == "001")
        assert trust.verify(made) == []
    assert not [name for name, data in objects(bucket).items() if secret in data]


def test_killed_on_the_way(bucket: str, raw: Path, local: Artefact, tmp_path: Path) -> None:
    """P7 there: killed at requests drawn with a seed, again and again; nothing is visible until all of it is."""
    processes = multiprocessing.get_context("spawn")
    machine, rng, deaths = Machine(store=tmp_path, shards=bucket), np.random.default_rng(0), 0
    target = ingest.artefact(ingests.CARD, raw, ingests.SPEC, machine)
    while True:
        process = processes.Process(
            target=kills.ingest_elsewhere, args=(raw, tmp_path, bucket, int(rng.integers(6, 16)))
        )
        process.start()
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL and deaths < 20
        deaths += 1
        if not target.done and place.absent(f"{bucket}/{target.id}/manifest.json"):
            assert store.find(tmp_path, "ingest") == []
    assert deaths >= 2
    made = ingest.artefact(ingests.CARD, raw, ingests.SPEC, machine)
    assert made.done and made.manifest() == local.manifest() and trust.verify(made) == []


def test_one_of_two_writers_wins(
    bucket: str, raw: Path, local: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P6 where no lock reaches: two stores, one place; the second is let in where the first is about to commit."""
    real, outcome = shardset.commit, []

    def late(*arguments: Any, **named: Any) -> None:
        if not outcome:
            outcome.append("started")
            outcome.append(ingests.plainly(raw, Machine(store=tmp_path / "two", shards=bucket)).id)
        real(*arguments, **named)

    monkeypatch.setattr(shardset, "commit", late)
    with pytest.raises(UserError) as error:
        ingests.plainly(raw, Machine(store=tmp_path / "one", shards=bucket))
    assert error.value.code == "BUSY" and outcome[1] == local.id
    expected = {f"{local.id}/{name}": data for name, data in ingests.content(local).items()}
    assert {n: d for n, d in objects(bucket).items() if "work" not in n.split("/")} == expected
    again = ingests.plainly(raw, Machine(store=tmp_path / "one", shards=bucket))
    assert again.manifest() == local.manifest() and trust.verify(again) == []


def test_the_server_knows_conditional_puts(bucket: str) -> None:
    """What the race above rests on: `If-None-Match: *` is honoured here (moto), as AWS S3 does since 2024-08."""
    place.write(f"{bucket}/x", b"one", create=True)
    with pytest.raises(FileExistsError):
        place.write(f"{bucket}/x", b"two", create=True)
    assert place.read(f"{bucket}/x") == b"one"


def test_what_the_user_can_mend(
    bucket: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as error:
        ingests.plainly(raw, Machine(store=tmp_path, shards="s3://no-such-bucket-here/x"))
    assert error.value.code == "S3_ACCESS" and "bucket" in str(error.value)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="pip install") as error:
        ingests.plainly(raw, Machine(store=tmp_path, shards=bucket))
    assert error.value.code == "NO_S3"


def test_a_manifest_is_json_in_s3_too(bucket: str, raw: Path, tmp_path: Path) -> None:
    made = ingests.plainly(raw, Machine(store=tmp_path, shards=bucket))
    assert json.loads(place.read(f"{bucket}/{made.id}/manifest.json")) == json.loads(
        (made.path / "manifest.json").read_text()
    )
