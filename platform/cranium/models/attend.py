"""A probe that attends: cached slice features of a subject -> its class, tuned inside its own subjects only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cranium.models.pool import AttentionPool
from cranium.models.probe import inner_folds

Array = NDArray[Any]


class Bags(NamedTuple):
    """Slice features [M, D] and the subject [M] of each, 0..n-1 in rising order."""

    values: Array
    subject: Array

    def of(self, rows: Array) -> Bags:
        """The bags of the subjects `rows` [m], numbered anew in that order."""
        first = np.searchsorted(self.subject, rows)
        last = np.searchsorted(self.subject, rows, side="right")
        take = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        return Bags(self.values[take], np.repeat(np.arange(len(rows)), last - first))


@dataclass(frozen=True)
class Training:
    """How one probe is trained: AdamW on batches of subjects."""

    hidden: int
    lr: float
    batch_size: int
    look_every: int
    seed: int


class Network(nn.Module):
    """Logits of subjects from the standardised features of their slices."""

    def __init__(self, dim: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.pool = AttentionPool(dim, hidden)
        self.head = nn.Linear(dim, num_classes)
        nn.init.zeros_(self.head.weight)  # all classes equally likely at first
        nn.init.zeros_(self.head.bias)

    def forward(self, values: Tensor, subject: Tensor, count: int) -> Tensor:
        logits: Tensor = self.head(self.pool(values, subject, count).features)
        return logits


@dataclass(frozen=True)
class AttentionProbe:
    """A fitted probe; `chosen_by` says how its weight decay and number of steps were chosen."""

    model: Network
    mean: Array
    std: Array
    weight_decay: float
    steps: int
    chosen_by: str

    @torch.inference_mode()
    def predict(self, bags: Bags) -> Array:
        """Class probabilities [n, num_classes] of each bag."""
        place = next(self.model.parameters()).device
        values, subject = _tensors(bags, self.mean, self.std, place)
        logits = self.model(values, subject, int(bags.subject[-1]) + 1)
        probabilities: Array = logits.double().softmax(1).cpu().numpy()
        return probabilities

    @torch.inference_mode()
    def attention(self, bags: Bags) -> Array:
        """The weight [M] of each slice; those of a subject sum to 1."""
        place = next(self.model.parameters()).device
        values, subject = _tensors(bags, self.mean, self.std, place)
        weights: Array = self.model.pool(values, subject).weights.double().cpu().numpy()
        return weights


def fit_attention(
    bags: Bags,
    labels: Array,
    how: Training,
    *,
    weight_decays: Sequence[float],
    steps: int,
    folds: int,
    num_classes: int,
    device: str = "cpu",
) -> AttentionProbe:
    """Gated attention pooling (`pool.AttentionPool`) and a linear layer on standardised slice features.

    The weight decay and the number of steps (a multiple of `look_every`) with the lowest held-out log-loss over inner
    stratified folds of these subjects win (the stronger decay, then fewer steps, at a tie); the probe is then trained
    on all of them. With fewer than two subjects of a class there is nothing to choose by: the middle values are used.
    Raises ValueError for one class only.
    """
    labels = np.asarray(labels).astype(np.int64)
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError("a probe needs at least two classes among its labelled subjects")
    decays = sorted(weight_decays, reverse=True)
    looks = list(range(how.look_every, steps + 1, how.look_every)) or [steps]
    inner = min(folds, int(counts.min()))
    decay, chosen = decays[len(decays) // 2], looks[len(looks) // 2]
    chosen_by = f"the middle values: a class has {counts.min()} subject(s), too few for inner folds"
    if inner >= 2:
        losses = np.zeros((len(decays), len(looks)))
        for train, held in inner_folds(labels, np.arange(len(labels)), inner, how.seed):
            for k, value in enumerate(decays):
                states = _trained(bags.of(train), labels[train], how, value, looks[-1], num_classes, device)
                for look, probe in enumerate(states):
                    predicted = probe.predict(bags.of(held))[np.arange(len(held)), labels[held]]
                    losses[k, look] -= np.log(np.maximum(predicted, 1e-12)).sum()
        best = np.unravel_index(int(np.argmin(losses)), losses.shape)
        decay, chosen = decays[int(best[0])], looks[int(best[1])]
        chosen_by = f"log-loss over {inner} inner folds: weight decay {decay:g}, {chosen} steps"
    *_, last = _trained(bags, labels, how, decay, chosen, num_classes, device)
    return AttentionProbe(last.model, last.mean, last.std, decay, chosen, chosen_by)


def _trained(
    bags: Bags, labels: Array, how: Training, decay: float, steps: int, num_classes: int, device: str
) -> Iterator[AttentionProbe]:
    """The probe as it stands at every look and after the last step: one object that goes on learning."""
    mean, std = bags.values.mean(0, dtype=np.float64), bags.values.std(0, dtype=np.float64)
    std = np.where(std > 0, std, 1.0)
    rng = np.random.default_rng(how.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        model = Network(bags.values.shape[1], how.hidden, num_classes).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=how.lr, weight_decay=decay)
    queue: list[int] = []
    for step in range(1, steps + 1):
        if not queue:
            queue = rng.permutation(len(labels)).tolist()
        rows = np.array(queue[: how.batch_size])
        queue = queue[how.batch_size :]
        values, subject = _tensors(bags.of(rows), mean, std, torch.device(device))
        logits = model(values, subject, len(rows))
        loss = functional.cross_entropy(logits, torch.from_numpy(labels[rows]).to(device))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        if step % how.look_every == 0 or step == steps:
            yield AttentionProbe(model, mean, std, decay, step, "")


def _tensors(bags: Bags, mean: Array, std: Array, device: torch.device) -> tuple[Tensor, Tensor]:
    values = ((bags.values - mean) / std).astype(np.float32)
    return torch.from_numpy(values).to(device), torch.from_numpy(bags.subject.astype(np.int64)).to(device)
