"""Other people's layouts: a backbone loaded from one gives the features that their own code gave.

Tensors are drawn by name, so that only names, inputs' seeds and outputs had to be kept (`tests/reference/README.md`).
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cranium import checkpoint
from cranium.models import layouts, vit, weights

FOLDER = Path(__file__).parents[1] / "reference"
OFFICIAL = np.load(FOLDER / "dinov2_models_b8931f7.npz")
TRANSFORMERS = np.load(FOLDER / "transformers_5.23.0.npz")
LAYOUTS = {
    "official": (OFFICIAL, "vit_tiny_patch14", "dinov2"),
    "official_chunked": (OFFICIAL, "vit_tiny_patch14", "dinov2"),
    "official_reg4": (OFFICIAL, "vit_tiny_patch14_reg4", "timm"),
    "dinov2": (TRANSFORMERS, "vit_tiny_patch14", "transformers"),
    "registers": (TRANSFORMERS, "vit_tiny_patch14_reg4", "timm"),
}


def drawn(name: str, shape: list[int]) -> Tensor:
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    scale = ("norm" in name and name.endswith("weight")) or name.endswith(("gamma", "lambda1"))
    return torch.from_numpy((1 + 0.1 * values if scale else 0.05 * values).astype(np.float32))


def state_of(tag: str) -> dict[str, Tensor]:
    return {name: drawn(name, shape) for name, shape in json.loads(str(LAYOUTS[tag][0][f"{tag}.names"]))}


def image(size: int) -> Tensor:
    """What the foreign model was given, before its normalisation is taken off: our input in RGB's units."""
    seen = torch.from_numpy(
        np.random.RandomState(size).standard_normal((2, 3, size, size)).astype(np.float32)
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in vit.ARCHITECTURES["vit_tiny_patch14"].statistics)
    return seen * std + mean


def loaded(tag: str, state: dict[str, Tensor]) -> tuple[vit.Backbone, weights.LoadReport]:
    _, arch, rule = LAYOUTS[tag]
    backbone = vit.build(arch, image_size=518, position=rule).eval()  # type: ignore[arg-type]
    return backbone, weights.load_into(backbone, state)


def same_features(tag: str, backbone: vit.Backbone) -> None:
    reference = LAYOUTS[tag][0]
    with torch.inference_mode():
        answers = {str(size): backbone(image(size)[:1]) for size in (98, 224)}
        answers["masked"] = backbone(image(98), torch.from_numpy(reference["masks"]))
    for name, tokens in answers.items():
        for got, part in ((tokens.cls, "cls"), (tokens.patches[:, ::16], "patches")):
            np.testing.assert_allclose(got, reference[f"{tag}.{name}.{part}"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("tag", LAYOUTS)
def test_a_foreign_model_gives_its_own_features(tag: str) -> None:
    backbone, report = loaded(tag, state_of(tag))
    assert report.loaded == report.total
    head = ("head dropped: dino_head (8 tensors)",) if tag == "official_chunked" else ()
    assert report.exceptions == head
    same_features(tag, backbone)


def test_older_names_of_transformers_give_the_same() -> None:
    new = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    state = {}
    for name, tensor in state_of("registers").items():
        for now, before in new.items():
            name = name.replace(f"attention.{now}", f"attention.{before}")
        state[f"dinov2_with_registers.{name}"] = tensor
    state["classifier.weight"] = torch.zeros(10, 384)
    backbone, report = loaded("registers", state)
    assert report.layout == "transformers" and report.exceptions == ("head dropped: classifier (1 tensors)",)
    same_features("registers", backbone)


def test_the_teacher_of_a_training_checkpoint_and_nobody_else(tmp_path: Path) -> None:
    """`{"teacher": ...}` as the official evaluation saves it, and the whole model of its training checkpoints."""
    state = state_of("official_chunked")
    torch.save({"teacher": state}, tmp_path / "teacher_checkpoint.pth")
    same_features(
        "official_chunked",
        loaded("official_chunked", checkpoint.read_tensors(tmp_path / "teacher_checkpoint.pth"))[0],
    )
    whole = {f"teacher.{name}": tensor for name, tensor in state.items()}
    whole |= {f"student.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    whole |= {"dino_loss.center": torch.zeros(1, 24), "ibot_patch_loss.center": torch.zeros(1, 1, 24)}
    torch.save({"model": whole, "iteration": 7}, tmp_path / "model.pth")
    backbone, report = loaded("official_chunked", checkpoint.read_tensors(tmp_path / "model.pth"))
    assert report.layout == "official training checkpoint, its teacher"
    same_features("official_chunked", backbone)


def test_half_of_a_layer_is_refused_by_its_own_name() -> None:
    state = state_of("dinov2")
    state.pop("encoder.layer.2.attention.k_proj.bias")
    with pytest.raises(
        ValueError, match=r"missing vit.blocks.2.attn.qkv.bias.*encoder.layer.2.attention.q_proj.bias"
    ):
        loaded("dinov2", state)
    state = state_of("official") | {"blocks.0.3.norm1.bias": torch.zeros(192)}
    with pytest.raises(ValueError, match="same name"):
        layouts.in_timms_names(state)


def test_a_folder_of_save_pretrained_brings_its_statistics(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state_of("dinov2"), tmp_path / "model.safetensors")
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    backbone, source = checkpoint.load_backbone(
        "dinov2",
        arch="vit_tiny_patch14",
        in_channels=3,
        image_size=518,
        weights_file=tmp_path,
        position="transformers",
    )
    assert source.mean == (0.1, 0.2, 0.3) and source.std == (0.5, 0.6, 0.7)
    assert source.sha256 and source.licence and source.position == "transformers"
    assert "transformers names" in source.report
    assert backbone.mean.tolist() == pytest.approx(stated["image_mean"])
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [1]}')
    with pytest.raises(checkpoint.UserError, match="image_std"):
        checkpoint.locate("dinov2", "vit_tiny_patch14", tmp_path)
