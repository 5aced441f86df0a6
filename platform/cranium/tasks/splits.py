"""Who is trained on, who is tested on: folds, label fractions, and the gate against leakage.

Every function sorts subjects by id (code points) before the first random draw, so an assignment depends on
the ids, the labels, the groups and the seed: never on row order, locale or PYTHONHASHSEED.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Self-supervision on the labelled training subjects is the protocol; every other overlap is leakage.
HARMLESS = frozenset({("ssl", "train"), ("ssl", "validation")})
ACCEPTANCE = re.compile(r"[a-z_]+:[a-z_]+\+[a-z_]+")
SHOWN = 8


class Overlap(NamedTuple):
    """Ids of one unit (subject, head, content hash, ...) found in two splits."""

    unit: str
    splits: tuple[str, str]
    ids: tuple[str, ...]

    @property
    def name(self) -> str:
        """What a config writes to accept this overlap, for example `head:ssl+test`."""
        return f"{self.unit}:{'+'.join(self.splits)}"


class Leakage(ValueError):
    """The same group, subject or file content is in two splits and nobody accepted it by name."""

    def __init__(self, overlaps: Sequence[Overlap]) -> None:
        self.overlaps = tuple(overlaps)
        lines = []
        for overlap in overlaps:
            shown = ", ".join(overlap.ids[:SHOWN])
            more = f" and {len(overlap.ids) - SHOWN} more" if len(overlap.ids) > SHOWN else ""
            first, second = overlap.splits
            lines.append(f"{len(overlap.ids)} {overlap.unit}(s) in both {first} and {second}: {shown}{more}")
        names = ", ".join(overlap.name for overlap in overlaps)
        super().__init__("LEAKAGE: " + "; ".join(lines) + f". Remove them, or accept by name: {names}")


def folds(
    subjects: Sequence[str], labels: ArrayLike, groups: Sequence[str], num_folds: int, seed: int
) -> dict[str, int]:
    """Assign each subject to a fold: stratified by label, and no group is split over folds.

    subjects, labels and groups run in parallel, [n]; group == subject is the ordinary scheme. Groups are
    placed largest first (equal sizes in seeded random order), each where its classes are rarest so far.
    With group == subject the folds differ by at most one subject per class. Raises ValueError when a class
    has fewer groups than there are folds.
    """
    order, label = _by_id(subjects, labels)
    if len(groups) != len(subjects):
        raise ValueError(f"{len(subjects)} subjects but {len(groups)} groups: give one group per subject")
    if num_folds < 2:
        raise ValueError(f"num_folds is {num_folds}: cross-validation needs at least 2")
    group = np.array([str(groups[i]) for i in order])
    ids, classes = [str(subjects[i]) for i in order], np.unique(label)
    names, member = np.unique(group, return_inverse=True)
    counts = np.zeros((len(names), len(classes)))  # [groups, classes]
    np.add.at(counts, (member, np.searchsorted(classes, label)), 1)
    for k, value in enumerate(classes):
        holders = int((counts[:, k] > 0).sum())
        if holders < num_folds:
            raise ValueError(
                f"class {value} has {int(counts[:, k].sum())} subject(s) in {holders} group(s), fewer than "
                f"num_folds={num_folds}: use at most {holders} folds, merge classes or add subjects"
            )
    fold_of_group = _place(counts, num_folds, np.random.default_rng(seed))
    held = np.stack([counts[fold_of_group == fold].sum(axis=0) for fold in range(num_folds)])
    if (held == 0).any():
        fold, k = (int(x) for x in np.argwhere(held == 0)[0])
        raise ValueError(
            f"the groups cannot be spread: fold {fold} of {num_folds} holds no subject of class "
            f"{classes[k]}; use fewer folds or leave one group out"
        )
    return {subject: int(fold_of_group[m]) for subject, m in zip(ids, member, strict=True)}


def _place(counts: NDArray[np.float64], num_folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Greedy placement of groups, counts [groups, classes] -> fold of each group [groups]."""
    share = counts / counts.sum(axis=0)
    size = counts.sum(axis=1)
    queue = np.lexsort((rng.random(len(counts)), -size))
    held, held_size = np.zeros((num_folds, counts.shape[1])), np.zeros(num_folds)
    chosen = np.zeros(len(counts), dtype=np.int64)
    for g in queue:
        crowding = np.round(held @ share[g], 9)  # rounded: a tie is a tie on every machine
        fold = int(np.lexsort((held_size, crowding))[0])
        held[fold] += share[g]
        held_size[fold] += size[g]
        chosen[g] = fold
    return chosen


def leave_one_group_out(subjects: Sequence[str], groups: Sequence[str]) -> dict[str, int]:
    """One fold per group, numbered in the order of group ids. Raises ValueError for fewer than 2."""
    if len(groups) != len(subjects) or len(set(subjects)) != len(subjects):
        raise ValueError("give each subject once, with one group each")
    names = sorted({str(group) for group in groups})
    if len(names) < 2:
        raise ValueError(f"leave one group out needs 2 groups, there is {len(names)}: {', '.join(names)}")
    number = {name: k for k, name in enumerate(names)}
    return {s: number[str(g)] for s, g in sorted(zip(map(str, subjects), groups, strict=True))}


def label_fraction(train_subjects: Sequence[str], labels: ArrayLike, fraction: float, seed: int) -> list[str]:
    """The subjects whose labels may be used at `fraction` of the training subjects, sorted by id.

    Stratified: round(fraction * n) subjects of each class, and never fewer than one per class (so 1 % of 30
    subjects is one of each class: report n, not the per cent). Nested: each class has one seeded queue and
    a fraction takes a prefix of it, so 1 % lies within 5 %. No initialisation enters: all see the same
    subjects.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"label fraction {fraction} is not in (0, 1]")
    queues = _queues(train_subjects, labels, seed)
    return sorted(s for queue in queues.values() for s in queue[: max(1, int(fraction * len(queue) + 0.5))])


def k_shot(train_subjects: Sequence[str], labels: ArrayLike, shots: int, seed: int) -> list[str]:
    """`shots` subjects of each class, sorted by id; prefixes of the same queues as `label_fraction`."""
    queues = _queues(train_subjects, labels, seed)
    small = {label: len(queue) for label, queue in queues.items() if len(queue) < shots}
    if shots < 1 or small:
        raise ValueError(f"{shots} shots need at least 1 and at most a class's subjects; too small: {small}")
    return sorted(s for queue in queues.values() for s in queue[:shots])


def _queues(subjects: Sequence[str], labels: ArrayLike, seed: int) -> dict[int, list[str]]:
    """Each class's subjects in seeded order; a class's queue does not depend on the other classes' ids."""
    order, label = _by_id(subjects, labels)
    queues = {}
    for value in np.unique(label):
        ids = [str(subjects[i]) for i, y in zip(order, label, strict=True) if y == value]
        draw = np.random.default_rng([seed, int(value)]).random(len(ids))
        queues[int(value)] = [ids[i] for i in np.argsort(draw, kind="stable")]
    return queues


def _by_id(subjects: Sequence[str], labels: ArrayLike) -> tuple[list[int], NDArray[np.int64]]:
    """Row order sorted by subject id, and the labels in that order; refuses repeats and negative labels."""
    label = np.asarray(labels)
    if label.shape != (len(subjects),) or not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"labels must be integers [{len(subjects)}], got {label.dtype} {list(label.shape)}")
    repeated = [subject for subject, count in Counter(map(str, subjects)).items() if count > 1]
    if repeated or not len(subjects):
        raise ValueError(f"give each subject one row; repeated: {sorted(repeated)[:SHOWN]}")
    if label.min() < 0:
        raise ValueError(f"{int((label < 0).sum())} negative label(s): drop unlabelled subjects first")
    order = sorted(range(len(subjects)), key=lambda i: str(subjects[i]))
    return order, label[order].astype(np.int64)


def check_leakage(
    units: Mapping[str, Mapping[str, Collection[str]]], accepted: Collection[str] = ()
) -> list[Overlap]:
    """Refuse overlap between any two of train, validation, test, external and ssl; return what was accepted.

    units: unit -> split -> ids, for example {"subject": {"train": {...}, "test": {...}}, "head": {...},
    "content": {...}}. Training subjects inside the SSL corpus are no leakage. accepted: names such as
    `head:ssl+test` (splits in alphabetical order), as the error prints them.
    Raises Leakage listing the ids, ValueError for a malformed acceptance.
    """
    for name in accepted:
        if not ACCEPTANCE.fullmatch(name):
            raise ValueError(f"cannot accept {name!r}: write unit:split+split, for example head:ssl+test")
    wanted = {
        f"{unit}:{'+'.join(sorted(rest.split('+')))}" for unit, rest in (n.split(":") for n in accepted)
    }
    found = []
    for unit, splits in units.items():
        for first, second in combinations(sorted(splits), 2):
            shared = set(splits[first]) & set(splits[second])
            if shared and (first, second) not in HARMLESS:
                found.append(Overlap(unit, (first, second), tuple(sorted(map(str, shared)))))
    refused = [overlap for overlap in found if overlap.name not in wanted]
    if refused:
        raise Leakage(refused)
    return found


def digest(assignment: Mapping[str, int]) -> str:
    """SHA-256 (hex) of an assignment, whatever order it was built in."""
    return hashlib.sha256(json.dumps(dict(assignment), sort_keys=True).encode()).hexdigest()
