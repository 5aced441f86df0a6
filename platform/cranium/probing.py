"""What can be learnt without touching a backbone: probes on cached slice features, and on facts about a subject.

In: features of `embed`, tables of subjects. Out: a fitted probe, which gives class probabilities of other subjects and
is kept as plain arrays.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cranium import embed, place
from cranium.config import Attention, Knn, Probe, UserError
from cranium.models import attend
from cranium.models import probe as probes
from cranium.models.attend import AttentionProbe, Bags
from cranium.models.probe import LinearProbe, Neighbours

Array = NDArray[Any]
OfVectors = LinearProbe | Neighbours
MODEL = "model."  # before the names of a network's tensors


class Slices(NamedTuple):
    """Every slice of a feature artefact, sessions one after another: values [M, D], and where each session is."""

    values: Array
    places: dict[tuple[str, str], slice]


def pooled(features: Path, table: pd.DataFrame, how: str) -> Array:
    """Mean or max [n, D] over the slices of each session in `table`, in its order; means are summed in float64."""
    vectors, rows = _vectors(features, how)
    return vectors[[rows[key] for key in _keys(rows, features, table)]]


@functools.lru_cache(maxsize=64)
def _vectors(features: Path, how: str) -> tuple[Array, dict[tuple[str, str], int]]:
    """A vector of each session, and where it is. Cached: a trial's process runs many cells."""
    every = read(features)
    found = np.stack([pool(every.values[place], how) for place in every.places.values()])
    return found, {key: row for row, key in enumerate(every.places)}


def pool(values: Array, how: str) -> Array:
    """Mean or max [D] of the features [M, D] of one session's slices."""
    pooled: Array = values.max(0) if how == "max" else values.mean(0, dtype=np.float64).astype(np.float32)
    return pooled


def measured(raw: Sequence[Array]) -> list[Array]:
    """Volumes in ml, those of tissues as shares of the brain too, and whether they are missing, of each table.

    raw: `volumes.read` of each table, that of the training subjects first; their mean stands in where there is none.
    """
    known = raw[0][np.flatnonzero(np.isfinite(raw[0]).all(axis=1))]
    mean = known.mean(0) if len(known) else np.ones(raw[0].shape[1])
    found = []
    for values in raw:
        absent = np.asarray(~np.isfinite(values).all(axis=1))
        filled = np.where(absent[:, None], mean, values)
        found.append(np.column_stack([filled, filled[:, 1:] / filled[:, :1], absent]))
    return found


def bags(features: Path, table: pd.DataFrame) -> Bags:
    """The slice features of each session in `table`, in its order."""
    every = _slices(features)
    places = [every.places[key] for key in _keys(every.places, features, table)]
    sizes = [place.stop - place.start for place in places]
    return Bags(np.concatenate([every.values[p] for p in places]), np.repeat(np.arange(len(places)), sizes))


def _keys(known: Collection[tuple[str, str]], features: Path, table: pd.DataFrame) -> list[tuple[str, str]]:
    keys = list(zip(table["subject"], table["session"], strict=True))
    if absent := [key for key in keys if key not in known]:
        raise UserError("FEATURES", f"{features} lacks sessions {absent[:5]}; run `cranium embed` again")
    return keys


@functools.lru_cache(maxsize=16)
def _slices(folder: Path) -> Slices:
    return read(folder)


def read(folder: Path) -> Slices:
    """Every slice of a feature artefact. Raises `UserError(FEATURES)` for values that are not finite."""
    columns, values = embed.read(folder)
    if not np.isfinite(values).all():
        raise UserError("FEATURES", f"{folder} holds values that are not finite; remove it and embed again")
    keys = pd.DataFrame({"subject": columns["subject"], "session": columns["session"]})
    places = {}
    order = []
    begin = 0
    for key, rows in keys.groupby(["subject", "session"], sort=False).indices.items():
        order.append(rows)
        places[str(key[0]), str(key[1])] = slice(begin, begin + len(rows))
        begin += len(rows)
    return Slices(values[np.concatenate(order)], places)


# ---- probes ---------------------------------------------------------------------------------------------------------


def of_vectors(spec: Probe | Knn, train: Array, labels: Array, num_classes: int, seed: int) -> OfVectors:
    """A probe on `train` [m, D], a vector a subject, and `labels` [m]."""
    match spec:
        case Probe():
            return probes.fit_linear(
                train, labels, c_grid=spec.c_grid, folds=spec.inner_folds, seed=seed, num_classes=num_classes
            )
        case Knn():
            return Neighbours(train, labels.astype(np.int64), spec.k, spec.temperature, num_classes)


def of_slices(spec: Attention, train: Bags, labels: Array, num_classes: int, seed: int) -> AttentionProbe:
    """A probe that attends to some of a subject's slices."""
    return attend.fit_attention(
        train,
        labels,
        attend.Training(spec.hidden, spec.lr, spec.batch_size, spec.look_every, seed),
        weight_decays=spec.weight_decay,
        steps=spec.steps,
        folds=spec.inner_folds,
        num_classes=num_classes,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def save(probe: OfVectors | AttentionProbe, path: Path) -> None:
    """Keep a probe: its arrays as safetensors, every bit of them, and its numbers as JSON in the header."""
    every = {field.name: getattr(probe, field.name) for field in fields(probe)}
    if isinstance(probe, AttentionProbe):
        every |= {
            MODEL + name: tensor.cpu().numpy() for name, tensor in every.pop("model").state_dict().items()
        }
    arrays = {name: np.ascontiguousarray(v) for name, v in every.items() if isinstance(v, np.ndarray)}
    numbers = {name: v for name, v in every.items() if name not in arrays}
    path.parent.mkdir(parents=True, exist_ok=True)
    place.publish(path, lambda beside: save_file(arrays, beside, {"probe": json.dumps(numbers)}))


def load(spec: Probe | Knn | Attention, path: Path) -> OfVectors | AttentionProbe:
    """The probe that `save` kept: equal to it in every bit, so that it predicts the same."""
    with safe_open(path, "numpy") as file:
        numbers = json.loads(file.metadata()["probe"])
    every = load_file(path) | numbers
    match spec:
        case Probe():
            return LinearProbe(**every)
        case Knn():
            return Neighbours(**every)
        case Attention():
            of_model = {n.removeprefix(MODEL): every.pop(n) for n in list(every) if n.startswith(MODEL)}
            num_classes, dim = of_model["head.weight"].shape
            model = attend.Network(dim, len(of_model["pool.value.weight"]), num_classes)
            model.load_state_dict({name: torch.from_numpy(array) for name, array in of_model.items()})
            return AttentionProbe(model, **every)
