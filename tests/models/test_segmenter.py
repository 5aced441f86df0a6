"""Networks trained from the pixels: what they compute, how fast each layer learns, and what is kept of them."""

from __future__ import annotations

import pytest
import torch

from cranium.models import decoder, lora, vit
from cranium.models.classifier import learnt, trained
from cranium.models.segmenter import Segmenter, SliceUNet, parameter_groups


def segmenter(num_depths: int = 2) -> Segmenter:
    backbone = vit.build("vit_tiny_patch14", in_channels=3, image_size=56)
    depths = decoder.depths(num_depths, backbone.num_blocks)
    built = decoder.build("conv", dim=backbone.embed_dim, num_depths=num_depths, num_classes=3, width=16)
    return Segmenter(backbone, built, depths)


def test_scores_are_the_decoders_of_the_backbones_tokens_at_its_depths() -> None:
    torch.manual_seed(0)
    model, x = segmenter().eval(), torch.rand(2, 3, 56, 56)
    found = model(x)
    assert found.shape == (2, 3, 56, 56) and model.depths == (3, 6)
    tokens = torch.stack([model.encoder.at_depths(x, [depth])[0].patches for depth in (3, 6)])
    torch.testing.assert_close(found, model.decoder(tokens, 56))


@pytest.mark.parametrize("size", [56, 98, 224])  # 56 and 98 are no multiple of 16
def test_a_u_net_scores_every_pixel_of_any_size_and_its_seed_draws_it(size: int) -> None:
    model, x = SliceUNet(3, 4, seed=1).eval(), torch.rand(1, 3, size, size)
    assert model(x).shape == (1, 4, size, size)
    assert torch.equal(model(x), SliceUNet(3, 4, seed=1).eval()(x))
    assert not torch.equal(model(x), SliceUNet(3, 4, seed=2).eval()(x))
    assert 1.9e6 < sum(p.numel() for p in model.parameters()) < 2.1e6  # as docs and docstring say


def test_a_layer_learns_at_the_decay_to_the_power_of_the_layers_above_it_and_the_decoder_at_its_own() -> None:
    model = segmenter()
    groups = parameter_groups(model, lr=1e-4, decoder_lr=1e-3, layer_decay=0.5, weight_decay=0.01)
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == len(list(trained(model)))
    assert of[id(model.encoder.vit.patch_embed.proj.weight)]["lr"] == pytest.approx(1e-4 * 0.5**7)
    for index, block in enumerate(model.encoder.vit.blocks):
        (rate,) = {of[id(p)]["lr"] for p in block.parameters()}
        assert rate == pytest.approx(1e-4 * 0.5 ** (6 - index))
    assert {of[id(p)]["lr"] for p in model.decoder.parameters()} == {1e-3}
    assert {of[id(p)]["weight_decay"] for p in model.decoder.parameters()} == {0.01}
    assert of[id(model.encoder.vit.norm.bias)]["weight_decay"] == 0.0
    assert of[id(model.encoder.vit.blocks[0].mlp.fc1.weight)]["weight_decay"] == 0.01


def test_what_is_kept_of_low_rank_updates_is_they_the_decoder_and_its_statistics() -> None:
    model = segmenter()
    lora.add(model.encoder.vit, 2, 4.0)
    names = set(learnt(model))
    assert {n for n in names if n.startswith("encoder.")} == {
        f"encoder.vit.blocks.{k}.attn.{layer}.{part}"
        for k in range(6)
        for layer in ("qkv", "proj")
        for part in ("up", "down")
    }
    assert {n.removeprefix("decoder.") for n in names if n.startswith("decoder.")} == set(
        model.decoder.state_dict()
    )
