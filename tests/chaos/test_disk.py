"""Rows P8, R9: a full, limited or read-only disk is said, nothing half-written stays, what was there is intact."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import ingests
import phantoms
import pretrainings
from cranium import checkpoint, pretrain, restart, store, trust
from cranium.config import Machine, UserError
from cranium.store import Artefact
from shards import shard_set

pytestmark = pytest.mark.chaos


def mount(folder: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`new` has four subjects more than `old`: 0.25 MB a session, so about 1.7 MB of parts and as much of shards."""
    root = tmp_path_factory.mktemp("trees")
    new = phantoms.bids_tree(root, "new", num_subjects=7, contrasts=("T1w",), missing=(), tilt=False)
    shutil.copytree(new, root / "old")
    for number in range(4, 8):
        shutil.rmtree(root / "old" / f"sub-{number:03}")
    return root


@pytest.fixture(scope="module")
def expected(trees: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return ingests.content(ingests.plainly(trees / "new", Machine(store=tmp_path_factory.mktemp("calm"))))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if not mount(folder, "size=16m"):
        pytest.skip("a small disk can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_file()]


@pytest.mark.parametrize("kilobytes", [4, 200, 900, 1800, 2500])
def test_a_full_disk(small: Path, trees: Path, expected: dict[str, bytes], kilobytes: int) -> None:
    """Full from the start, among the parts, or among the shards; with more space it goes on."""
    assert mount(small, f"remount,size={kilobytes}k")
    with pytest.raises(UserError) as error:
        ingests.plainly(trees / "new", Machine(store=small))
    assert (error.value.code, error.value.exit_code) == ("NO_SPACE", 1) and "free space" in str(error.value)
    assert store.find(small, "ingest") == [] and hidden(small) == []
    assert mount(small, "remount,size=16m")
    assert ingests.content(ingests.plainly(trees / "new", Machine(store=small))) == expected


def test_an_older_version_is_intact(small: Path, trees: Path) -> None:
    old = ingests.plainly(trees / "old", Machine(store=small))
    was = ingests.content(old)
    used = sum(path.stat().st_size for path in small.rglob("*") if path.is_file())
    assert mount(small, f"remount,size={used // 1024 + 400}k")
    with pytest.raises(UserError) as error:
        ingests.plainly(trees / "new", Machine(store=small))
    assert error.value.code == "NO_SPACE"
    assert store.find(small, "ingest") == [old] and trust.verify(old) == [] and ingests.content(old) == was


def test_a_read_only_disk(small: Path, trees: Path) -> None:
    """What is done can be used; what is not is refused."""
    old = ingests.plainly(trees / "old", Machine(store=small))
    assert mount(small, "remount,ro")
    try:
        assert ingests.plainly(trees / "old", Machine(store=small)) == old
        trust.check(old)
        assert trust.verify(old) == []
        with pytest.raises(UserError) as error:
            ingests.plainly(trees / "new", Machine(store=small))
        assert (error.value.code, error.value.exit_code) == ("NOT_WRITABLE", 1)
    finally:
        assert mount(small, "remount,rw")


@pytest.mark.parametrize("kilobytes", [1, 100, 400])
def test_a_limit_on_the_size_of_files(trees: Path, tmp_path: Path, kilobytes: int) -> None:
    """A quota as anyone can set it: no file of this process may be longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, before[1]))
    try:
        with pytest.raises(UserError) as error:
            ingests.plainly(trees / "new", Machine(store=tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.code == "NO_SPACE"
    assert store.find(tmp_path, "ingest") == [] and hidden(tmp_path) == []
    assert trust.verify(ingests.plainly(trees / "new", Machine(store=tmp_path))) == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(trees: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError) as error:
            ingests.plainly(trees / "new", Machine(store=tmp_path / "store"))
        assert error.value.code == "NOT_WRITABLE"
    finally:
        tmp_path.chmod(0o700)


# ---- R9 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return shard_set(tmp_path_factory.mktemp("shards"))


def test_a_disk_that_fills_with_checkpoints(
    ray_cluster: object, small: Path, stacks: Artefact, tmp_path: Path
) -> None:
    """There is room for one and a half: the run ends with the first intact, and with more space it goes on from it."""
    steps = 24
    exp = pretrainings.experiment(steps=steps)
    calm = pretrain.pretrain(exp, Machine(store=tmp_path / "calm"), "scratch", [stacks])
    size = sum(path.stat().st_size for path in restart.kept(calm.path)[-1].iterdir())
    assert mount(small, f"remount,size={int(1.5 * size) // 1024 + 512}k")
    with pytest.raises(UserError) as error:
        pretrain.pretrain(exp, Machine(store=small), "scratch", [stacks])
    assert (error.value.code, error.value.exit_code) == ("NO_SPACE", 1) and "free" in str(error.value)
    made = pretrain.artefact(exp, Machine(store=small), "scratch", [stacks])
    whole = []
    for folder in restart.kept(made.path):
        with contextlib.suppress(
            checkpoint.Damaged
        ):  # the copies that were cut, which the next start removes
            whole.append(checkpoint.load_training(folder)["step"])
    assert whole == [8] and not made.done
    assert mount(small, f"remount,size={5 * size // 1024 + 4096}k")
    pretrainings.same(pretrain.pretrain(exp, Machine(store=small), "scratch", [stacks]), calm, steps)
