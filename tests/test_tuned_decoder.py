"""Segmentation from the pixels, on phantoms: it learns, it is the frozen decoder where the backbone stands still."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from cranium import frozen_decoder, restitch, segmenting, store, tokens, tuned_decoder
from cranium.config import Augment, Decoder, TunedDecoder
from cranium.models import vit
from cranium.tuning import Start
from test_segmenting import FOLDS, SIZE, cohort, work

STILL = Augment(flip=0, rotate=0, scale=0, shift=0, gamma=0, contrast=0, bias_field=0, blur=0, noise=0)
FAST = {
    "steps": 40,
    "batch_size": 8,
    "lr": 1e-3,
    "lora_lr": 1e-2,
    "cnn_lr": 3e-3,
    "layer_decay": 1.0,
    "drop_path": 0.0,
    "augment": STILL,
}
START = Start("random", "vit_tiny_patch14", 0, ("cls",), "zero")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> segmenting.Cohort:
    made = cohort(tmp_path_factory.mktemp("pixels"), "home", [True, True, True, False, True, True])
    return replace(made, tokens=None)


def stacks_of(home: segmenting.Cohort, key: tuple[str, str]) -> restitch.Stacks:
    return restitch.read_stacks(store.Artefact(home.shard_set), store.read_manifest(home.shard_set), *key)


def shining(stacks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, H, W]: 1 on all of a patch of which some pixel is bright."""
    n, side = len(stacks), SIZE // 14
    bright = stacks.reshape(n, side, 14, side, 14).max((2, 4)) > 150
    return bright.repeat(14, 1).repeat(14, 2).astype(np.uint8)


def cell(root: Path, home: segmenting.Cohort, init: str, adaptation: str, **tuned: object) -> segmenting.Work:
    made = work(root, home, init=init, adaptation=adaptation, fold=1)
    spec = Decoder(lr=1e-2, width=16, tuned=TunedDecoder.model_validate(FAST | tuned))
    return replace(made, decoder=spec, start=replace(START, init=init))


@pytest.mark.parametrize("adaptation", ["finetune", "lora"])
def test_patches_that_shine_are_found_in_heads_it_never_saw(home, adaptation: str) -> None:  # type: ignore[no-untyped-def]
    """Which of its 16 patches hold a bright pixel is all that a label here says: what tokens can carry."""
    every = [(f"{n:03d}", "") for n in range(6)]
    stacks = [stacks_of(home, key).pixels for key in every]
    labels = [shining(some) for some in stacks]
    spec = Decoder(lr=1e-2, width=16, tuned=TunedDecoder.model_validate(FAST | {"steps": 60}))
    keys, seen = every[:4], np.concatenate(labels[:4])
    fitted = tuned_decoder.fit(START, home.shard_set, keys, seen, spec, adaptation, num_classes=2, seed=0)
    for key, wanted in zip(every[4:], labels[4:], strict=True):
        found = torch.cat(list(fitted.scores(home.shard_set, key))).argmax(1).numpy()
        assert 2 * (found * wanted).sum() / (found.sum() + wanted.sum()) > 0.9
    assert fitted.losses[-1] < 0.3 * fitted.losses[0]


def test_a_u_net_finds_what_is_bright_in_heads_it_never_saw(home, tmp_path) -> None:  # type: ignore[no-untyped-def]
    job = cell(tmp_path, home, "cnn", "finetune", keep=True)
    scores = segmenting.run_cell(job, FOLDS)
    manifest = store.read_manifest(job.folder)
    assert scores["test/dice/any"] > 0.8
    assert manifest["inputs"] == [[job.cohort.shard_set.name, None]]
    assert manifest["start"]["init"] == "cnn" and manifest["start"]["source"] is None
    assert manifest["counts"]["n_train"] == 4
    assert manifest["head_sha256"] == store.sha256(job.folder / segmenting.DECODER)


def test_the_same_cell_gives_the_same_maps_and_another_seed_others(home, tmp_path) -> None:  # type: ignore[no-untyped-def]
    moving = {"augment": Augment(), "drop_path": 0.3, "steps": 12}
    one = cell(tmp_path / "a", home, "random", "finetune", **moving)
    two = replace(one, folder=tmp_path / "b")
    three = replace(one, cell=one.cell.model_copy(update={"seed": 1}), folder=tmp_path / "c")
    found = []
    for job in (one, two, three):
        segmenting.run_cell(job, FOLDS)
        found.append(store.read_manifest(job.folder)["losses"])
    assert found[0] == found[1] != found[2]
    assert store.read_manifest(one.folder)["head_sha256"] is None  # as large as a backbone, and not asked for
    assert not (one.folder / segmenting.DECODER).exists()
    tables = [pd.read_parquet(job.folder / segmenting.PREDICTIONS) for job in (one, two)]
    pd.testing.assert_frame_equal(*tables)


def test_a_backbone_that_stands_still_leaves_the_decoder_of_frozen_tokens(home, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The same draws, the same steps; what is left is that frozen tokens are kept in float16."""
    keys = [(f"{n:03d}", "") for n in range(3)]
    shards, stacks = home.shard_set, [stacks_of(home, key) for key in keys]
    labels = np.concatenate([one.labels for one in stacks])
    spec = Decoder(
        steps=20,
        batch_size=6,
        lr=1e-2,
        width=16,
        tuned=TunedDecoder(steps=20, batch_size=6, lr=1e-30, drop_path=0, augment=STILL),
    )
    tuned = tuned_decoder.fit(START, shards, keys, labels, spec, "finetune", num_classes=3, seed=4)

    backbone = vit.build("vit_tiny_patch14", in_channels=1, image_size=SIZE)
    backbone.load_state_dict(tuned.model.encoder.state_dict())
    folder = tmp_path / "tokens"
    folder.mkdir()
    made = [tokens.encode(backbone, s.pixels, tuned.model.depths, 16, torch.device("cpu")) for s in stacks]
    np.save(folder / tokens.TOKENS, np.concatenate(made))
    rows = [(*key, z) for key, some in zip(keys, made, strict=True) for z in range(len(some))]
    pd.DataFrame(rows, columns=["subject", "session", "slice"]).to_parquet(folder / tokens.ROWS)
    store.commit(folder, {"pixels": SIZE})
    frozen = frozen_decoder.fit(folder, keys, labels, spec, "conv", num_classes=3, seed=4)

    assert tuned.positive == frozen.positive and tuned.slices == frozen.slices
    np.testing.assert_allclose(tuned.losses, frozen.losses, rtol=2e-3)
    of = [torch.cat(list(f.scores(where, keys[0]))) for f, where in ((tuned, shards), (frozen, folder))]
    agree = (of[0].argmax(1) == of[1].argmax(1)).float().mean()
    assert float(agree) > 0.995


def test_low_rank_updates_leave_the_weights_below_them_alone(home, tmp_path) -> None:  # type: ignore[no-untyped-def]
    job = cell(tmp_path, home, "random", "lora", steps=6)
    shape = (1, 1, SIZE, SIZE)
    before, _ = tuned_decoder.build(job.start, job.decoder, "lora", shape, num_classes=3, seed=0)
    start = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    keys = [("000", ""), ("001", "")]
    labels = np.concatenate([stacks_of(home, key).labels for key in keys])
    after = tuned_decoder.fit(
        job.start, home.shard_set, keys, labels, job.decoder, "lora", num_classes=3, seed=0
    )
    changed = {n for n, t in after.model.state_dict().items() if not torch.equal(t, start[n])}
    moved = {n for n in changed if n.startswith("encoder.")}
    assert moved and all(name.endswith((".up", ".down")) for name in moved)
    segmenting.run_cell(job, FOLDS)
    kept = load_file(job.folder / segmenting.DECODER)
    assert {n for n in kept if n.startswith("encoder.")} == moved
