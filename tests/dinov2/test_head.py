"""The projection head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cranium.dinov2.head import Head


def test_scores_are_cosines_to_the_prototypes() -> None:
    torch.manual_seed(0)
    head = Head(6, 8, 4, 10)
    tokens = torch.randn(3, 5, 6)
    z = head.mlp(tokens)
    expected = nn.functional.cosine_similarity(z[..., None, :], head.prototypes, dim=-1)
    torch.testing.assert_close(head(tokens), expected)
    with torch.no_grad():
        head.prototypes *= 7.0
    torch.testing.assert_close(head(tokens), expected)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers(layers: int) -> None:
    head = Head(6, 8, 4, 10, layers=layers)
    assert sum(isinstance(module, nn.Linear) for module in head.mlp) == layers
    assert isinstance(head.mlp[-1], nn.Linear)


def test_a_rate_of_zero_freezes_the_prototypes_even_under_weight_decay() -> None:
    """How the loop freezes the last layer at first: its group's learning rate is 0."""
    head = Head(6, 8, 4, 10)
    before = head.prototypes.detach().clone()
    groups = [{"params": [head.prototypes], "lr": 0.0}, {"params": list(head.mlp.parameters())}]
    optimiser = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    first = head.mlp[0].weight.detach().clone()
    head(torch.randn(3, 6)).square().sum().backward()
    optimiser.step()
    assert torch.equal(head.prototypes, before)
    assert not torch.equal(head.mlp[0].weight, first)


def test_no_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        Head(6, 8, 4, 10, layers=0)
