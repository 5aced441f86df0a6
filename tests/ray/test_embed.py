from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cranium import checkpoint, embed
from cranium.config import Experiment, Machine, UserError
from cranium.store import Artefact
from cranium.volume import shard
from shards import shard_set

pytestmark = pytest.mark.ray
EXPERIMENT = Experiment.model_validate(
    {
        "name": "tiny",
        "ingest": {"cohorts": ["tiny"], "size": 28},
        "stream": {"lanes": 8},
        "pretrain": {"cohorts": ["tiny"], "inits": ["scratch"], "arch": "vit_tiny_patch14"},
        "embed": {"batch_size": 7, "compute": {"num_workers": 2}},
    }
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return shard_set(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def features(ray_cluster: object, shards: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    machine = Machine(store=tmp_path_factory.mktemp("features"))
    (made,) = embed.embed(EXPERIMENT, machine, "random", shards)
    return made


def test_features_are_the_backbones_in_the_order_of_the_rows(shards: Artefact, features: Artefact):
    columns, values = embed.read(features.path)
    assert values.shape == (240, 2 * 192) and values.dtype == np.float32
    backbone, _ = checkpoint.load_backbone("random", arch="vit_tiny_patch14", in_channels=3, image_size=28)
    row = 0
    for entry in shards.manifest()["shards"]:
        for index, group in enumerate(entry["row_groups"]):
            table = shard.read_row_group(shards.path / entry["file"], index)
            stacks = torch.from_numpy(np.array(shard.pixels(table)))
            with torch.inference_mode():
                tokens = backbone(stacks.flatten(1, 2).float() / 255)
            expected = torch.cat([tokens.cls, tokens.patches.mean(1)], 1).numpy()
            part = slice(row, row + group["rows"])
            np.testing.assert_allclose(values[part], expected, atol=1e-4)
            assert set(columns["subject"][part]) == {group["subject"]}
            assert columns["slice"][part].tolist() == list(range(group["rows"]))
            row += group["rows"]
    assert row == 240


def test_absent_contrasts_are_filled_as_in_training(ray_cluster: object, shards: Artefact, tmp_path: Path):
    """Every third session of the set lacks T2w: with `fill: replicate` its features are those of T1w in its place."""
    filled = EXPERIMENT.model_copy(
        update={"stream": EXPERIMENT.stream.model_copy(update={"fill": "replicate"})}
    )
    made = embed.artefact(filled, Machine(store=tmp_path), "random", shards, None)
    assert made.id != embed.artefact(EXPERIMENT, Machine(store=tmp_path), "random", shards, None).id
    backbone, _ = checkpoint.load_backbone("random", arch="vit_tiny_patch14", in_channels=3, image_size=28)
    encoder = embed.Encoder(backbone, ("cls",), 64, None, "replicate")
    entry = shards.manifest()["shards"][0]
    table = encoder._row_group(str(shards.path / entry["file"]), 0)
    stacks = np.array(shard.pixels(shard.read_row_group(shards.path / entry["file"], 0)))
    assert table["present"][0].as_py() == 0b101
    stacks[:, 1] = stacks[:, 0]
    with torch.inference_mode():
        expected = backbone(torch.from_numpy(stacks).flatten(1, 2).float() / 255).cls.numpy()
    got = np.frombuffer(b"".join(table["features"].to_pylist()), np.float32).reshape(len(stacks), -1)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_done_features_are_not_made_again(shards: Artefact, features: Artefact):
    before = (features.path / embed.FEATURES).stat().st_mtime_ns
    (again,) = embed.embed(EXPERIMENT, Machine(store=features.path.parents[1]), "random", shards)
    assert again == features and (features.path / embed.FEATURES).stat().st_mtime_ns == before


def test_subsets_take_one_pass_and_hold_what_a_pass_of_their_own_would(
    ray_cluster: object, shards: Artefact, features: Artefact, tmp_path: Path
):
    """Of T1w and T2w alone, and of FLAIR alone: as if the shards had no other contrast."""
    machine = Machine(store=features.path.parents[1])
    subsets = [("T1w", "T2w"), ("FLAIR",), ()]
    made = dict(
        zip(subsets, embed.embed(EXPERIMENT, machine, "random", shards, subsets=subsets), strict=True)
    )
    assert made[()] == features and len({one.path for one in made.values()}) == 3
    backbone, _ = checkpoint.load_backbone("random", arch="vit_tiny_patch14", in_channels=3, image_size=28)
    for subset, kept in ((("T1w", "T2w"), 0b011), (("FLAIR",), 0b100)):
        assert made[subset].manifest()["subset"] == list(subset)
        assert made[subset].path.name.startswith(f"random_tiny_only_{'_'.join(subset)}-")
        columns, values = embed.read(made[subset].path)
        whole, _ = embed.read(features.path)
        assert columns["present"].tolist() == [bits & kept for bits in whole["present"].tolist()]
        assert all(columns[name].tolist() == whole[name].tolist() for name in ("subject", "slice"))
        entry = shards.manifest()["shards"][0]
        stacks = np.array(shard.pixels(shard.read_row_group(shards.path / entry["file"], 1)))
        for channel in range(3):
            if not kept >> channel & 1:
                stacks[:, channel] = 0
        with torch.inference_mode():
            tokens = backbone(torch.from_numpy(stacks).flatten(1, 2).float() / 255)
        expected = torch.cat([tokens.cls, tokens.patches.mean(1)], 1).numpy()
        np.testing.assert_allclose(values[20:40], expected, atol=1e-4)  # session 1 has all three


def test_identity_follows_shards_weights_and_seed(shards: Artefact, tmp_path: Path):
    machine = Machine(store=tmp_path)
    base = embed.artefact(EXPERIMENT, machine, "random", shards, None)
    other = EXPERIMENT.model_copy(update={"embed": EXPERIMENT.embed.model_copy(update={"seed": 1})})
    assert embed.artefact(other, machine, "random", shards, None) != base
    more = shard_set(tmp_path / "more", seed=1)
    assert embed.artefact(EXPERIMENT, machine, "random", more, None) != base
    runs = {
        embed.artefact(EXPERIMENT, machine, "scratch", shards, Artefact(tmp_path / n)) for n in ("a", "b")
    }
    assert len(runs) == 2


def test_a_damaged_row_makes_no_features(ray_cluster: object, tmp_path: Path):
    damaged = shard_set(tmp_path, "damaged")
    path = damaged.path / "shards" / "2.parquet"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    machine = Machine(store=tmp_path)
    with pytest.raises(UserError, match="CRC") as refused:
        embed.embed(EXPERIMENT, machine, "random", damaged)
    assert (refused.value.code, refused.value.exit_code) == ("SHARD_CORRUPT", 1)
    assert str(refused.value).count(shard.MEND) == 1 and "Traceback" not in str(refused.value)
    assert not embed.artefact(EXPERIMENT, machine, "random", damaged, None).done
    assert pq.ParquetFile(path).metadata.num_rows > 0  # Parquet itself saw nothing
