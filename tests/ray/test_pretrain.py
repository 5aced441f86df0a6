"""Train V2 fits cost half a minute each, so there are few: undisturbed, killed and resumed, on two workers."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch

from cranium import checkpoint, journals, pretrain, restart
from cranium.config import Machine
from cranium.store import Artefact
from pretrainings import STEPS, experiment, journal, last_state, same
from shards import shard_set

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return shard_set(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, shards: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    machine = Machine(store=tmp_path_factory.mktemp("undisturbed"))
    return pretrain.pretrain(experiment(), machine, "scratch", [shards], monitored=shards)


def test_a_run_is_whole_and_done_once(undisturbed: Artefact, shards: Artefact):
    manifest = undisturbed.manifest()
    assert manifest["steps"] == STEPS and manifest["init"] == "scratch"
    assert [step for step, _ in journal(undisturbed)] == list(range(STEPS))
    looks = journals.read(undisturbed.path / "monitor" / "journal")
    assert [look.step for look in looks] == [0, 16, 32, STEPS]
    assert all(set(look.metrics) == {"monitor/knn_position", "monitor/knn_contrast"} for look in looks)
    assert not list((undisturbed.path / "monitor").rglob("*.safetensors"))
    backbone, source = checkpoint.load_backbone(
        "scratch", arch="vit_tiny_patch14", in_channels=3, image_size=28, pretrained=undisturbed
    )
    teacher = {
        k: v for k, v in last_state(undisturbed)["method"].items() if k.startswith("teacher.backbone.")
    }
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, teacher[f"teacher.backbone.{name}"])
    assert source.sha256 == manifest["weights_sha256"]
    before = undisturbed.path.stat().st_mtime_ns
    again = pretrain.pretrain(experiment(), Machine(store=undisturbed.path.parents[1]), "scratch", [shards])
    assert again == undisturbed and undisturbed.path.stat().st_mtime_ns == before


def test_a_killed_run_ends_as_the_undisturbed_one(
    ray_cluster, undisturbed: Artefact, shards: Artefact, tmp_path: Path
):
    """SIGKILL of the worker between two checkpoints: tensors, optimiser, position and journal end up equal."""
    machine = Machine(store=tmp_path)
    made = pretrain.artefact(experiment(), machine, "scratch", [shards])
    killed: list[int] = []

    def kill(done: int, total: int, text: str) -> None:
        if done >= 18 and not killed:
            for process in psutil.process_iter(["pid", "cmdline"]):
                if any("RayTrainWorker" in part for part in process.info["cmdline"] or []):
                    killed.append(process.pid)
                    os.kill(process.pid, signal.SIGKILL)

    resumed = pretrain.pretrain(experiment(), machine, "scratch", [shards], progress=kill)
    assert killed and resumed == made
    segments = sorted((made.path / pretrain.JOURNAL).glob("*.jsonl"))
    assert len(segments) == 2
    assert json.loads(segments[1].read_text().splitlines()[0])["resume"] in range(
        0, STEPS, 8
    )  # 0: the copy was under way
    same(resumed, undisturbed)


def test_a_stopped_run_makes_a_checkpoint_and_a_damaged_one_is_left_out(
    ray_cluster,
    interrupts: None,
    undisturbed: Artefact,
    shards: Artefact,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    """Ctrl-C between two checkpoints: one is made first. With a byte of it changed, the one before it is taken up."""
    machine, sent = Machine(store=tmp_path), []

    def interrupt(done: int, total: int, text: str) -> None:
        if done >= 10 and not sent:
            sent.append(done)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(experiment(), machine, "scratch", [shards], progress=interrupt)
    made = pretrain.artefact(experiment(), machine, "scratch", [shards])
    assert not made.done and pretrain.unfinished(machine, "scratch-vit_tiny_patch14") == [made]
    kept = restart.kept(made.path)
    steps = [checkpoint.load_training(folder)["step"] for folder in kept]
    # By chance it may have been stopped just where one is made anyway.
    assert len(steps) == 2 and steps[0] % 8 == 0 and max(sent[0], steps[0] + 1) <= steps[1] < STEPS
    with (kept[-1] / checkpoint.TRAINING).open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    resumed = pretrain.pretrain(experiment(), machine, "scratch", [shards])
    newest = sorted((made.path / pretrain.JOURNAL).glob("*.jsonl"))[-1]
    assert json.loads(newest.read_text().splitlines()[0])["resume"] == steps[0]
    same(resumed, undisturbed)


def test_two_workers_make_the_losses_of_one(
    ray_cluster, undisturbed: Artefact, shards: Artefact, tmp_path: Path
):
    """The same global batch on two workers, masking and drop path on. Tolerance: float32 sums in another order."""
    made = pretrain.pretrain(experiment(workers=2), Machine(store=tmp_path), "scratch", [shards])
    for (step, one), (_, two) in zip(journal(undisturbed), journal(made), strict=True):
        for name in ("train/loss", "train/dino_local", "train/ibot", "train/koleo"):
            assert two[name] == pytest.approx(one[name], rel=2e-4), (step, name)
