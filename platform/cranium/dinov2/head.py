"""The projection head: from a token to scores over prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """MLP with GELU, L2 normalisation, then scores against weight-normalised `prototypes` (DINO, section 3.1).

    With `unit_prototypes` their norms stay 1 (DINO's `norm_last_layer`, the stable choice for small batches), so
    scores are cosines; without, the norms start at 1 and learn, as in the official DINOv2.
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int,
        bottleneck: int,
        prototypes: int,
        layers: int = 3,
        *,
        unit_prototypes: bool = True,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"a head needs at least one layer, got {layers}")
        widths = [in_dim, *[hidden] * (layers - 1), bottleneck]
        modules: list[nn.Module] = []
        for index in range(layers):
            modules += [nn.Linear(widths[index], widths[index + 1]), nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-1])
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.kaiming_uniform_(self.prototypes, a=5**0.5)
        self.prototype_norms = None if unit_prototypes else nn.Parameter(torch.ones(prototypes, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores [..., K] of `tokens` [..., D]."""
        directions = F.normalize(self.prototypes, dim=-1)
        if self.prototype_norms is not None:
            directions = directions * self.prototype_norms
        return F.linear(F.normalize(self.mlp(tokens), dim=-1), directions)
