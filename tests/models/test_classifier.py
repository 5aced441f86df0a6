"""A backbone with pooling and a head; what decays and how fast each layer learns, against closed forms."""

from __future__ import annotations

import pytest
import torch

from cranium.models import vit
from cranium.models.classifier import Classifier, parameter_groups, trained
from cranium.models.cnn import SliceCNN


def classifier(pool: str = "mean") -> Classifier:
    backbone = vit.build("vit_tiny_patch14", in_channels=3, image_size=28)
    return Classifier(backbone, features=("cls", "patch_mean"), pool=pool, num_classes=3).eval()


def test_a_layer_learns_at_the_decay_to_the_power_of_the_layers_above_it() -> None:
    model = classifier()
    groups = parameter_groups(model, 0.65, 0.05)
    rate = {id(p): group["lr_multiplier"] for group in groups for p in group["params"]}
    depth, encoder = 6, model.encoder.vit
    for name in ("cls_token", "pos_embed"):
        assert rate[id(getattr(encoder, name))] == pytest.approx(0.65**7)
    assert rate[id(encoder.patch_embed.proj.weight)] == pytest.approx(0.65**7)
    for index, block in enumerate(encoder.blocks):
        assert {round(rate[id(p)], 12) for p in block.parameters()} == {round(0.65 ** (depth - index), 12)}
    assert rate[id(encoder.norm.weight)] == rate[id(model.head.weight)] == 1.0


def test_vectors_and_positions_do_not_decay_and_every_parameter_is_in_one_group() -> None:
    model = classifier("attention")
    groups = parameter_groups(model, 0.65, 0.05)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups) == len(list(trained(model)))
    for name, parameter in trained(model):
        spared = parameter.ndim == 1 or name.endswith(("cls_token", "pos_embed"))
        assert decay[id(parameter)] == (0.0 if spared else 0.05), name


@pytest.mark.parametrize("pool", ["mean", "max", "attention"])
def test_a_subject_is_classified_by_its_own_slices_in_any_order(pool: str) -> None:
    torch.manual_seed(0)
    model = classifier(pool)
    torch.nn.init.normal_(model.head.weight)
    x, subject = torch.rand(5, 3, 28, 28), torch.tensor([0, 0, 1, 1, 1])
    both = model(x, subject, 2)
    assert both.shape == (2, 3)
    alone = model(x[2:].flip(0), torch.zeros(3, dtype=torch.int64), 1)
    torch.testing.assert_close(both[1:], alone)
    if pool != "attention":
        features = model.encode(x)
        by_hand = features[:2].mean(0) if pool == "mean" else features[:2].amax(0)
        torch.testing.assert_close(both[0], model.head(by_hand))


def test_all_classes_are_equally_likely_at_first() -> None:
    model = classifier()
    logits = model(torch.rand(2, 3, 28, 28), torch.tensor([0, 1]), 2)
    torch.testing.assert_close(logits.softmax(1), torch.full((2, 3), 1 / 3), atol=1e-3, rtol=0)


def test_the_cnn_takes_any_size_learns_at_one_rate_and_treats_each_slice_alone() -> None:
    model = Classifier(SliceCNN(3), features=("cls",), pool="mean", num_classes=2)
    assert {group["lr_multiplier"] for group in parameter_groups(model, 0.65, 0.05)} == {1.0}
    x = torch.rand(3, 3, 40, 40)
    assert model.encode(x).shape == (3, 512)
    torch.testing.assert_close(
        model.encode(x)[1:2], model.encode(x[1:2])
    )  # no batch statistics, also in training
