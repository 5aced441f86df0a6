from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cranium import checkpoint
from cranium.config import UserError
from cranium.models import vit
from cranium.store import Artefact

TINY = {"arch": "vit_tiny_patch14", "in_channels": 3, "image_size": 56}


def same(a: vit.Backbone, b: vit.Backbone) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_random_is_a_function_of_its_seed_and_disturbs_nobody():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, _ = checkpoint.load_backbone("random", **TINY, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert same(first, checkpoint.load_backbone("random", **TINY, seed=1)[0])
    assert not same(first, checkpoint.load_backbone("random", **TINY, seed=2)[0])


def test_what_is_exported_loads_as_it_was(tmp_path: Path):
    made, _ = checkpoint.load_backbone("random", **TINY, seed=3)
    checkpoint.export(tmp_path, made, {"channels": ["T1w"], "preprocessing_hash": "ab"})
    loaded, source = checkpoint.load_backbone("scratch", **TINY, pretrained=Artefact(tmp_path))
    assert same(made, loaded)
    assert source.sha256 and source.init == "scratch"
    assert checkpoint.read_card(tmp_path)["channels"] == ["T1w"]
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.BACKBONE]


def test_weights_of_another_architecture_are_refused_by_name(tmp_path: Path):
    other = vit.build("vit_small_patch14_dinov2", image_size=56)
    path = tmp_path / "other.safetensors"
    save_file({k: v.contiguous() for k, v in other.state_dict().items()}, path)
    with pytest.raises(UserError, match=r"blocks\.6") as refused:
        checkpoint.load_backbone("dinov2", **TINY, weights_file=path)
    assert refused.value.code == "WEIGHTS_MISFIT"


def test_pickled_code_in_weights_is_never_run(tmp_path: Path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.system, (f"touch {canary}",))

    path = tmp_path / "weights.pth"
    torch.save({"model": Evil()}, path)
    with pytest.raises(UserError, match="never run"):
        checkpoint.load_backbone("dinov2", **TINY, weights_file=path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError):
        checkpoint.load_backbone("dinov2", **TINY, weights_file=path)
    assert not canary.exists()


@pytest.mark.parametrize("content", [None, b"", b"<html>not found</html>"])
def test_a_file_that_is_no_weights_is_one_line(tmp_path: Path, content: bytes | None):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        checkpoint.load_backbone("dinov2", **TINY, weights_file=path)
    assert refused.value.code == "NO_WEIGHTS" and str(path) in str(refused.value)


def test_what_was_never_released_is_said():
    with pytest.raises(UserError, match="no released weights"):
        checkpoint.load_backbone("dinov2", **TINY)
    with pytest.raises(UserError, match="imagenet"):
        checkpoint.architecture("imagenet", "vit_tiny_patch14")
    assert checkpoint.architecture("imagenet", "vit_base_patch14_dinov2") == "vit_base_patch16_224"
    with pytest.raises(UserError, match="cranium pretrain"):
        checkpoint.load_backbone("scratch", **TINY)


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def unreachable(*_: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match="weights=PATH") as refused:
        checkpoint.load_backbone("dinov2", arch="vit_small_patch14_dinov2", in_channels=3, image_size=224)
    assert refused.value.code == "NO_WEIGHTS"


def test_training_state_comes_back(tmp_path: Path):
    state = {
        "step": 7,
        "method": {"a": torch.arange(3)},
        "optimiser": {"param_groups": [{"part": "head", "lr": 0.1}]},
    }
    checkpoint.save_training(tmp_path, state)
    back = checkpoint.load_training(tmp_path)
    assert back["step"] == 7 and torch.equal(back["method"]["a"], torch.arange(3))
    assert back["optimiser"] == state["optimiser"]


@pytest.mark.parametrize("damage", ["cut", "flip", "swap", "no marker", "torn marker", "no file"])
def test_damaged_training_state_is_never_loaded(tmp_path: Path, damage: str):  # R8
    checkpoint.save_training(tmp_path, {"step": 7, "a": torch.arange(1000)})
    path, marker = tmp_path / checkpoint.TRAINING, tmp_path / checkpoint.COMPLETE
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[:-1])
        case "flip":
            path.write_bytes(content[:600] + bytes([content[600] ^ 16]) + content[601:])
        case "swap":
            torch.save({"step": 7, "a": torch.arange(1000).flip(0)}, path)
        case "no marker":
            marker.unlink()
        case "torn marker":
            marker.write_text(marker.read_text()[:20])
        case "no file":
            path.unlink()
    with pytest.raises(checkpoint.Damaged):
        checkpoint.load_training(tmp_path)


def test_released_dinov2_loads_whole(test_data: Path):
    path = test_data / "weights" / "dinov2_vits14_derived.fp16.safetensors"
    backbone, source = checkpoint.load_backbone(
        "dinov2", arch="vit_small_patch14_dinov2", in_channels=3, image_size=224, weights_file=path
    )
    assert "mask_token absent" in source.report and "resampled" not in source.report
    with torch.inference_mode():
        tokens = backbone(torch.rand(1, 3, 224, 224))
    assert (
        30 < float(tokens.patches.norm(dim=-1).mean()) < 60
    )  # as DINOv2's; a random ViT-S gives its norm's sqrt(384)
