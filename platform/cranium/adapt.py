"""One cell of a grid: learnt from its labelled subjects, judged on its fold and on external cohorts, kept.

`run_cell` is a plain function that knows neither Ray nor Tune. How a cell is learnt is `probing`'s (on features that
are computed once) or `tuning`'s (from pixels). Everything tuned is tuned inside the cell's own labelled subjects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cranium import place, probing, search_trials, segmenting, sessions, store, tuning, volumes
from cranium.cards import Label
from cranium.config import (
    WITHOUT_BACKBONE,
    Attention,
    Cell,
    Classification,
    Finetune,
    Knn,
    Probe,
    Segmentation,
    Task,
    UserError,
)
from cranium.store import Artefact
from cranium.tasks import classification, metrics, splits
from cranium.tasks.metrics import Undefined, Value

Array = NDArray[Any]

# 6: kinds of stack are an axis, compared on the same subjects; 5: judged on subsets of contrasts; 4: more metrics;
# 3: what was learnt is kept; 2: adaptation is an axis
RECIPE = 6
PREDICTIONS = "predictions.parquet"
MOVED = ("sensitivity_at_home_threshold", "specificity_at_home_threshold")  # 90 % specificity at home
HEAD = "head.safetensors"  # what was learnt, beside the predictions that it made


@dataclass(frozen=True)
class Cohort:
    """Where one cohort's subjects and features lie, and what is seen of their scans."""

    name: str
    shard_set: Path
    features: Path | None  # None where no cached features are needed
    contrasts: tuple[str, ...] | None = None  # that are seen; None: all that is there


@dataclass(frozen=True)
class Work:
    """A cell with everything it needs, in plain values: what a trial is handed."""

    cell: Cell
    task: Classification
    spec: Probe | Knn | Attention | Finetune  # of the cell's adaptation
    covariates: tuple[str, ...]
    cohort: Cohort
    external: tuple[Cohort, ...]
    folder: Path
    tags: tuple[tuple[str, str], ...] = ()
    start: tuning.Start | None = None  # of a network that is trained
    # The same cohorts, each again for every subset of contrasts that it is judged on.
    shown: tuple[Cohort, ...] = ()


class Judged(NamedTuple):
    """Who a cell is judged on; None: with what it learnt from, else those who have each contrast of a subset."""

    cohort: Cohort
    table: pd.DataFrame
    subset: tuple[str, ...] | None = None


def subjects(shard_set: Path, task: Task) -> pd.DataFrame:
    """The subjects a task can use: one row each, with `label` (to stratify by) and `matched`, sorted by subject."""
    match task:
        case Classification():
            return diagnosed(shard_set, task)
        case Segmentation():
            return segmenting.subjects(shard_set, task)


def shared(shard_sets: Sequence[Path], task: Task) -> pd.DataFrame:
    """The subjects a task can use in each of these, by the same session; the rows are those of the first."""
    first, *others = (subjects(one, task) for one in shard_sets)
    for other in others:
        first = first.merge(other[["subject", "session"]], on=["subject", "session"])
    return first


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
    """Learn one cell and judge it; write its predictions and manifest; return its metrics.

    A cell whose manifest is there is returned as it is.
    """
    if isinstance(work, segmenting.Work):
        return segmenting.run_cell(work, folds)
    if Artefact(work.folder).done:
        return dict(store.read_manifest(work.folder)["metrics"])
    labelled, test = divided(work, folds)
    tables = {c.name: diagnosed(c.shard_set, work.task) for c in work.external} | {work.cohort.name: test}
    train = showing(work.cohort, labelled)
    judged = [Judged(c, showing(c, tables[c.name])) for c in (work.cohort, *work.external)]
    judged += [Judged(c, showing(c, tables[c.name], whole=True), c.contrasts) for c in work.shown]
    test = judged[0].table
    if why := _unlearnable(work.cell, train, test, len(labelled)):
        nobody = _rows(work, judged[0]._replace(table=test[:0]), np.empty((0, len(work.task.classes))))
        tests = ("test", *(f"external/{cohort.name}" for cohort in work.external))
        undefined = {f"{name}/auroc": why for name in tests}
        unknown: dict[str, float | None] = dict.fromkeys(undefined)
        notes = {"unlearnable": why, "n_validation": 0}
        _commit(work, nobody, unknown, undefined, train, test, len(labelled), notes)
        return unknown
    judged = [part for part in judged if len(part.table)]
    found, notes = _learnt(work, train, judged)
    predictions = pd.concat(
        [_rows(work, part, probabilities) for part, probabilities in zip(judged, found, strict=True)]
    )
    found_scores = _scores(predictions, work.task.classes)
    scores = {name: value if isinstance(value, float) else None for name, value in found_scores.items()}
    undefined = {name: value.reason for name, value in found_scores.items() if isinstance(value, Undefined)}
    _commit(work, predictions, scores, undefined, train, test, len(labelled), notes)
    return scores


def _scores(predictions: pd.DataFrame, classes: Sequence[str]) -> dict[str, Value]:
    """Every metric of every test set; of external cohorts also what thresholds do that were read off the test fold.

    Of a subset of contrasts the AUROC alone.
    """
    scores: dict[str, Value] = {}
    at: Array | Undefined = Undefined("no test fold")
    for (role, cohort, subset), part in predictions.groupby(["role", "cohort", "subset"], sort=False):
        labels, probs = part["label"].to_numpy(), part[[f"prob_{name}" for name in classes]].to_numpy()
        prefix = "test" if role == "test" else f"external/{cohort}"
        if subset:
            scores[f"{prefix}/{subset.replace('+', '_')}/auroc"] = metrics.auroc(labels, probs)
            continue
        scores |= {f"{prefix}/{n}": v for n, v in metrics.classification_metrics(labels, probs).items()}
        if role == "test":
            at = metrics.thresholds(labels, probs)
            continue
        moved = (at, at) if isinstance(at, Undefined) else metrics.at_thresholds(labels, probs, at)
        scores |= dict(zip((f"{prefix}/{name}" for name in MOVED), moved, strict=True))
    return scores


def divided(work: Work, folds: Mapping[str, int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The labelled subjects of a cell, as many as its label fraction leaves, and those of its fold."""
    cell, home = work.cell, diagnosed(work.cohort.shard_set, work.task)
    home = home[home["subject"].isin(folds)]  # who lacks another kind of stack is in no fold
    fold_of = home["subject"].map(dict(folds)).to_numpy()
    rest = home[fold_of != cell.fold]
    labelled = splits.label_fraction(
        rest["subject"].tolist(), rest["label"].to_numpy(), cell.label_fraction, cell.seed
    )
    return home[home["subject"].isin(labelled)], home[fold_of == cell.fold]


def learnt_from(work: Work, folds: Mapping[str, int]) -> pd.DataFrame:
    """The labelled subjects of a cell who have any of the contrasts it learns from."""
    return showing(work.cohort, divided(work, folds)[0])


def learn(work: Work, spec: Finetune, train: pd.DataFrame, tell: tuning.Tell | None = None) -> tuning.Tuned:
    """A network with these settings on the cell's labelled subjects."""
    assert work.start is not None
    return tuning.learn(
        work.start,
        spec,
        work.cohort.shard_set,
        train,
        pool=work.task.pool,
        num_classes=len(work.task.classes),
        seed=work.cell.seed,
        tell=tell,
        contrasts=work.cohort.contrasts,
    )


def showing(cohort: Cohort, table: pd.DataFrame, whole: bool = False) -> pd.DataFrame:
    """Who of `table` has any (`whole`: each) of the contrasts that are seen; `present` becomes what is seen of them."""
    if cohort.contrasts is None:
        return table
    wanted = sessions.bits(cohort.contrasts, store.read_manifest(cohort.shard_set)["channels"])
    seen = table["present"] & wanted
    return table.assign(present=seen)[seen == wanted if whole else seen > 0]


def _unlearnable(cell: Cell, train: pd.DataFrame, test: pd.DataFrame, labelled: int) -> str:
    """Why a cell has no result, or "": whoever has none of the contrasts is no example, and too few may be left.

    Such a cell is done, and its metrics undefined: trying again would find the same subjects.
    """
    what = " or ".join(cell.contrasts)
    if train["label"].nunique() < 2:
        return f"the {len(train)} of {labelled} labelled subjects that have {what} are not of two classes"
    return f"no test subject of fold {cell.fold} has {what}" if test.empty else ""


def _learnt(work: Work, train: pd.DataFrame, judged: Sequence[Judged]) -> tuple[list[Array], dict[str, Any]]:
    """Class probabilities of every judged table, and what the manifest keeps of how they were learnt."""
    cell, labels, classes = work.cell, train["label"].to_numpy(), len(work.task.classes)
    match work.spec:
        case Finetune() as declared:
            can_select = bool(tuning.hold_out(train, declared.validation, cell.seed))
            spec, search = search_trials.settled(declared, work.folder, can_select)
            tuned = learn(work, spec, train)
            curve = tuned.curve
            notes = {
                "search": search,
                "chosen_by": f"epoch {curve.epoch} of {spec.epochs}, {curve.chosen_by}",
                "n_validation": len(tuned.held_out),
                "loss": [round(value, 6) for value in curve.loss],
                "validation_auroc": [round(value, 6) for value in curve.validation_auroc],
                "settled": spec.model_dump(mode="json"),
                "start": tuning.began(tuned.start, tuned.source),
            }
            if spec.keep:
                tuning.save(tuned.model, work.folder / HEAD)
            return [tuned.predict(c.shard_set, table, c.contrasts) for c, table, _ in judged], notes
        case Attention() as spec:
            some = [probing.bags(_features(cohort), table) for cohort, table, _ in judged]
            bags = probing.bags(_features(work.cohort), train)
            attending = probing.of_slices(spec, bags, labels, classes, cell.seed)
            probing.save(attending, work.folder / HEAD)
            found, chosen_by = [attending.predict(bags) for bags in some], attending.chosen_by
        case spec:
            own, *others = _vectors(work, [(work.cohort, train), *((c, table) for c, table, _ in judged)])
            probe = probing.of_vectors(spec, own, labels, classes, cell.seed)
            if cell.init not in WITHOUT_BACKBONE:
                probing.save(probe, work.folder / HEAD)
            found, chosen_by = [probe.predict(features) for features in others], probe.chosen_by
    # Chosen by inner folds of the training subjects.
    return found, {"chosen_by": chosen_by, "n_validation": 0}


def _vectors(work: Work, parts: Sequence[tuple[Cohort, pd.DataFrame]]) -> list[Array]:
    """One vector a subject [n, D] for each table."""
    if work.cell.init == "volumes":
        return probing.measured([_volumes(cohort, table) for cohort, table in parts])
    if work.cell.init != "covariates":
        return [probing.pooled(_features(cohort), table, work.task.pool) for cohort, table in parts]
    whole = pd.concat([table for _, table in parts], ignore_index=True)
    columns = [c for c in work.covariates if c in whole]
    values, _ = classification.covariates({c: whole[c].tolist() for c in columns}, columns)
    return list(np.split(values, np.cumsum([len(table) for _, table in parts])[:-1]))


def _volumes(cohort: Cohort, table: pd.DataFrame) -> Array:
    """They are measured on T1w; NaN where it is not seen."""
    found = volumes.read(_features(cohort), table)
    hidden = cohort.contrasts is not None and "T1w" not in cohort.contrasts
    return np.full_like(found, np.nan) if hidden else found


def _features(cohort: Cohort) -> Path:
    assert cohort.features is not None
    return cohort.features


def _rows(work: Work, part: Judged, probabilities: Array) -> pd.DataFrame:
    cohort, table, subset = part
    kept = ["subject", "session", *[c for c in ("head", "site", "sex", "age", "present") if c in table]]
    return table[kept].assign(
        cohort=cohort.name,
        role="test" if cohort.name == work.cohort.name else "external",
        subset="+".join(subset or ()),
        fold=work.cell.fold,
        group=table[work.cell.scheme].astype(str) if work.cell.scheme in table else table["subject"],
        label=table["label"],
        **{f"prob_{name}": probabilities[:, k] for k, name in enumerate(work.task.classes)},
    )


def _commit(
    work: Work,
    predictions: pd.DataFrame,
    scores: Mapping[str, float | None],
    undefined: Mapping[str, str],
    train: pd.DataFrame,
    test: pd.DataFrame,
    labelled: int,
    notes: dict[str, Any],
) -> None:
    work.folder.mkdir(parents=True, exist_ok=True)
    place.publish(work.folder / PREDICTIONS, predictions.reset_index(drop=True).to_parquet)
    counts: dict[str, Any] = {
        "n_train": len(train),  # labelled subjects, those that select among them
        "n_train_unseen": labelled - len(train),  # that have none of the contrasts, and teach nothing
        "n_train_per_class": {c: int((train["label"] == k).sum()) for k, c in enumerate(work.task.classes)},
        "n_train_positive": int((train["label"] > 0).sum()),
        "n_validation": notes.pop("n_validation"),
        "n_test": len(test),
        "n_test_positive": int((test["label"] > 0).sum()),
    }
    store.commit(
        work.folder,
        {
            "stage": "adapt",
            "cell": work.cell.model_dump(mode="json"),
            "task": work.task.model_dump(mode="json"),
            "spec": work.spec.model_dump(mode="json"),
            "counts": counts,
            "metrics": dict(scores),
            "undefined": dict(undefined),
            "head_sha256": store.sha256(work.folder / HEAD) if (work.folder / HEAD).is_file() else None,
            **notes,
            "tags": dict(work.tags),
            "inputs": [
                [c.shard_set.name, c.features.name if c.features else None]
                for c in (work.cohort, *work.external, *work.shown)
            ],
        },
    )
