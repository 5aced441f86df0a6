"""Subject-level tables: pooled slice features, checked labels, and the covariates a reviewer asks for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


class LabelError(ValueError):
    """A label is missing or not one of the declared classes; says how many of each there were."""


def pool_subjects(subject_ids: Sequence[str], features: ArrayLike) -> tuple[list[str], NDArray[np.float32]]:
    """Mean over the slices of each subject: ids [m] and features [m, d] -> sorted ids [n] and means [n, d].

    Summed in float64 in row order. Raises ValueError on a shape mismatch or values that are not finite.
    """
    values = np.asarray(features)
    if values.ndim != 2 or len(values) != len(subject_ids):
        raise ValueError(
            f"{len(subject_ids)} subject ids but features {list(values.shape)}: need [m] and [m, d]"
        )
    if not np.isfinite(values).all():
        broken = ~np.isfinite(values).all(axis=1)
        bad = sorted({str(s) for s, b in zip(subject_ids, broken, strict=True) if b})
        raise ValueError(f"features of {len(bad)} subject(s) are not finite: {', '.join(bad[:8])}")
    ids, place = np.unique(np.array([str(s) for s in subject_ids]), return_inverse=True)
    sums = np.zeros((len(ids), values.shape[1]))
    np.add.at(sums, place, values.astype(np.float64))
    return ids.tolist(), (sums / np.bincount(place, minlength=len(ids))[:, None]).astype(np.float32)


def encode_labels(values: Sequence[Any], classes: Sequence[str]) -> NDArray[np.int64]:
    """Class numbers [n] of labels [n], in the order `classes` declares.

    Only the exact spelling counts: "AD ", 0, "0.0" and NaN are no classes; guessing would move subjects
    silently. Raises LabelError with the count of every value seen.
    """
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise ValueError(f"classes must be two or more different names, got {list(classes)}")
    number = {name: k for k, name in enumerate(classes)}
    strange = sum(1 for value in values if not isinstance(value, str) or value not in number)
    if strange:
        seen = Counter("missing" if _missing(value) else repr(value) for value in values)
        counts = ", ".join(f"{value} x {count}" for value, count in sorted(seen.items()))
        raise LabelError(
            f"LABEL: {strange} of {len(values)} labels are not among {list(classes)}; found {counts}. "
            "Correct the table, or map or drop them in the card"
        )
    return np.array([number[value] for value in values], dtype=np.int64)


def _missing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def covariates(
    table: Mapping[str, Sequence[Any]], columns: Sequence[str] = ("head", "site", "present")
) -> tuple[NDArray[np.float32], list[str]]:
    """What could be known without looking at a single pixel: columns of n -> features [n, k] and their names.

    head, site, sex and other text are one-hot (a missing value is a level of its own); `present` (int bit
    mask) is one column per bit; age is years plus a column that says whether it is missing. Give internal
    and external subjects in one table, so that both have the same columns; a level never seen in training
    has weight 0.
    """
    blocks: list[NDArray[np.float64]] = []
    names: list[str] = []
    for column in columns:
        if column not in table:
            raise ValueError(f"no column {column!r}; there are {', '.join(map(str, table))}")
        values = table[column]
        if column == "present":
            bits = np.array([int(value) for value in values], dtype=np.int64)
            width = int(bits.max(initial=0)).bit_length()
            blocks.append(((bits[:, None] >> np.arange(width)) & 1).astype(np.float64))
            names += [f"present:{k}" for k in range(width)]
        elif column == "age":
            unknown = np.array([_missing(value) for value in values])
            years = [0.0 if gone else float(v) for v, gone in zip(values, unknown, strict=True)]
            age = np.array(years)
            age[unknown] = age[~unknown].mean() if (~unknown).any() else 0.0
            blocks.append(np.stack([age, unknown], axis=1))
            names += ["age", "age:missing"]
        else:
            text = ["" if _missing(value) else str(value) for value in values]
            levels = sorted(set(text))
            blocks.append(
                np.array([[value == level for level in levels] for value in text], dtype=np.float64)
            )
            names += [f"{column}={level or 'missing'}" for level in levels]
    return np.concatenate(blocks, axis=1).astype(np.float32), names
