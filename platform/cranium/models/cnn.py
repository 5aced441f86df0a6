"""The plain baseline: a small ResNet over slices, from scratch."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn


class SliceCNN(nn.Module):
    """timm's ResNet-10-t (5 M parameters) with group normalisation: features [B, 512] of slices [B, C*S, H, W] in 0..1.

    Group, not batch, normalisation: a batch here is the slices of a few subjects, which are no sample of all.
    """

    patch_size = 1  # any image size will do

    def __init__(self, in_channels: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = timm.create_model(
                "resnet10t",
                pretrained=False,
                in_chans=in_channels,
                num_classes=0,
                norm_layer=lambda channels, **_: nn.GroupNorm(8, channels),
            )
        self.embed_dim = int(self.net.num_features)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.net(2 * x - 1)
        return features
