"""One cell of segmentation: learnt from slices, judged in 3-D on the scan's own voxels.

How it is learnt is `frozen_decoder`'s (on tokens that are computed once) or `tuned_decoder`' (from the pixels).

Each test subject's slices are put together again, taken back to the voxels the label file is drawn on, written as
NIfTI and scored there, against that file. Kept per cell: `predictions.parquet` (a row per subject and region), what was
learnt in `decoder.safetensors`, the label maps under `maps/`, and a picture of each subject under `overlays/`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.torch import save_file

from cranium import frozen_decoder, place, restitch, store, tuned_decoder, tuning
from cranium.config import Cell, Decoder, Segmentation, UserError
from cranium.figures import overlay
from cranium.frozen_decoder import Fitted
from cranium.store import Artefact
from cranium.tasks import segmentation, splits

RECIPE = 2  # 2: kinds of stack are an axis, on the same subjects; the hash of what was learnt is kept
PREDICTIONS = "predictions.parquet"
DECODER = "decoder.safetensors"
MAPS, OVERLAYS = "maps", "overlays"
KEPT = ("head", "site", "sex", "age")  # columns of a session that a report may group by


@dataclass(frozen=True)
class LabelFiles:
    """Where the label files of a cohort are on this machine: (subject, session) -> path below `root`."""

    root: Path
    paths: Mapping[tuple[str, str], str]

    def of(self, subject: str, session: str) -> Path:
        if (subject, session) not in self.paths:
            raise UserError("LABELS", f"no label file of {subject} {session} is below {self.root} any more")
        return self.root / self.paths[subject, session]


@dataclass(frozen=True)
class Cohort:
    """Where one cohort's labelled sessions, their tokens and their label files lie."""

    name: str
    shard_set: Path
    tokens: Path | None  # None where a network learns from the pixels
    label_files: LabelFiles

    @property
    def shown(self) -> Path:
        """What a model of it is shown: tokens, or the stacks themselves."""
        return self.tokens or self.shard_set


@dataclass(frozen=True)
class Work:
    """A cell with everything it needs, in plain values: what a trial is handed."""

    cell: Cell
    task: Segmentation
    decoder: Decoder
    cohort: Cohort
    external: tuple[Cohort, ...]
    folder: Path
    tags: tuple[tuple[str, str], ...] = ()
    start: tuning.Start | None = None  # of a network that is trained


def subjects(shard_set: Path, task: Segmentation) -> pd.DataFrame:
    """The subjects with a label map, one row each, sorted: `label` says whether it holds any of the task's classes.

    A subject's first session that has a label map stands for it (the declared rule). Raises `UserError(LABEL)`.
    """
    manifest = store.read_manifest(shard_set)
    try:
        lookup = segmentation.lookup(task.classes, manifest["classes"])
    except ValueError as error:
        raise UserError("LABEL", f"task {task.name}, cohort {manifest['cohort']}: {error}") from None
    table = pd.read_parquet(shard_set / "sessions.parquet").sort_values(["subject", "session"], kind="stable")
    table = table[table["label_ml"].notna()].drop_duplicates("subject").reset_index(drop=True)
    if table.empty:
        raise UserError("LABEL", f"no subject of {manifest['cohort']} has a label map")
    names = [name for number, name in enumerate(manifest["classes"], 1) if lookup[number]]
    held = [any(json.loads(ml)[name] > 0 for name in names) for ml in table["label_ml"]]
    matched = manifest["card"].get("matched")
    return table.assign(
        label=np.array(held, int), matched=table[matched].astype(str) if matched else table["subject"]
    )


def run_cell(work: Work, folds: Mapping[str, int]) -> dict[str, float | None]:
    """Learn one cell and judge it; write its predictions and manifest; return its metrics.

    A cell whose manifest is there is returned as it is.
    """
    if Artefact(work.folder).done:
        return dict(store.read_manifest(work.folder)["metrics"])
    cell = work.cell
    home = subjects(work.cohort.shard_set, work.task)
    home = home[home["subject"].isin(folds)]
    fold_of = home["subject"].map(dict(folds)).to_numpy()
    pool = home[fold_of != cell.fold]
    labelled = splits.label_fraction(
        pool["subject"].tolist(), pool["label"].to_numpy(), cell.label_fraction, cell.seed
    )
    train, test = home[home["subject"].isin(labelled)], home[fold_of == cell.fold]
    fitted = _fit(work, train)
    parts = [_judged(fitted, work, work.cohort, test, "test")]
    parts += [
        _judged(fitted, work, cohort, subjects(cohort.shard_set, work.task), "external")
        for cohort in work.external
    ]
    predictions = pd.DataFrame([row for part in parts for row in part])
    scores = _metrics(predictions, work.task.classes)
    place.publish(work.folder / PREDICTIONS, predictions.to_parquet)
    head = _keep(work, fitted)
    store.write_atomic(work.folder / MAPS / "dseg.tsv", _legend(work.task))
    store.commit(
        work.folder,
        {
            "stage": "adapt",
            "cell": cell.model_dump(mode="json"),
            "task": work.task.model_dump(mode="json"),
            "classes": list(work.task.classes),  # of the label maps, from 1; JSON sorts the task's own
            "decoder": work.decoder.model_dump(mode="json"),
            "head_sha256": store.sha256(head) if head else None,
            "start": tuning.began(work.start, fitted.source) if work.start else None,
            "counts": {
                "n_train": len(train),
                "n_train_positive": int(train["label"].sum()),
                "n_train_slices": fitted.slices,
                "n_train_slices_positive": fitted.positive,
                "n_validation": 0,  # nothing is chosen: what the last step leaves is judged
                "n_test": len(test),
                "n_test_positive": int(test["label"].sum()),
            },
            "metrics": scores,
            "undefined": {
                f"{r.role}/{r.cohort}/{r.subject}/{r.region}": r.undefined
                for r in predictions[predictions["undefined"] != ""].itertuples()
            },
            "losses": [round(value, 5) for value in fitted.losses],
            "tags": dict(work.tags),
            "inputs": [
                [c.shard_set.name, c.tokens.name if c.tokens else None] for c in (work.cohort, *work.external)
            ],
        },
    )
    return scores


# ---- data -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def _labels(shard_set: Path, subject: str, session: str) -> NDArray[np.uint8]:
    """Labels [n, H, W] of a session, as the card numbers them."""
    made = Artefact(shard_set)
    return restitch.read_stacks(made, made.manifest(), subject, session).labels


def _keys(table: pd.DataFrame) -> Iterator[tuple[str, str]]:
    yield from zip(table["subject"], table["session"], strict=True)


# ---- learning -------------------------------------------------------------------------------------------------------


def _fit(work: Work, train: pd.DataFrame) -> Fitted:
    home, cell, table = work.cohort, work.cell, _lookup(work.cohort, work.task)
    keys = list(_keys(train))
    labels = table[np.concatenate([_labels(home.shard_set, *key) for key in keys])]
    num_classes = len(work.task.classes) + 1
    if work.start is None:
        return frozen_decoder.fit(
            home.shown, keys, labels, work.decoder, cell.adaptation, num_classes=num_classes, seed=cell.seed
        )
    return tuned_decoder.fit(
        work.start,
        home.shown,
        keys,
        labels,
        work.decoder,
        cell.adaptation,
        num_classes=num_classes,
        seed=cell.seed,
    )


def _keep(work: Work, fitted: Fitted) -> Path | None:
    """Write what was learnt, unless it is as large as a backbone and nobody asked for it."""
    path = work.folder / DECODER
    if work.start is not None:
        if work.cell.adaptation != "lora" and not work.decoder.tuned.keep:
            return None
        tuning.save(fitted.model, path)
        return path
    kept = {name: tensor.cpu().contiguous() for name, tensor in fitted.model.state_dict().items()}
    place.publish(path, lambda beside: save_file(kept, beside))
    return path


def _lookup(cohort: Cohort, task: Segmentation) -> NDArray[np.uint8]:
    return segmentation.lookup(task.classes, store.read_manifest(cohort.shard_set)["classes"])


# ---- judging --------------------------------------------------------------------------------------------------------


def _judged(
    fitted: Fitted, work: Work, cohort: Cohort, table: pd.DataFrame, role: str
) -> Iterator[dict[str, Any]]:
    """Rows of `predictions.parquet`: each subject's label map written, scored in 3-D and pictured."""
    made = Artefact(cohort.shard_set)
    manifest, lookup = made.manifest(), _lookup(cohort, work.task)
    values = [manifest["card"]["segmentation"][name] for name in manifest["classes"]]
    for row in table.to_dict("records"):
        key = (row["subject"], row["session"])
        stacks = restitch.read_stacks(made, manifest, *key)
        truth = restitch.read_truth(
            cohort.label_files.of(*key),
            cohort.label_files.root,
            row,
            values,
            stacks,
            manifest["preprocessing"]["orientation"],
        )
        found = frozen_decoder.probabilities(fitted.scores(cohort.shown, key), stacks.labels.shape[-1])
        predicted = truth.place.to_native(found)
        who = name(*key) if role == "test" else f"{cohort.name}_{name(*key)}"
        written = work.folder / MAPS / f"{who}_dseg.nii.gz"
        restitch.write(written, predicted, truth.place.affine, f"cranium {work.folder.name}")
        known, here = lookup[stacks.labels], found.argmax(0).astype(np.uint8)
        overlay.write(work.folder / OVERLAYS / f"{who}.png", stacks.pixels, known, here)
        about = {
            "cohort": cohort.name,
            "role": role,
            "fold": work.cell.fold,
            "subject": key[0],
            "session": key[1],
            "group": str(row[work.cell.scheme]) if work.cell.scheme in row else key[0],
            **{c: row[c] for c in KEPT if c in row},
            "map": written.name,
            "picture": f"{who}.png",
            "truth_sha256": truth.sha256,
        }
        scored = segmentation.scored(
            lookup[truth.classes], predicted, regions(work.task), truth.place.affine, work.task.tolerance_mm
        )
        yield from (about | score for score in scored)


def regions(task: Segmentation) -> dict[str, tuple[int, ...]]:
    """What is scored: every class, and every declared union of classes, by their numbers."""
    number = {name: k for k, name in enumerate(task.classes, 1)}
    unions = {name: tuple(number[part] for part in parts) for name, parts in task.regions.items()}
    return {name: (k,) for name, k in number.items()} | unions


def name(subject: str, session: str) -> str:
    return f"sub-{subject}_ses-{session}" if session else f"sub-{subject}"


def _legend(task: Segmentation) -> str:
    """What the numbers of the label maps mean, in BIDS' form."""
    lines = [f"{k}\t{name}" for k, name in enumerate(("background", *task.classes))]
    return "\n".join(["index\tname", *lines]) + "\n"


def _metrics(predictions: pd.DataFrame, classes: Collection[str]) -> dict[str, float | None]:
    """Means over subjects, by test set, metric and region; `<metric>` alone is their mean over the task's classes."""
    found: dict[str, float | None] = {}
    for (role, cohort), part in predictions.groupby(["role", "cohort"], sort=False):
        prefix = "test" if role == "test" else f"external/{cohort}"
        for metric in segmentation.METRICS:
            means = {r: rows[metric].astype(float).mean() for r, rows in part.groupby("region", sort=False)}
            known = {r: float(mean) for r, mean in means.items() if np.isfinite(mean)}
            of_classes = [mean for r, mean in known.items() if r in classes]
            found[f"{prefix}/{metric}"] = float(np.mean(of_classes)) if of_classes else None
            found |= {f"{prefix}/{metric}/{r}": known.get(r) for r in means}
        found |= {
            f"{prefix}/missed/{r}": float(rows["missed"].sum())
            for r, rows in part.groupby("region", sort=False)
        }
    return found
