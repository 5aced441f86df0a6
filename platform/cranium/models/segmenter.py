"""Networks from slices to class scores of every pixel, all of which is trained; and their groups of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cranium.models.classifier import layer, trained, undecayed
from cranium.models.vit import Backbone


class Segmenter(nn.Module):
    """A backbone and a decoder on its patch tokens at `depths` (blocks, from 1)."""

    def __init__(self, encoder: Backbone, decoder: nn.Module, depths: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.decoder, self.depths = encoder, decoder, tuple(depths)
        self.patch_size = encoder.patch_size

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Scores [B, K, H, W] of slices [B, C*S, H, W], float in 0..1; `keep` as `Backbone.forward` takes it."""
        levels = self.encoder.at_depths(x, self.depths, keep)
        scores: Tensor = self.decoder(torch.stack([level.patches for level in levels]), x.shape[-1])
        return scores


class SliceUNet(nn.Module):
    """The plain baseline: MONAI's BasicUNet over slices (2 M parameters, instance normalisation), from scratch."""

    patch_size = 1  # any image size will do

    def __init__(self, in_channels: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        from monai.networks.nets import BasicUNet  # here: it takes seconds, which only this should pay

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = BasicUNet(2, in_channels, num_classes)

    @property
    def classify(self) -> nn.Conv2d:
        """The last layer."""
        last = self.net.final_conv
        assert isinstance(last, nn.Conv2d)
        return last

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Scores [B, K, H, W] of slices [B, C*S, H, W], float in 0..1; it has no branches to drop."""
        scores: Tensor = self.net(2 * x - 1)
        return scores


def parameter_groups(
    model: Segmenter | SliceUNet, *, lr: float, decoder_lr: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups of what is trained, with the rate and the weight decay of each.

    Of a backbone `lr` is the last layer's rate, and of each layer below it `layer_decay` times that above; the decoder
    has `decoder_lr` and decays as one on frozen tokens does: all of it. A U-Net has `lr` throughout.
    """
    depth = model.encoder.num_blocks if isinstance(model, Segmenter) else 0
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trained(model):
        decodes = name.startswith("decoder.")
        rate = decoder_lr if decodes else lr * layer_decay ** (depth + 1 - layer(name, depth))
        decay = 0.0 if not decodes and undecayed(name, parameter) else weight_decay
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())
