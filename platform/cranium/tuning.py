"""Fine-tuning: a network learns from the stacks of a cell's labelled subjects, by the recipe of RETFound.

In: shard sets, the subjects that may be learnt from, where the weights start. Out: class probabilities of other
subjects. Labels are per subject: a step draws some slices of each, a score pools all that are used. The epoch is
selected on subjects held out of the labelled ones; test subjects are seen once, with the selected weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from cranium import checkpoint, embed, place, sessions
from cranium.augment import augment
from cranium.config import Fill, Finetune, Lora, UserError
from cranium.models import lora
from cranium.models.classifier import Classifier, Pool, learnt, parameter_groups, trained
from cranium.models.cnn import SliceCNN
from cranium.models.vit import Backbone
from cranium.store import Artefact
from cranium.tasks import metrics, splits

Array = NDArray[Any]
RECIPE = 1
CHUNK = 64  # slices in one forward pass where nothing is learnt
Tell = Callable[[float, float], None]  # AUROC and log-loss of the validation subjects after an epoch


@dataclass(frozen=True)
class Start:
    """Where a network starts: plain values, as a trial is handed them."""

    init: str
    arch: str
    seed: int  # of a random start
    features: tuple[str, ...]
    fill: Fill
    weights: Path | None = None
    pretrained: Path | None = None


class Examples(NamedTuple):
    """Subjects in memory: uint8 [k, C, S, H, W] of each, k its own, and their classes [n]."""

    stacks: list[Tensor]
    labels: Array


@dataclass(frozen=True)
class Curve:
    """How a fit went: the epoch that was selected, why, and the losses and validation AUROC of every epoch."""

    epoch: int
    chosen_by: str
    loss: tuple[float, ...]
    validation_auroc: tuple[float, ...]


@dataclass(frozen=True)
class Tuned:
    """A trained network; `held_out` are the labelled subjects that the epoch was selected on."""

    model: Classifier
    curve: Curve
    held_out: tuple[str, ...]
    start: Start
    spec: Finetune
    source: checkpoint.Source | None  # of the weights it started from; None: a CNN from scratch

    def predict(self, shard_set: Path, table: pd.DataFrame, contrasts: Sequence[str] | None = None) -> Array:
        """Class probabilities [n, K] of the sessions in `table`, in its order; only `contrasts` are seen."""
        every = _read(self.start, self.spec, shard_set, table, contrasts)
        return np.concatenate([probabilities(self.model, [stacks], self.spec) for stacks in every])


def learn(
    start: Start,
    spec: Finetune,
    shard_set: Path,
    labelled: pd.DataFrame,
    *,
    pool: Pool,
    num_classes: int,
    seed: int,
    tell: Tell | None = None,
    contrasts: Sequence[str] | None = None,
) -> Tuned:
    """Fine-tune on the subjects of `labelled` (subject, session, label, matched), a part of which selects the epoch.

    Only `contrasts` are seen; None: all that is there.
    """
    held = hold_out(labelled, spec.validation, seed)
    rows = list(_read(start, spec, shard_set, labelled, contrasts))
    labels, out = labelled["label"].to_numpy(), labelled["subject"].isin(held).to_numpy()
    train = Examples([r for r, o in zip(rows, out, strict=True) if not o], labels[~out])
    validation = Examples([r for r, o in zip(rows, out, strict=True) if o], labels[out])
    shape = tuple(rows[0].shape[1:])
    model, source = build(start, spec, shape, pool=pool, num_classes=num_classes, seed=seed)
    curve = fit(model, train, validation if held else None, spec, seed, tell)
    return Tuned(model, curve, tuple(held), start, spec, source)


def build(
    start: Start, spec: Finetune, shape: Sequence[int], *, pool: Pool, num_classes: int, seed: int
) -> tuple[Classifier, checkpoint.Source | None]:
    """The network of a cell before it learns, for stacks of `shape` [C, S, H, W], on the device there is."""
    channels, slices, size = shape[:3]
    encoder, source = _encoder(start, spec, channels * slices, size)
    if isinstance(spec, Lora) and isinstance(encoder, Backbone):
        lora.add(encoder.vit, spec.rank, spec.alpha, seed)
    model = Classifier(encoder, features=start.features, pool=pool, num_classes=num_classes, seed=seed)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), source


def began(start: Start, source: checkpoint.Source | None) -> dict[str, Any]:
    """What a manifest says of where a network started: enough to build it again."""
    facts = {name: v for name, v in asdict(start).items() if name not in ("weights", "pretrained")}
    return facts | {"source": source and asdict(source)}


def again(facts: Mapping[str, Any], weights: Path | None, pretrained: Path | None) -> Start:
    """The start that `began` wrote down."""
    own = {name: value for name, value in facts.items() if name != "source"}
    return Start(**(own | {"features": tuple(own["features"])}), weights=weights, pretrained=pretrained)


def save(model: nn.Module, path: Path) -> None:
    """Keep what was learnt, and nothing that `build` makes again: of LoRA the updates, not the backbone below."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.cpu().contiguous() for name, tensor in learnt(model).items()}
    place.publish(path, lambda beside: save_file(kept, beside))


def load(model: nn.Module, path: Path) -> None:
    """Give a network that `build` made what `save` kept of the one that learnt. Raises `UserError(WEIGHTS_MISFIT)`."""
    kept, ours = load_file(path), learnt(model)
    if {n: t.shape for n, t in kept.items()} != {n: t.shape for n, t in ours.items()}:
        raise UserError(
            "WEIGHTS_MISFIT", f"{path} holds other tensors than this cell's network; run it again"
        )
    for name, tensor in ours.items():
        tensor.copy_(kept[name])


def _read(
    start: Start, spec: Finetune, shard_set: Path, table: pd.DataFrame, contrasts: Sequence[str] | None
) -> Iterator[Tensor]:
    keys = zip(table["subject"], table["session"], strict=True)
    return sessions.read(shard_set, keys, most=spec.max_slices, fill=start.fill, contrasts=contrasts)


def _encoder(
    start: Start, spec: Finetune, in_channels: int, size: int
) -> tuple[Backbone | SliceCNN, checkpoint.Source | None]:
    if start.init == "cnn":
        return SliceCNN(in_channels, start.seed), None
    return checkpoint.load_backbone(
        start.init,
        arch=start.arch,
        in_channels=in_channels,
        image_size=size,
        drop_path=spec.drop_path,
        seed=start.seed,
        weights_file=start.weights,
        pretrained=Artefact(start.pretrained) if start.pretrained else None,
    )


def hold_out(labelled: pd.DataFrame, share: float, seed: int) -> list[str]:
    """The labelled subjects that select the epoch: about `share` of each class, matched sets whole, no fewer than one.

    Empty when a class has one group only: then nobody can be spared. Depends on the subjects and the seed alone, so
    it is the same for every initialisation.
    """
    groups = labelled.groupby("label")["matched"].nunique()
    num_folds = min(round(1 / share), int(groups.min()))
    if num_folds < 2:
        return []
    ids, labels = labelled["subject"].tolist(), labelled["label"].to_numpy()
    try:
        of = splits.folds(ids, labels, labelled["matched"].tolist(), num_folds, seed)
    except ValueError:  # matched sets that cannot be spread over so many folds
        return []
    return sorted(subject for subject, fold in of.items() if fold == 0)


# ---- learning -------------------------------------------------------------------------------------------------------


def fit(
    model: Classifier,
    train: Examples,
    validation: Examples | None,
    spec: Finetune,
    seed: int,
    tell: Tell | None = None,
) -> Curve:
    """Train `model` in place and leave it with the weights of the selected epoch.

    Selected is the epoch with the highest validation AUROC (macro one-vs-rest), of equals the one with the lowest
    validation loss, then the earliest; without validation subjects it is the last. Every draw is a function of `seed`,
    so on a CPU the same call gives the same weights.
    """
    device = next(model.parameters()).device
    weights = torch.from_numpy(class_weights(train.labels, spec.class_weights)).float().to(device)
    groups = parameter_groups(model, spec.layer_decay, spec.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=0.0)
    steps = math.ceil(len(train.labels) / spec.batch_size)
    best, kept, chosen = (-math.inf, -math.inf), None, spec.epochs
    losses, aurocs = [], []
    for epoch in range(spec.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(train.labels))
        model.train()
        total = 0.0
        for step in range(steps):
            rate = learning_rate(epoch + step / steps, spec)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["lr_multiplier"]
            subjects = order[step * spec.batch_size : (step + 1) * spec.batch_size]
            rng = np.random.default_rng([seed, epoch, step])
            loss = _loss(model, train, subjects, weights, spec, rng)
            if not bool(torch.isfinite(loss)):
                raise UserError(
                    "LOSS", f"fine-tuning diverged in epoch {epoch}; lower blr (now {spec.blr})", 1
                )
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            total += float(loss.detach()) * len(subjects)
        losses.append(total / len(order))
        if validation is not None:
            score = _validated(model, validation, spec)
            aurocs.append(score[0])
            if tell:
                tell(score[0], -score[1])
            if score > best:
                best, chosen = score, epoch + 1
                kept = copy.deepcopy({name: p.detach() for name, p in trained(model)})
    if kept is not None:
        for name, parameter in trained(model):
            parameter.data.copy_(kept[name])
    count = 0 if validation is None else len(validation.labels)
    by = f"AUROC of {count} validation subjects" if count else "the last: no subject could be spared"
    return Curve(chosen, by, tuple(losses), tuple(aurocs))


def learning_rate(epoch: float, spec: Finetune) -> float:
    """At a fractional epoch: linear from 0, then half a cosine from blr x batch / 256 to `min_lr`, by iteration."""
    peak = spec.blr * spec.batch_size / 256
    if epoch < spec.warmup:
        return peak * epoch / spec.warmup
    done = (epoch - spec.warmup) / (spec.epochs - spec.warmup)
    return spec.min_lr + (peak - spec.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def class_weights(labels: Array, how: str) -> Array:
    """Weight of each class in the loss; balanced: inverse to its subjects, their mean over the subjects 1."""
    counts = np.bincount(labels)
    if how == "none":
        return np.ones(len(counts))
    present = counts > 0
    return np.where(present, len(labels) / (present.sum() * np.maximum(counts, 1)), 0.0)


def _loss(
    model: Classifier,
    train: Examples,
    subjects: Array,
    weights: Tensor,
    spec: Finetune,
    rng: np.random.Generator,
) -> Tensor:
    device = weights.device
    chosen = []
    for subject in subjects.tolist():
        stacks = train.stacks[subject]
        rows = np.sort(rng.choice(len(stacks), spec.slices, replace=len(stacks) < spec.slices))
        chosen.append(stacks[torch.from_numpy(rows)])
    x = torch.stack(chosen).to(device)  # [n, k, C, S, H, W]
    n, k, channels, slices = x.shape[:4]
    x = augment(x.transpose(1, 2).flatten(2, 3).float() / 255, spec.augment, rng)  # [n, C, k * S, H, W]
    x = x.view(n, channels, k, slices, *x.shape[-2:]).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    x = embed.fit(x, int(model.encoder.patch_size))
    keep = None
    if spec.drop_path and isinstance(model.encoder, Backbone):
        keep = torch.from_numpy(rng.random((2 * model.depth, n * k)) >= spec.drop_path)
    with autocast(device, spec.precision):
        logits = model(x, torch.arange(n, device=device).repeat_interleave(k), n, keep)
    labels = torch.from_numpy(train.labels[subjects]).long().to(device)
    each = functional.cross_entropy(
        logits.float(), labels, reduction="none", label_smoothing=spec.label_smoothing
    )
    return (each * weights[labels]).mean()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 where it is wanted and a GPU is there."""
    enabled = device.type == "cuda" and precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _validated(model: Classifier, validation: Examples, spec: Finetune) -> tuple[float, float]:
    """(AUROC, minus the log-loss) of the validation subjects."""
    predicted = probabilities(model, validation.stacks, spec)
    auroc = metrics.auroc(validation.labels, predicted)
    loss = -np.log(np.maximum(predicted[np.arange(len(predicted)), validation.labels], 1e-12)).mean()
    return (auroc if isinstance(auroc, float) else 0.5), -float(loss)


def probabilities(model: Classifier, subjects: Sequence[Tensor], spec: Finetune) -> Array:
    """Class probabilities [n, K]: all stacks of each subject encoded, pooled and classified."""
    return np.stack([judged(model, stacks, spec)[0] for stacks in subjects])


@torch.inference_mode()
def judged(model: Classifier, stacks: Tensor, spec: Finetune) -> tuple[Array, Array | None]:
    """Class probabilities [K] of one subject's stacks [k, C, S, H, W], and where it attends: [k], or None."""
    device = next(model.parameters()).device
    model.eval()
    parts = []
    for begin in range(0, len(stacks), CHUNK):
        x = stacks[begin : begin + CHUNK].to(device).flatten(1, 2).float() / 255
        with autocast(device, spec.precision):
            parts.append(model.encode(embed.fit(x, int(model.encoder.patch_size))).float())
    features = torch.cat(parts)
    index = torch.zeros(len(features), dtype=torch.int64, device=device)
    found = model.classify(features, index, 1)[0].double().softmax(0).cpu().numpy()
    attended = None if model.attend is None else model.attend(features, index, 1).weights.cpu().numpy()
    return found, attended
