"""LoRA: the model as it was at first, and only thin updates learnt."""

from __future__ import annotations

import copy

import torch

from cranium.models import lora, vit


def tiny() -> vit.Backbone:
    torch.manual_seed(0)
    return vit.build("vit_tiny_patch14", in_channels=3, image_size=28).eval()


def test_it_starts_as_the_model_it_is_added_to() -> None:
    base, updated = tiny(), tiny()
    lora.add(updated.vit, rank=8, alpha=16)
    x = torch.rand(2, 3, 28, 28)
    assert torch.equal(base(x).cls, updated(x).cls) and torch.equal(base(x).patches, updated(x).patches)


def test_only_its_own_parameters_are_learnt_and_there_are_as_many_as_the_ranks_say() -> None:
    model = tiny()
    before = copy.deepcopy({n: p.detach() for n, p in model.named_parameters()})
    lora.add(model.vit, rank=4, alpha=8)
    learnt = [(n, p) for n, p in model.named_parameters() if p.requires_grad and n != "mask_token"]
    assert {n.rsplit(".", 1)[1] for n, _ in learnt} == {"down", "up"}
    width, depth, rank = 192, 6, 4
    assert sum(p.numel() for _, p in learnt) == depth * rank * ((width + 3 * width) + (width + width))
    optimiser = torch.optim.AdamW([p for _, p in learnt], lr=1e-2)
    for _ in range(2):  # `down` gets a gradient once `up` is not zero
        model(torch.rand(2, 3, 28, 28)).cls.square().sum().backward()
        optimiser.step()
    after = {n.replace(".frozen", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(bool(p.detach().any()) for n, p in learnt if n.endswith("up"))


def test_an_update_is_the_product_of_two_thin_matrices_scaled() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5)
    updated = lora.LowRank(layer, rank=2, alpha=3.0)
    torch.nn.init.normal_(updated.up)
    whole = layer.weight + 3.0 / 2 * updated.up @ updated.down
    x = torch.rand(4, 6)
    torch.testing.assert_close(updated(x), x @ whole.T + layer.bias)
