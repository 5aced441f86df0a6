from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cranium.models import decoder, vit


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(("arch", "size"), [("vit_tiny_patch14", 56), ("vit_small_patch16_224", 64)])
def test_scores_of_every_pixel_from_any_patch_size(kind: decoder.Kind, arch: str, size: int) -> None:
    backbone = vit.build(arch, in_channels=1, image_size=size).eval()
    chosen = decoder.depths(3 if kind == "conv" else 1, backbone.num_blocks)
    made = decoder.build(kind, dim=backbone.embed_dim, num_depths=len(chosen), num_classes=3, width=16)
    with torch.no_grad():
        levels = backbone.at_depths(torch.rand(2, 1, size, size), chosen)
    scores = made(torch.stack([level.patches for level in levels]), size)
    assert scores.shape == (2, 3, size, size)
    scores.sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_the_linear_decoder_is_a_matrix_on_each_patch_then_bilinear() -> None:
    torch.manual_seed(0)
    made = decoder.LinearDecoder(5, 2).eval()
    made.norm.running_mean.uniform_(-1, 1)
    made.norm.running_var.uniform_(0.5, 2)
    tokens = torch.rand(1, 3, 16, 5)
    normed = (tokens[0] - made.norm.running_mean) / (made.norm.running_var + 1e-5).sqrt()
    scores = normed @ made.classify.weight[:, :, 0, 0].T + made.classify.bias  # [B, N, K]
    low = scores.transpose(1, 2).reshape(3, 2, 4, 4)
    assert torch.allclose(made(tokens, 4), low, atol=1e-6)  # one pixel a patch
    expected = functional.interpolate(low, (56, 56), mode="bilinear")
    assert torch.allclose(made(tokens, 56), expected, atol=1e-6)


def test_a_patch_stays_where_it_is() -> None:
    """Row-major patches: what stands in the last patch of the first row shows in the top right corner."""
    made = decoder.LinearDecoder(1, 2).eval()
    made.classify.weight.data[:] = torch.tensor([[[[-1.0]]], [[[1.0]]]])
    made.classify.bias.data.zero_()
    tokens = torch.full((1, 1, 16, 1), -1.0)
    tokens[0, 0, 3] = 1.0
    found = made(tokens, 56).argmax(1)[0]
    rows, columns = torch.nonzero(found, as_tuple=True)
    assert rows.max() < 28 and columns.min() > 28 and found[0, -1] == 1


def test_depths_are_spread_and_end_with_the_last() -> None:
    assert decoder.depths(1, 12) == (12,)
    assert decoder.depths(4, 12) == (3, 6, 9, 12)
    assert decoder.depths(4, 24) == (6, 12, 18, 24)
    assert decoder.depths(4, 6) == (2, 3, 4, 6)
    with pytest.raises(ValueError, match="no 7 depths"):
        decoder.depths(7, 6)


def test_tokens_at_depths_are_those_on_the_way_to_the_last() -> None:
    torch.manual_seed(0)
    backbone = vit.build("vit_tiny_patch14", in_channels=2, image_size=28).eval()
    x = torch.rand(2, 2, 28, 28)
    with torch.no_grad():
        whole, (second, last) = backbone(x), backbone.at_depths(x, (2, 6))
        assert torch.equal(last.patches, whole.patches) and torch.equal(last.cls, whole.cls)
        # timm's own way to the second block, with its last norm
        from_timm = backbone.vit.forward_intermediates(
            (x - backbone.mean[:, None, None]) / backbone.std[:, None, None],
            indices=[1],
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
    assert torch.allclose(second.patches, from_timm[0], atol=1e-5)
    for wrong in ((), (0,), (7,), (3, 2), (2, 2)):
        with pytest.raises(ValueError, match="rise within 1 to 6"):
            backbone.at_depths(x, wrong)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_decoder_starts_at_the_shares_of_the_classes(kind: decoder.Kind) -> None:
    made = decoder.build(kind, dim=6, num_depths=2, num_classes=3, width=8)
    decoder.start_at(made, [0.9, 0.08, 0.02])
    probabilities = made(torch.rand(2, 2, 16, 6), 20).softmax(1)
    expected = torch.tensor([0.9, 0.08, 0.02])[None, :, None, None].expand_as(probabilities)
    assert torch.allclose(probabilities, expected, atol=1e-6)


def test_no_square_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="15 patches"):
        decoder.as_maps(torch.zeros(1, 1, 15, 4))
