"""Fine-tuning on tiny networks: it learns, selects on validation subjects only, and the same call is the same fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from cranium import tuning
from cranium.config import Augment, Finetune, Lora, UserError
from cranium.models.classifier import Classifier
from cranium.models.vit import build
from cranium.tuning import Examples, Start
from cranium.volume import shard
from shards import shard_set

STILL = Augment(flip=0, rotate=0, scale=0, shift=0, gamma=0, contrast=0, bias_field=0, blur=0, noise=0)
FAST = Finetune(
    epochs=12,
    warmup=1,
    batch_size=4,
    blr=0.1,
    slices=2,
    max_slices=3,
    layer_decay=1,
    drop_path=0,
    augment=STILL,
)
START = Start("random", "vit_tiny_patch14", 0, ("cls", "patch_mean"), "zero")


def examples(subjects: int, seed: int = 0) -> Examples:
    """Class 1 has a bright corner in every slice."""
    rng = np.random.default_rng(seed)
    labels = np.arange(subjects) % 2
    stacks = rng.integers(60, 120, (subjects, 3, 3, 1, 28, 28), dtype=np.uint8)
    stacks[labels == 1, :, :, :, :14, :14] += 100
    return Examples([torch.from_numpy(some) for some in stacks], labels)


def model(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    backbone = build("vit_tiny_patch14", in_channels=3, image_size=28)
    return Classifier(backbone, features=("cls", "patch_mean"), pool="mean", num_classes=2)


def test_two_separable_classes_are_learnt() -> None:
    learner = model()
    curve = tuning.fit(learner, examples(12), examples(8, seed=1), FAST, seed=0)
    others = examples(8, seed=2)
    assert (tuning.probabilities(learner, others.stacks, FAST).argmax(1) == others.labels).all()
    assert curve.validation_auroc[curve.epoch - 1] == max(curve.validation_auroc) == 1.0
    assert curve.loss[-1] < curve.loss[0]


def test_the_selected_epoch_is_what_is_left_and_validation_selects_it() -> None:
    """Validation subjects with the opposite labels: the best epoch is the one that has learnt least."""
    train, opposite = examples(12), examples(8, seed=1)
    opposite = Examples(opposite.stacks, 1 - opposite.labels)
    learner = model()
    curve = tuning.fit(learner, train, opposite, FAST, seed=0)
    assert curve.epoch == 1 + int(np.argmax(curve.validation_auroc)) and curve.epoch < FAST.epochs
    again = tuning.probabilities(learner, opposite.stacks, FAST)
    assert roc_auc_score(opposite.labels, again[:, 1]) == pytest.approx(max(curve.validation_auroc))


def test_nobody_to_spare_means_the_last_epoch_and_says_so() -> None:
    curve = tuning.fit(model(), examples(2), None, FAST.model_copy(update={"epochs": 2}), seed=0)
    assert curve.epoch == 2 and "no subject could be spared" in curve.chosen_by and not curve.validation_auroc


@pytest.mark.parametrize("spec", [FAST, FAST.model_copy(update={"augment": Augment(), "drop_path": 0.3})])
def test_the_same_call_gives_the_same_weights(spec: Finetune) -> None:
    short = spec.model_copy(update={"epochs": 2})
    learners = [model(), model()]
    curves = [tuning.fit(learner, examples(6), None, short, seed=3) for learner in learners]
    assert curves[0] == curves[1]
    assert all(
        torch.equal(a, b) for a, b in zip(learners[0].parameters(), learners[1].parameters(), strict=True)
    )
    assert tuning.fit(model(), examples(6), None, short, seed=4) != curves[0]


def test_the_rate_warms_up_from_zero_and_falls_by_half_a_cosine() -> None:
    spec = Finetune()
    peak = 5e-3 * 16 / 256
    assert tuning.learning_rate(0, spec) == 0
    assert tuning.learning_rate(5, spec) == pytest.approx(peak / 2)
    assert tuning.learning_rate(10, spec) == pytest.approx(peak) == pytest.approx(3.125e-4)
    assert tuning.learning_rate(30, spec) == pytest.approx(1e-6 + (peak - 1e-6) / 2)
    assert tuning.learning_rate(50, spec) == pytest.approx(1e-6)


def test_rare_classes_weigh_more_and_the_mean_weight_is_one() -> None:
    labels = np.array([0, 0, 0, 1])
    weights = tuning.class_weights(labels, "balanced")
    assert weights.tolist() == [4 / 6, 2.0] and weights[labels].mean() == 1
    assert tuning.class_weights(labels, "none").tolist() == [1, 1]


def test_the_loss_is_label_smoothed_cross_entropy_weighted_by_class() -> None:
    learner, train = model().eval(), examples(3)
    torch.nn.init.normal_(learner.head.weight)
    spec = FAST.model_copy(update={"slices": 3})
    weights = torch.tensor([0.75, 1.5])
    loss = tuning._loss(learner, train, np.array([0, 1, 2]), weights, spec, np.random.default_rng(0))
    p = tuning.probabilities(learner, train.stacks, spec)
    slow = 0.0
    for row, label in zip(p, train.labels, strict=True):
        target = np.full(2, 0.1 / 2)
        target[label] += 0.9
        slow += float(weights[label]) * -(target * np.log(row)).sum() / 3
    assert float(loss.detach()) == pytest.approx(slow, rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_cell() -> None:
    learner = model()
    learner.head.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="lower blr") as refused:
        tuning.fit(learner, examples(2), None, FAST, seed=0)
    assert refused.value.exit_code == 1


# ---- subjects and files ---------------------------------------------------------------------------------------------


def table(subjects: int, matched: bool = False) -> pd.DataFrame:
    ids = [f"{i:03d}" for i in range(subjects)]
    groups = [f"b{i // 2}" for i in range(subjects)] if matched else ids
    return pd.DataFrame({"subject": ids, "session": "", "label": np.arange(subjects) % 2, "matched": groups})


def test_held_out_subjects_are_of_every_class_a_share_and_the_same_for_everybody() -> None:
    held = tuning.hold_out(table(16), 0.25, seed=0)
    labels = table(16).set_index("subject")["label"]
    assert sorted(labels[held]) == [0, 0, 1, 1]
    assert held == tuning.hold_out(table(16).sample(frac=1, random_state=1), 0.25, seed=0)
    assert held != tuning.hold_out(table(16), 0.25, seed=1)
    assert tuning.hold_out(table(4), 0.25, seed=0) and len(tuning.hold_out(table(4), 0.25, seed=0)) == 2
    assert tuning.hold_out(table(2), 0.25, seed=0) == []


def test_matched_sets_are_held_out_whole() -> None:
    held = tuning.hold_out(table(16, matched=True), 0.25, seed=0)
    groups = table(16, matched=True).set_index("subject")["matched"]
    assert all(set(groups.index[groups == g]) <= set(held) for g in groups[held])


def learnt(folder: Path, spec: Finetune, start: Start = START, pool: str = "mean") -> tuning.Tuned:
    made = shard_set(folder)
    labelled = table(12)
    return tuning.learn(start, spec, made.path, labelled, pool=pool, num_classes=2, seed=0)


def test_frozen_layers_stay_and_only_low_rank_updates_and_the_head_learn(tmp_path: Path) -> None:
    spec = Lora(epochs=3, warmup=0, batch_size=4, blr=0.1, slices=2, max_slices=3, validation=0.5)
    tuned = learnt(tmp_path, spec)
    start, _ = tuning._encoder(START, spec, 3, 28)
    after = {n.replace(".frozen", ""): p for n, p in tuned.model.encoder.named_parameters()}
    assert all(torch.equal(p, after[n]) for n, p in start.named_parameters())
    assert any(bool(p.detach().any()) for n, p in after.items() if n.endswith("up"))
    tuning.save(tuned.model, tmp_path / "head.safetensors")
    kept = load_file(tmp_path / "head.safetensors")
    assert {n.rpartition(".")[2] for n in kept if n.startswith("encoder.")} == {"up", "down"}
    again, _ = tuning.build(START, spec, (3, 1, 28, 28), pool="mean", num_classes=2, seed=0)
    tuning.load(again, tmp_path / "head.safetensors")
    pairs = zip(again.parameters(), tuned.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    other, _ = tuning.build(START, FAST, (3, 1, 28, 28), pool="mean", num_classes=2, seed=0)
    with pytest.raises(UserError, match="other tensors"):
        tuning.load(other, tmp_path / "head.safetensors")


@pytest.mark.parametrize("pool", ["max", "attention"])
@pytest.mark.parametrize("init", ["random", "cnn"])
def test_every_start_and_pooling_goes_through_the_shards(tmp_path: Path, init: str, pool: str) -> None:
    tuned = learnt(tmp_path, FAST.model_copy(update={"epochs": 2}), replace(START, init=init), pool)
    predicted = tuned.predict(tmp_path / "ingest" / "tiny-00000000", table(12))
    assert predicted.shape == (12, 2) and np.allclose(predicted.sum(1), 1)
    assert list(tuned.held_out) == tuning.hold_out(table(12), 0.25, 0) and len(tuned.held_out) in (3, 4)
    assert len(tuned.curve.validation_auroc) == 2


def test_a_damaged_row_is_never_learnt_from(tmp_path: Path) -> None:
    made = shard_set(tmp_path)
    file = next((made.path / "shards").glob("*.parquet"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError) as refused:
        tuning.learn(START, FAST, made.path, table(12), pool="mean", num_classes=2, seed=0)
    assert refused.value.code.startswith("SHARD_") and str(refused.value).count(shard.MEND) == 1
    assert str(refused.value).endswith(shard.MEND)  # what to do is said once
