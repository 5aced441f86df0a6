"""Backbones: equal to timm's, masks, stochastic depth by an explicit mask."""

from __future__ import annotations

import pytest
import torch

from cranium.models import vit


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("vit_tiny_patch14", 56),
        ("vit_tiny_patch14_reg4", 42),
        ("vit_small_patch14_dinov2", 98),
        ("vit_small_patch14_reg4_dinov2", 42),
        ("vit_small_patch16_224", 64),
    ],
)
def test_tokens_are_those_of_timm_under_its_position_rule(arch: str, size: int) -> None:
    torch.manual_seed(0)
    backbone = vit.build(arch, image_size=56, position="timm").eval()
    x = torch.rand(2, 3, size, size)
    spec = vit.ARCHITECTURES[arch]
    mean, std = (torch.tensor(values)[:, None, None] for values in spec.statistics)
    with torch.no_grad():
        tokens = backbone(x)
        expected = backbone.vit.forward_features((x - mean) / std)
    assert torch.equal(tokens.cls, expected[:, 0])
    assert torch.equal(tokens.patches, expected[:, 1 + spec.registers :])
    assert tokens.patches.shape[1] == backbone.num_patches(size)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_dinov2_position_tables_are_those_of_518_pixels(size: str) -> None:
    with torch.device("meta"):
        backbone = vit.build(f"vit_{size}_patch14_dinov2")
        registers = vit.build(f"vit_{size}_patch14_reg4_dinov2")
    assert backbone.vit.pos_embed.shape == (1, 1 + 37 * 37, backbone.embed_dim)
    assert registers.vit.pos_embed.shape == (1, 37 * 37, backbone.embed_dim)
    assert registers.vit.reg_token.shape == (1, 4, backbone.embed_dim)
    assert backbone.num_blocks == registers.num_blocks == (24 if size == "large" else 12)
    assert {block.ls2.gamma.shape for block in backbone.vit.blocks} == {(backbone.embed_dim,)}


def test_a_masked_patch_cannot_be_seen() -> None:
    torch.manual_seed(0)
    backbone = vit.build("vit_tiny_patch14", image_size=56).eval()
    torch.nn.init.normal_(backbone.mask_token)
    x = torch.rand(1, 3, 56, 56)
    other = x.clone()
    other[:, :, 14:28, 28:42] = torch.rand(1, 3, 14, 14)
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, 1 * 4 + 2] = True
    with torch.no_grad():
        assert torch.equal(backbone(x, masks).patches, backbone(other, masks).patches)
        assert not torch.allclose(backbone(x).patches, backbone(other).patches)
        moved = backbone(x, masks).cls
        backbone.mask_token += 1.0
        assert not torch.allclose(backbone(x, masks).cls, moved)


def test_keeping_all_rows_at_rate_zero_is_the_plain_forward() -> None:
    torch.manual_seed(0)
    backbone = vit.build("vit_tiny_patch14", image_size=56)
    x = torch.rand(3, 3, 56, 56)
    keep = torch.ones(12, 3, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(backbone(x, None, keep).patches, backbone(x).patches)


def test_stochastic_depth_equals_a_loop_over_rows() -> None:
    torch.manual_seed(0)
    rate = 0.25
    backbone = vit.build("vit_tiny_patch14", image_size=56, drop_path=rate).double()
    keep = torch.rand(12, 5) >= rate
    keep[3] = False  # a branch that no row takes
    keep[4] = True
    x = torch.rand(5, 3, 56, 56, dtype=torch.float64)
    got = backbone(x, None, keep).patches
    net = backbone.vit
    for row in range(5):
        y = net._pos_embed(
            net.patch_embed(((x - backbone.mean[:, None, None]) / backbone.std[:, None, None])[[row]])
        )
        for index, block in enumerate(net.blocks):
            y = y + keep[2 * index, row] / (1 - rate) * block.ls1(block.attn(block.norm1(y)))
            y = y + keep[2 * index + 1, row] / (1 - rate) * block.ls2(block.mlp(block.norm2(y)))
        torch.testing.assert_close(got[[row]], net.norm(y)[:, 1:])
    got.sum().backward()
    untouched = net.blocks[1].mlp.fc1.weight.grad
    assert untouched is not None and not untouched.any()


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("resnet50", {}, "unknown architecture"),
        ("vit_tiny_patch14", {"image_size": 100}, "multiple"),
        ("vit_tiny_patch14", {"drop_path": 1.0}, "drop_path"),
        ("vit_tiny_patch14", {"in_channels": 0}, "in_channels"),
    ],
)
def test_impossible_backbones_are_refused(arch: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vit.build(arch, **options)  # type: ignore[arg-type]
    backbone = vit.build("vit_tiny_patch14", image_size=56)
    with pytest.raises(ValueError, match="patch size"):
        backbone.num_patches(100)
