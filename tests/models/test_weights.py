"""Weights: every tensor fits, or is refused by name; an inflated network gives the RGB network's tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cranium.models import vit, weights


def _rgb(seed: int = 0, arch: str = "vit_tiny_patch14", **options: int) -> vit.Backbone:
    torch.manual_seed(seed)
    return vit.build(arch, image_size=options.pop("image_size", 56), **options).double().eval()


def _timm(backbone: vit.Backbone) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.vit.state_dict().items()}


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 9, 15])
def test_a_replicated_grey_image_gives_the_rgb_tokens(channels: int) -> None:
    source, target = _rgb(0), _rgb(1, in_channels=channels)
    report = weights.load_into(target, _timm(source))
    grey = torch.rand(2, 1, 56, 56, dtype=torch.float64)
    with torch.no_grad():
        expected = source(grey.expand(-1, 3, -1, -1))
        got = target(grey.expand(-1, channels, -1, -1))
    torch.testing.assert_close(got.cls, expected.cls, rtol=0, atol=2e-7)  # statistics are stored in fp32
    torch.testing.assert_close(got.patches, expected.patches, rtol=0, atol=2e-7)
    assert any("inflated" in line for line in report.exceptions) == (channels != 3)


@pytest.mark.parametrize("contrasts", [1, 2, 3, 4])
def test_three_neighbours_of_each_contrast_are_seen_as_colours_are_and_averaged(contrasts: int) -> None:
    """A convolution is linear: the patch of a stack [C, 3] is the mean of the RGB patches of its contrasts."""
    source, target = _rgb(0), _rgb(1, in_channels=3 * contrasts)
    weights.load_into(target, _timm(source))
    stacks = torch.rand(2, contrasts, 3, 56, 56, dtype=torch.float64)

    def patches(of: vit.Backbone, images: Tensor) -> Tensor:
        return of.vit.patch_embed((images - of.mean[:, None, None]) / of.std[:, None, None])

    with torch.no_grad():
        each = [patches(source, stacks[:, c]) for c in range(contrasts)]
        got = patches(target, stacks.flatten(1, 2))
    torch.testing.assert_close(got, torch.stack(each).mean(dim=0), rtol=0, atol=2e-7)


def test_inflation_by_hand() -> None:
    weight = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    assert weights.inflate_patch_embedding(weight, 3).flatten().tolist() == [1, 2, 4]
    assert weights.inflate_patch_embedding(weight, 6).flatten().tolist() == [0.5, 1, 2, 0.5, 1, 2]
    assert weights.inflate_patch_embedding(weight, 1).flatten().tolist() == [7]
    assert weights.inflate_patch_embedding(weight, 4).flatten().tolist() == [1.75] * 4
    with pytest.raises(ValueError, match="RGB"):
        weights.inflate_patch_embedding(weight[:, :2], 3)


def test_timm_names_load_whole_and_the_report_counts() -> None:
    source, target = _rgb(0), _rgb(1)
    state = _timm(source) | {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}
    report = weights.load_into(target, state)
    assert report.exceptions == ("head dropped: head (2 tensors)", "mask_token absent: kept at zero")
    assert report.loaded == report.total - 1 == len(target.state_dict()) - 1
    assert "mask_token absent" in str(report)
    for name, tensor in source.vit.state_dict().items():
        assert torch.equal(target.vit.state_dict()[name], tensor)


def test_our_own_export_loads_without_exceptions() -> None:
    source, target = _rgb(0, in_channels=1), _rgb(1, in_channels=1)
    torch.nn.init.normal_(source.mask_token)
    source.mean += 0.1
    report = weights.load_into(target, source.state_dict())
    assert report == weights.LoadReport(report.total, report.total, (), "cranium")
    assert torch.equal(target.mask_token, source.mask_token)
    assert torch.equal(target.mean, source.mean)


def test_official_names_with_registers_give_the_same_sum() -> None:
    source, target = _rgb(0, "vit_tiny_patch14_reg4"), _rgb(1, "vit_tiny_patch14_reg4")
    state = _timm(source)
    # The official layout: one CLS entry in the table, the mask token [1, D], other register names.
    entry = torch.rand(1, 1, 192, dtype=torch.float64)
    state["pos_embed"] = torch.cat([entry, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - entry
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.full((1, 192), 0.5, dtype=torch.float64)
    report = weights.load_into(target, state)
    assert report.exceptions == () and report.loaded == report.total
    assert target.mask_token.tolist() == [0.5] * 192
    x = torch.rand(1, 3, 56, 56, dtype=torch.float64)
    torch.testing.assert_close(target(x).cls, source(x).cls)


def test_a_resampled_table_keeps_the_prefix_and_a_constant() -> None:
    source, target = _rgb(0), _rgb(1, image_size=84)
    state = _timm(source)
    state["pos_embed"][:, 1:] = 3.0
    report = weights.load_into(target, state)
    assert "position table resampled: 16 to 36 patches, rule timm" in report.exceptions
    assert torch.equal(target.vit.pos_embed[:, :1], state["pos_embed"][:, :1])
    torch.testing.assert_close(target.vit.pos_embed[:, 1:].float(), torch.full((1, 36, 192), 3.0))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda s: s.pop("blocks.3.attn.qkv.weight"), "missing vit.blocks.3.attn.qkv.weight"),
        (lambda s: s.update({"blocks.9.norm1.bias": torch.zeros(1)}), "unexpected vit.blocks.9.norm1.bias"),
        (lambda s: s.update({"norm.bias": torch.zeros(7)}), "mis-shaped vit.norm.bias"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 17, 7)}), "mis-shaped vit.pos_embed"),
        (
            lambda s: s.update({"patch_embed.proj.weight": torch.zeros(192, 5, 14, 14)}),
            "mis-shaped vit.patch_embed",
        ),
        (lambda s: s.update({"mask_token": torch.zeros(7)}), "mis-shaped mask_token"),
        (lambda s: s["norm.bias"].fill_(float("nan")), "not finite vit.norm.bias"),
    ],
)
def test_anything_else_is_refused_by_name_and_changes_nothing(spoil, named: str) -> None:  # type: ignore[no-untyped-def]
    state, target = _timm(_rgb(0)), _rgb(1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    spoil(state)
    with pytest.raises(ValueError, match=named):
        weights.load_into(target, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
