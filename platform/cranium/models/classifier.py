"""A backbone, pooling over a subject's slices and a linear head; and its groups of parameters, by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cranium.models.cnn import SliceCNN
from cranium.models.pool import AttentionPool, max_pool, mean_pool
from cranium.models.vit import Backbone

Pool = Literal["mean", "max", "attention"]


class Classifier(nn.Module):
    """Logits [n, K] of n subjects from their slices [M, C*S, H, W], float in 0..1.

    features: of a ViT, `cls` and/or `patch_mean`, joined. The head starts at 2e-5 of a standard deviation, as
    RETFound's, so that all classes are equally likely at first.
    """

    def __init__(
        self,
        encoder: Backbone | SliceCNN,
        *,
        features: Sequence[str],
        pool: Pool,
        num_classes: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.features, self.pool = encoder, tuple(features), pool
        dim = encoder.embed_dim * (len(features) if isinstance(encoder, Backbone) else 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.attend = AttentionPool(dim) if pool == "attention" else None
            self.head = nn.Linear(dim, num_classes)
            nn.init.trunc_normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)

    @property
    def depth(self) -> int:
        return self.encoder.num_blocks if isinstance(self.encoder, Backbone) else 0

    def encode(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Slice features [M, D]; `keep` as `Backbone.forward` takes it."""
        if isinstance(self.encoder, SliceCNN):
            out: Tensor = self.encoder(x)
            return out
        tokens = self.encoder(x, keep=keep)
        named = {"cls": tokens.cls, "patch_mean": tokens.patches.mean(1)}
        return torch.cat([named[name] for name in self.features], 1)

    def classify(self, features: Tensor, subject: Tensor, count: int) -> Tensor:
        """Logits [count, K] of subjects from slice features [M, D], `subject` [M] int64 in 0..count-1."""
        if self.attend is not None:
            pooled = self.attend(features, subject, count).features
        else:
            pooled = (max_pool if self.pool == "max" else mean_pool)(features, subject, count)
        logits: Tensor = self.head(pooled)
        return logits

    def forward(self, x: Tensor, subject: Tensor, count: int, keep: Tensor | None = None) -> Tensor:
        return self.classify(self.encode(x, keep), subject, count)


def layer(name: str, depth: int) -> int:
    """0 for the ViT's embeddings, 1..depth for its blocks, depth + 1 for all above them (and for a CNN)."""
    parts = name.split(".")
    if parts[:2] == ["encoder", "vit"] and parts[2] in ("patch_embed", "cls_token", "pos_embed", "reg_token"):
        return 0
    if parts[:3] == ["encoder", "vit", "blocks"]:
        return int(parts[3]) + 1
    return depth + 1


def parameter_groups(model: Classifier, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups of what is trained: `lr_multiplier` is layer_decay ** (depth + 1 - layer), as in RETFound.

    No weight decay on vectors (biases, norms, LayerScale) nor on the class token and the position table.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trained(model):
        multiplier = layer_decay ** (model.depth + 1 - layer(name, model.depth))
        decay = 0.0 if undecayed(name, parameter) else weight_decay
        group = groups.setdefault(
            (multiplier, decay), {"params": [], "lr_multiplier": multiplier, "weight_decay": decay}
        )
        group["params"].append(parameter)
    return list(groups.values())


def undecayed(name: str, parameter: Tensor) -> bool:
    return parameter.ndim <= 1 or name.endswith(("cls_token", "reg_token", "pos_embed"))


def trained(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """The parameters that are learnt; a backbone's mask token is of no use here."""
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad and not n.endswith("mask_token"))


def learnt(model: nn.Module) -> dict[str, Tensor]:
    """All that makes a network of the same start the trained one: what is trained, and statistics above the encoder."""
    buffers = ((n, b) for n, b in model.named_buffers() if not n.startswith("encoder."))
    return {name: tensor.detach() for name, tensor in (*trained(model), *buffers)}
