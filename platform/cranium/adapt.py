"""One cell of a grid: a frozen probe on cached features, judged on its fold and on external cohorts.

`run_cell` is a plain function that knows neither Ray nor Tune. Labels are per subject, features per slice: slices are
pooled per subject first. Everything tuned is tuned inside the cell's own labelled subjects.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cranium import embed, segmenting, store
from cranium.cards import Label
from cranium.config import Cell, Classification, Probe, Segmentation, Task, UserError
from cranium.models import probe as probes
from cranium.store import Artefact
from cranium.tasks import classification, metrics, splits

RECIPE = 1
PREDICTIONS = "predictions.parquet"


@dataclass(frozen=True)
class Cohort:
    """Where one cohort's subjects and features lie."""

    name: str
    shard_set: Path
    features: Path | None  # None for the covariates-only row


@dataclass(frozen=True)
class Work:
    """A cell with everything it needs, in plain values: what a trial is handed."""

    cell: Cell
    task: Classification
    probe: Probe
    covariates: tuple[str, ...]
    cohort: Cohort
    external: tuple[Cohort, ...]
    folder: Path
    tags: tuple[tuple[str, str], ...] = ()


def subjects(shard_set: Path, task: Task) -> pd.DataFrame:
    """The subjects a task can use: one row each, with `label` (to stratify by) and `matched`, sorted by subject."""
    match task:
        case Classification():
            return diagnosed(shard_set, task)
        case Segmentation():
            return segmenting.subjects(shard_set, task)


def diagnosed(shard_set: Path, task: Classification) -> pd.DataFrame:
    """The subjects a task can use: one row each, with `label` (class number) and `matched` set, sorted by subject.

    A subject's first session that carries one of the task's classes stands for it (the declared rule). Subjects of
    other classes are left out; a raw value the card does not know is refused (LABEL).
    """
    manifest = store.read_manifest(shard_set)
    declared = manifest["card"]["labels"].get(task.label)
    if declared is None:
        known = ", ".join(manifest["card"]["labels"]) or "none"
        raise UserError(
            "LABEL", f"cohort {manifest['cohort']} declares no label {task.label!r} (its labels: {known})"
        )
    label = Label.model_validate(declared)
    if unknown := sorted(set(task.classes) - set(label.classes)):
        raise UserError(
            "LABEL",
            f"task {task.name}: classes {unknown} are not in the card; it has {sorted(label.classes)}",
        )
    class_of = {raw: name for name, raws in label.classes.items() for raw in raws}
    table = pd.read_parquet(shard_set / "sessions.parquet").sort_values(["subject", "session"], kind="stable")
    values = table[label.column]
    if strange := sorted({str(v) for v in values.dropna() if str(v) not in class_of}):
        raise UserError(
            "LABEL",
            f"{manifest['cohort']}: values {strange[:8]} of {label.column} are in no class of the card",
        )
    named = values.map(lambda v: class_of.get(str(v)) if pd.notna(v) else None)
    table = table.assign(label=named.map({name: k for k, name in enumerate(task.classes)}))
    matched = manifest["card"].get("matched")
    table = table.assign(matched=table[matched].astype(str) if matched else table["subject"])
    table = table[table["label"].notna()].drop_duplicates("subject").reset_index(drop=True)
    if table.empty:
        raise UserError(
            "LABEL", f"no subject of {manifest['cohort']} has one of the classes {list(task.classes)}"
        )
    return table.astype({"label": int})


def assign_folds(table: pd.DataFrame, scheme: str, folds: int, seed: int) -> dict[str, int]:
    """subject -> fold: k folds of subjects (matched sets whole), or one fold per value of the group column `scheme`."""
    ids = table["subject"].tolist()
    try:
        if scheme == "subject":
            return splits.folds(ids, table["label"].to_numpy(), table["matched"].tolist(), folds, seed)
        if scheme not in table:
            raise ValueError(
                f"there is no column {scheme!r} to group by; sweep.group_by names a declared group"
            )
        return splits.leave_one_group_out(ids, table[scheme].astype(str).tolist())
    except ValueError as error:
        raise UserError("SPLIT", str(error)) from None


def run_cell(work: Work | segmenting.Work, folds: Mapping[str, int]) -> dict[str, float | None]:
    """Train one cell's probe and judge it; write its predictions and manifest; return its metrics.

    A cell whose manifest is there is returned as it is.
    """
    if isinstance(work, segmenting.Work):
        return segmenting.run_cell(work, folds)
    if Artefact(work.folder).done:
        return dict(store.read_manifest(work.folder)["metrics"])
    cell, task = work.cell, work.task
    if cell.adaptation != "linear":
        raise UserError("NOT_YET", f"sweep.adaptation: {cell.adaptation} is not there yet; drop it")
    tables = {cohort.name: diagnosed(cohort.shard_set, task) for cohort in (work.cohort, *work.external)}
    inputs = _inputs(work, tables)
    home = tables[work.cohort.name]
    fold_of = home["subject"].map(dict(folds)).to_numpy()
    pool = home[fold_of != cell.fold]
    labelled = splits.label_fraction(
        pool["subject"].tolist(), pool["label"].to_numpy(), cell.label_fraction, cell.seed
    )
    train = home["subject"].isin(labelled).to_numpy()
    features, labels = inputs[work.cohort.name], home["label"].to_numpy()
    fitted = probes.fit_linear(
        features[train],
        labels[train],
        c_grid=work.probe.c_grid,
        folds=work.probe.inner_folds,
        seed=cell.seed,
        num_classes=len(task.classes),
    )
    test = fold_of == cell.fold
    parts = [_judge(fitted, work.cohort.name, home[test], features[test], "test", work)]
    parts += [_judge(fitted, c.name, tables[c.name], inputs[c.name], "external", work) for c in work.external]
    scores: dict[str, float | None] = {}
    undefined: dict[str, str] = {}
    for (role, cohort), part in pd.concat(parts).groupby(["role", "cohort"], sort=False):
        prefix = "test" if role == "test" else f"external/{cohort}"
        probabilities = part[[f"prob_{name}" for name in task.classes]].to_numpy()
        for name, value in metrics.classification_metrics(part["label"].to_numpy(), probabilities).items():
            scores[f"{prefix}/{name}"] = value if isinstance(value, float) else None
            if not isinstance(value, float):
                undefined[f"{prefix}/{name}"] = value.reason
    _commit(work, pd.concat(parts), scores, undefined, train, test, labels, fitted)
    return scores


def _judge(
    fitted: probes.LinearProbe, cohort: str, table: pd.DataFrame, features: np.ndarray, role: str, work: Work
) -> pd.DataFrame:
    probabilities = fitted.predict(features)
    kept = ["subject", "session", *[c for c in ("head", "site", "sex", "age") if c in table]]
    return table[kept].assign(
        cohort=cohort,
        role=role,
        fold=work.cell.fold,
        group=table[work.cell.scheme].astype(str) if work.cell.scheme in table else table["subject"],
        label=table["label"],
        **{f"prob_{name}": probabilities[:, k] for k, name in enumerate(work.task.classes)},
    )


def _inputs(work: Work, tables: Mapping[str, pd.DataFrame]) -> dict[str, np.ndarray]:
    """Subject-level inputs [n, D] of every cohort, in the order of its table."""
    if work.cell.init == "covariates":
        whole = pd.concat(tables.values(), ignore_index=True)
        columns = [c for c in work.covariates if c in whole]
        values, _ = classification.covariates({c: whole[c].tolist() for c in columns}, columns)
        edges = np.cumsum([len(table) for table in tables.values()])[:-1]
        return dict(zip(tables, np.split(values, edges), strict=True))
    inputs = {}
    for cohort in (work.cohort, *work.external):
        assert cohort.features is not None
        pooled = _pooled(cohort.features)
        table = tables[cohort.name]
        keys = list(zip(table["subject"], table["session"], strict=True))
        if absent := [key for key in keys if key not in pooled]:
            raise UserError(
                "FEATURES", f"{cohort.features} lacks sessions {absent[:5]}; run `cranium embed` again"
            )
        inputs[cohort.name] = np.stack([pooled[key] for key in keys])
    return inputs


@functools.lru_cache(maxsize=16)
def _pooled(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """(subject, session) -> mean feature over its slices. Cached: a trial's process runs many cells."""
    columns, features = embed.read(folder)
    keys = [
        f"{subject}\t{session}"
        for subject, session in zip(columns["subject"], columns["session"], strict=True)
    ]
    ids, pooled = classification.pool_subjects(keys, features)
    split = [i.split("\t") for i in ids]
    return {(subject, session): row for (subject, session), row in zip(split, pooled, strict=True)}


def _commit(
    work: Work,
    predictions: pd.DataFrame,
    scores: Mapping[str, float | None],
    undefined: Mapping[str, str],
    train: np.ndarray,
    test: np.ndarray,
    labels: np.ndarray,
    fitted: probes.LinearProbe,
) -> None:
    work.folder.mkdir(parents=True, exist_ok=True)
    predictions.reset_index(drop=True).to_parquet(work.folder / PREDICTIONS)
    counts: dict[str, Any] = {
        "n_train": int(train.sum()),
        "n_train_per_class": {c: int((labels[train] == k).sum()) for k, c in enumerate(work.task.classes)},
        "n_train_positive": int((labels[train] > 0).sum()),
        "n_validation": 0,  # the probe's regularisation is chosen by inner folds of the training subjects
        "n_test": int(test.sum()),
        "n_test_positive": int((labels[test] > 0).sum()),
    }
    store.commit(
        work.folder,
        {
            "stage": "adapt",
            "cell": work.cell.model_dump(mode="json"),
            "task": work.task.model_dump(mode="json"),
            "counts": counts,
            "metrics": dict(scores),
            "undefined": dict(undefined),
            "regularisation": fitted.chosen_by,
            "tags": dict(work.tags),
            "inputs": [
                [c.shard_set.name, c.features.name if c.features else None]
                for c in (work.cohort, *work.external)
            ],
        },
    )
