"""A light decoder on the tokens of a frozen backbone, trained on slices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cranium import checkpoint, store, tokens
from cranium.config import Adaptation, Decoder
from cranium.models import decoder as decoders
from cranium.tasks import segmentation

Key = tuple[str, str]  # subject, session


@dataclass(frozen=True)
class Fitted:
    """What was learnt, on what, and how it went.

    `scores` gives those of a session's rows, [n, K, H, W] for every part of them; it is told where the session lies:
    a folder of tokens here, a shard set where a network learnt from the pixels.
    """

    scores: Callable[[Path, Key], Iterator[torch.Tensor]]
    model: nn.Module
    losses: list[float]
    slices: int
    positive: int
    source: checkpoint.Source | None = None  # of the weights that were trained further


def build(
    spec: Decoder, adaptation: Adaptation, *, dim: int, num_depths: int, num_classes: int, seed: int
) -> nn.Module:
    """The untrained decoder of a cell, drawn by its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return decoders.build(
            "linear" if adaptation == "linear" else "conv",
            dim=dim,
            num_depths=num_depths,
            num_classes=num_classes,
            width=spec.width,
        )


def fit(
    folder: Path,
    keys: Sequence[Key],
    labels: NDArray[np.uint8],
    spec: Decoder,
    adaptation: Adaptation,
    *,
    num_classes: int,
    seed: int,
) -> Fitted:
    """Train on the tokens in `folder` of the sessions `keys`, whose `labels` [n, H, W] are numbers of classes."""
    places, values = _tokens(folder)
    rows = np.concatenate([np.arange(places[key].start, places[key].stop) for key in keys])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dim, num_depths = values.shape[3], values.shape[1]
    model = build(spec, adaptation, dim=dim, num_depths=num_depths, num_classes=num_classes, seed=seed)
    model.to(device)
    covered = store.read_manifest(folder)["pixels"]
    inside = cropped(labels, covered)
    start_at_shares(model, inside, num_classes)
    positive = np.asarray(inside.any(axis=(1, 2)))

    def scores(of: NDArray[np.float16]) -> torch.Tensor:
        found: torch.Tensor = model(torch.from_numpy(of).to(device).float().transpose(0, 1), covered)
        return found

    def forward(_: int, batch: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        return scores(values[rows[batch]]), torch.from_numpy(inside[batch]).to(device)

    how = segmentation.Fit(spec.steps, spec.batch_size, spec.weight_decay, spec.warmup, spec.foreground, seed)
    model.train()
    losses = segmentation.fit(forward, positive, [{"params": list(model.parameters()), "lr": spec.lr}], how)
    model.eval()

    def predict(folder: Path, key: Key) -> Iterator[torch.Tensor]:
        of, every = _tokens(folder)
        for begin in range(of[key].start, of[key].stop, spec.batch_size):
            with torch.inference_mode():
                yield scores(np.array(every[begin : min(begin + spec.batch_size, of[key].stop)]))

    return Fitted(predict, model, losses, len(rows), int(positive.sum()))


def start_at_shares(model: nn.Module, labels: NDArray[np.uint8], num_classes: int) -> None:
    """Let `model`, or its decoder, start at the classes' shares of `labels` [n, H, W]."""
    shares = np.bincount(labels.ravel(), minlength=num_classes) / labels.size
    decoders.start_at(getattr(model, "decoder", model), shares.tolist())


def cropped(labels: NDArray[np.uint8], covered: int) -> NDArray[np.uint8]:
    """The middle of `labels` [n, H, W], `covered` pixels wide: what whole patches cover."""
    cut = (labels.shape[-1] - covered) // 2
    return labels[:, cut : cut + covered, cut : cut + covered]


def probabilities(parts: Iterator[torch.Tensor], size: int) -> NDArray[np.float32]:
    """Class probabilities [K, n, size, size]; the margin that no patch covers is background."""
    found = torch.cat([part.float().softmax(1).cpu() for part in parts])
    cut = (size - found.shape[-1]) // 2
    whole = torch.zeros(*found.shape[:2], size, size)
    whole[:, 0] = 1
    whole[:, :, cut : cut + found.shape[-1], cut : cut + found.shape[-1]] = found
    return np.ascontiguousarray(whole.transpose(0, 1).numpy())


@functools.lru_cache(maxsize=4)
def _tokens(folder: Path) -> tuple[dict[Key, slice], NDArray[np.float16]]:
    """Where each session's rows are, and all rows. Cached: a trial's process runs many cells."""
    rows, values = tokens.read(folder)
    places: dict[Key, slice] = {}
    for key, index in rows.groupby(["subject", "session"], sort=False).indices.items():
        places[key] = slice(int(index[0]), int(index[-1]) + 1)
    return places, values
