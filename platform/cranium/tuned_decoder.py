"""A network learns label maps from the pixels: a backbone under a decoder, or a U-Net from scratch.

As on frozen tokens nothing is chosen by looking at a result: the network of the last step is the one that is judged.
All labelled stacks are held in memory, as bytes: 200 kB a slice of three contrasts at 224 pixels, its labels included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cranium import augment, checkpoint, embed, frozen_decoder, sessions, tuning
from cranium.config import Adaptation, Decoder, UserError
from cranium.frozen_decoder import Fitted, Key
from cranium.models import decoder as decoders
from cranium.models import lora
from cranium.models.segmenter import Segmenter, SliceUNet, parameter_groups
from cranium.store import Artefact
from cranium.tasks import segmentation
from cranium.tuning import Start

RECIPE = 1
CHUNK = 16  # slices in one forward pass where nothing is learnt


def fit(
    start: Start,
    shard_set: Path,
    keys: Sequence[Key],
    labels: NDArray[np.uint8],
    spec: Decoder,
    adaptation: Adaptation,
    *,
    num_classes: int,
    seed: int,
) -> Fitted:
    """Train on the stacks of the sessions `keys`, whose `labels` [n, H, W] are numbers of classes."""
    stacks = _read(shard_set, keys, len(labels), start)
    shape, how = tuple(stacks.shape[1:]), spec.tuned
    model, source = build(start, spec, adaptation, shape, num_classes=num_classes, seed=seed)
    device, patch = next(model.parameters()).device, int(model.patch_size)
    covered = shape[-1] - shape[-1] % patch
    inside = frozen_decoder.cropped(labels, covered)
    frozen_decoder.start_at_shares(model, inside, num_classes)
    positive = np.asarray(inside.any(axis=(1, 2)))
    drawn = torch.from_numpy(labels)
    rates = {"finetune": how.lr, "lora": how.lora_lr}
    groups = parameter_groups(
        model,
        lr=how.cnn_lr if start.init == "cnn" else rates[adaptation],
        decoder_lr=spec.lr,
        layer_decay=how.layer_decay,
        weight_decay=spec.weight_decay,
    )

    def forward(step: int, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        rng, index = np.random.default_rng([seed, 13, step]), torch.from_numpy(rows)
        x, wanted = stacks[index].to(device).float() / 255, drawn[index].to(device)
        x, wanted = augment.with_labels(x, wanted, how.augment, rng)
        keep = None
        if isinstance(model, Segmenter) and model.encoder.drop_path:
            branches = (2 * model.encoder.num_blocks, len(rows))
            keep = torch.from_numpy(rng.random(branches) >= model.encoder.drop_path)
        with tuning.autocast(device, how.precision):
            scores = model(embed.fit(x.flatten(1, 2), patch), keep)
        return scores, embed.fit(wanted[:, None], patch)[:, 0]

    model.train()
    losses = segmentation.fit(
        forward,
        positive,
        groups,
        segmentation.Fit(how.steps, how.batch_size, spec.weight_decay, spec.warmup, spec.foreground, seed),
    )
    model.eval()

    def predict(shard_set: Path, key: Key) -> Iterator[Tensor]:
        (seen,) = sessions.read(shard_set, [key], fill=start.fill)
        return scores(model, seen, spec)

    return Fitted(predict, model, losses, len(labels), int(positive.sum()), source)


def build(
    start: Start,
    spec: Decoder,
    adaptation: Adaptation,
    shape: Sequence[int],
    *,
    num_classes: int,
    seed: int,
) -> tuple[Segmenter | SliceUNet, checkpoint.Source | None]:
    """The network of a cell before it learns, for stacks of `shape` [C, S, H, W], on the device there is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    channels, slices, size = shape[:3]
    if start.init == "cnn":
        return SliceUNet(channels * slices, num_classes, start.seed).to(device), None
    encoder, source = checkpoint.load_backbone(
        start.init,
        arch=start.arch,
        in_channels=channels * slices,
        image_size=size,
        drop_path=spec.tuned.drop_path if adaptation == "finetune" else 0.0,
        seed=start.seed,
        weights_file=start.weights,
        pretrained=Artefact(start.pretrained) if start.pretrained else None,
    )
    if adaptation == "lora":
        lora.add(encoder.vit, spec.tuned.rank, spec.tuned.alpha, seed)
    try:
        depths = decoders.depths(spec.num_depths(adaptation), encoder.num_blocks)
    except ValueError as error:
        raise UserError("CONFIG", f"adapt.decoder.depths: {error} ({start.arch})") from None
    decoder = frozen_decoder.build(
        spec, adaptation, dim=encoder.embed_dim, num_depths=len(depths), num_classes=num_classes, seed=seed
    )
    return Segmenter(encoder, decoder, depths).to(device), source


@torch.inference_mode()
def scores(model: Segmenter | SliceUNet, stacks: Tensor, spec: Decoder) -> Iterator[Tensor]:
    """Class scores [n, K, side, side] of stacks uint8 [n, C, S, H, W], part by part."""
    device = next(model.parameters()).device
    for begin in range(0, len(stacks), CHUNK):
        x = stacks[begin : begin + CHUNK].to(device).flatten(1, 2).float() / 255
        with tuning.autocast(device, spec.tuned.precision):
            part: Tensor = model(embed.fit(x, int(model.patch_size)))
        yield part.float()


def _read(shard_set: Path, keys: Sequence[Key], rows: int, start: Start) -> Tensor:
    """All stacks of these sessions, uint8 [rows, C, S, H, W], in their order: once in memory, not twice."""
    stacks, row = torch.empty(0), 0
    for part in sessions.read(shard_set, keys, fill=start.fill):
        if not row:
            stacks = torch.empty(rows, *part.shape[1:], dtype=part.dtype)
        stacks[row : row + len(part)] = part
        row += len(part)
    if row != rows:
        raise RuntimeError(f"{shard_set}: {row} stacks for {rows} slices with labels")
    return stacks
