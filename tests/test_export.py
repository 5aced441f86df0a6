"""What is exported: the code that its card prints gives our features, with timm alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from cranium import checkpoint, cli, export, store
from cranium.config import UserError
from cranium.models import vit
from cranium.store import Artefact

CHANNELS = {1: ["T1w"], 3: ["T1w", "T2w", "FLAIR"], 5: ["T1w"], 6: ["T1w", "FLAIR"]}


def pretrained(
    folder: Path, arch: str, channels: int, size: int, rule: Any = None
) -> tuple[Artefact, vit.Backbone]:
    """A finished pretraining with random weights that are not near zero, and its shard set's manifest."""
    torch.manual_seed(0)
    backbone = vit.build(arch, in_channels=channels, image_size=size, position=rule).eval()
    with torch.no_grad():
        backbone.vit.pos_embed.normal_()
        backbone.mask_token.normal_()
        backbone.mean += 0.01
    path = folder / "pretrain" / f"scratch-{arch}-ab12cd34"
    path.mkdir(parents=True)
    card = {"channels": CHANNELS[channels], "preprocessing_hash": "ab", "image_size": size, "config": "cd"}
    checkpoint.export(path, backbone, card)
    shards = folder / "ingest" / "mine-00000000"
    store.commit(shards, {"preprocessing": {"spacing_mm": 1.0}})
    manifest = {
        "stage": "pretrain",
        "steps": 7,
        "cohorts": ["mine"],
        "shard_sets": ["ingest/mine-00000000"],
        "start": {"name": "random (seed 0)", "licence": None, "sha256": None},
        "weights_sha256": store.sha256(path / checkpoint.BACKBONE),
        "preprocessing_hash": "ab",
    }
    store.commit(path, manifest)
    return Artefact(path), backbone


@pytest.mark.parametrize(
    ("arch", "channels", "rule", "size"),
    [
        ("vit_tiny_patch14", 3, "timm", 56),
        ("vit_tiny_patch14", 5, "timm", 84),  # timm resamples
        ("vit_tiny_patch14", 1, "dinov2", 84),  # baked
        ("vit_tiny_patch14", 6, "timm", 56),  # two contrasts, three slices of each
        ("vit_tiny_patch14_reg4", 3, "transformers", 42),
        ("vit_small_patch14_dinov2", 3, None, 98),
    ],
)
def test_the_printed_code_gives_our_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, channels: int, rule: Any, size: int
) -> None:
    made, backbone = pretrained(tmp_path, arch, channels, 56, rule)
    done = export.export(made, export.Spec(out=tmp_path / "out", name="mine", size=size))
    code = done.card.read_text().split("```python\n")[1].split("```")[0]
    assert "timm.create_model(" in code and "cranium" not in code
    monkeypatch.chdir(done.card.parent)
    space: dict[str, Any] = {}
    exec(code, space)
    slices = channels // len(CHANNELS[channels])
    stacks = torch.randint(0, 256, (2, len(CHANNELS[channels]), slices, size, size), dtype=torch.uint8)
    cls, patches = space["features"](stacks)
    with torch.inference_mode():
        ours = backbone(stacks.flatten(1, 2).float() / 255)
    torch.testing.assert_close(cls, ours.cls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(patches, ours.patches, rtol=1e-5, atol=1e-5)


def test_the_card_and_the_metadata_say_what_it_is(tmp_path: Path) -> None:
    made, _ = pretrained(tmp_path, "vit_tiny_patch14", 3, 56, "dinov2")
    done = export.export(made, export.Spec(out=tmp_path / "out", size=42, licence="Apache-2.0"))
    with safe_open(done.weights, framework="pt") as file:
        metadata = file.metadata()
        assert "mask_token" not in set(file.keys())
    facts = json.loads(metadata["cranium"])
    assert metadata["format"] == "pt" and facts == json.loads(json.dumps(done.facts))
    assert facts["position"] == {"rule": "dinov2", "baked_at": 42}
    assert facts["preprocessing"] == {"spacing_mm": 1.0} and facts["corpus"] == ["mine"]
    assert facts["mean"][0] == pytest.approx(0.495) and facts["licence"] == "Apache-2.0"
    text = done.card.read_text()
    for said in (done.sha256, "mine", "Apache-2.0", "for 42 pixels only", "`ab`", '"spacing_mm": 1.0'):
        assert said in text, said
    assert sorted(p.name for p in done.weights.parent.iterdir()) == sorted(
        [done.weights.name, done.card.name]
    )
    with pytest.raises(UserError, match="patch size"):
        export.export(made, export.Spec(out=tmp_path, size=50))


def test_the_verb(tmp_path: Path) -> None:
    pretrained(tmp_path / "store", "vit_tiny_patch14", 3, 56)
    arguments = [
        "export",
        "run:ab12cd34",
        f"store={tmp_path / 'store'}",
        f"out={tmp_path}",
        "name=mine",
        "--json",
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout.strip().splitlines()[-1])
    assert Path(facts["weights"]).is_file() and facts["sha256"] == store.sha256(Path(facts["weights"]))
    wrong = CliRunner().invoke(cli.app, ["export", "run:nothing", f"store={tmp_path / 'store'}"])
    assert wrong.exit_code == 2
