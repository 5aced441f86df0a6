"""What can be learnt without touching a backbone: probes on cached slice features, and on facts about a subject.

In: features of `embed`, tables of subjects. Out: class probabilities of the subjects that are judged.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cranium import embed
from cranium.config import Attention, Knn, Probe, UserError
from cranium.models import attend
from cranium.models import probe as probes
from cranium.models.attend import Bags

Array = NDArray[Any]


class Slices(NamedTuple):
    """Every slice of a feature artefact, sessions one after another: values [M, D], and where each session is."""

    values: Array
    places: dict[tuple[str, str], slice]


def pooled(features: Path, table: pd.DataFrame, how: str) -> Array:
    """Mean or max [n, D] over the slices of each session in `table`, in its order; means are summed in float64."""
    every = _slices(features)
    found = [every.values[place] for place in _places(every, features, table)]
    if how == "max":
        return np.stack([values.max(0) for values in found])
    return np.stack([values.mean(0, dtype=np.float64) for values in found]).astype(np.float32)


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
    places = _places(every, features, table)
    sizes = [place.stop - place.start for place in places]
    return Bags(np.concatenate([every.values[p] for p in places]), np.repeat(np.arange(len(places)), sizes))


def _places(every: Slices, features: Path, table: pd.DataFrame) -> list[slice]:
    keys = list(zip(table["subject"], table["session"], strict=True))
    if absent := [key for key in keys if key not in every.places]:
        raise UserError("FEATURES", f"{features} lacks sessions {absent[:5]}; run `cranium embed` again")
    return [every.places[key] for key in keys]


@functools.lru_cache(maxsize=16)
def _slices(folder: Path) -> Slices:
    """Cached: a trial's process runs many cells."""
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


def vectors(
    spec: Probe | Knn, train: Array, labels: Array, judged: Sequence[Array], num_classes: int, seed: int
) -> tuple[list[Array], str]:
    """Class probabilities of each of `judged` [n, D] by a probe on `train` [m, D]; and how it was chosen."""
    match spec:
        case Probe():
            fitted = probes.fit_linear(
                train,
                labels,
                c_grid=spec.c_grid,
                folds=spec.inner_folds,
                seed=seed,
                num_classes=num_classes,
            )
            return [fitted.predict(features) for features in judged], fitted.chosen_by
        case Knn():
            # Standardised: the tokens of some backbones differ by a hair, and are all alike to a cosine.
            mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
            std = np.where(std > 0, std, 1.0)
            found = [
                probes.knn(
                    (train - mean) / std,
                    labels,
                    (features - mean) / std,
                    spec.k,
                    spec.temperature,
                    num_classes,
                )
                for features in judged
            ]
            return found, f"k {min(spec.k, len(train))}, declared"


def attended(
    spec: Attention, train: Bags, labels: Array, judged: Sequence[Bags], num_classes: int, seed: int
) -> tuple[list[Array], str]:
    """As `vectors`, by gated attention over slices."""
    fitted = attend.fit_attention(
        train,
        labels,
        attend.Training(spec.hidden, spec.lr, spec.batch_size, spec.look_every, seed),
        weight_decays=spec.weight_decay,
        steps=spec.steps,
        folds=spec.inner_folds,
        num_classes=num_classes,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    return [fitted.predict(some) for some in judged], fitted.chosen_by
