"""Looks at the teacher while it is being trained: what a frozen probe reads on a cohort that no task tests on. [Ray]

A worker leaves the teacher's backbone in `<run>/monitor/<step>/` and goes on. Here, beside the driver, one Ray task at
a time measures what is left there; the results are a journal of their own, so a resumed run voids nothing of it.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cranium import adapt, checkpoint, embed, journals, store
from cranium.config import Classification, Monitor
from cranium.models import probe
from cranium.models.vit import Backbone
from cranium.store import Artefact
from cranium.tasks import metrics, splits
from cranium.volume import shard
from cranium.watch import repeatedly

FOLDER = "monitor"
MEASURED = "measured.json"
FAILED = "failed"  # its key, where nothing could be measured: why
BINS = 5  # of slice positions, from the lowest slice to the highest
NEIGHBOURS = 10
SLICES = 8  # of a session, at least, where subjects are judged by the mean of their slices
FEWEST = 5  # subjects of a class, or it is left out
GOLDEN = 0.618034  # its multiples fill the unit interval evenly


def measure(backbone: Backbone, shard_set: Path, spec: Monitor) -> dict[str, float]:
    """k-NN accuracy of slice position and contrast, k-NN and linear AUROC of the card's labels, subjects held out.

    Position and contrast are the positive control: chance is 1/5 and 1/C, and any working backbone reads them.
    """
    manifest = store.read_manifest(shard_set)
    rows = _rows(shard_set, manifest, spec.stacks, SLICES if spec.labels else 1)
    device = torch.device("cuda" if torch.cuda.is_available() and spec.gpus else "cpu")
    backbone = backbone.to(device).eval()

    def features(stacks: NDArray[np.uint8]) -> NDArray[np.float32]:
        return embed.encode(backbone, stacks, ("cls",), 32, device)

    cls = features(rows["stacks"])
    found = {"monitor/knn_position": _knn(cls, _bins(rows["position"]), rows["subject"])}
    if len(manifest["channels"]) > 1:
        kept, channel = _single_contrasts(rows["stacks"], rows["present"], spec.stacks)
        subject = np.repeat(rows["subject"], len(manifest["channels"]))[kept[1]]
        found["monitor/knn_contrast"] = _knn(features(kept[0]), channel, subject)
    for label in spec.labels:
        found |= _labels(cls, rows, shard_set, manifest, label)
    return found


def _rows(shard_set: Path, manifest: Mapping[str, Any], most: int, least: int) -> dict[str, NDArray[Any]]:
    """`most` stacks in all, `least` or more of a session, both spread evenly; with what is known of each."""
    base = shard.base(shard_set)
    sessions: dict[tuple[str, str], list[tuple[int, int, str, int]]] = {}
    for entry in manifest["shards"]:
        for index, group in enumerate(entry["row_groups"]):
            place = (group["first_slice"], group["rows"], f"{base}/{entry['file']}", index)
            sessions.setdefault((group["subject"], group["session"]), []).append(place)
    each = max(least, most // len(sessions))
    kept = np.unique(np.linspace(0, len(sessions) - 1, max(1, most // each)).round().astype(int))
    names = sorted(sessions)
    parts: dict[str, list[Any]] = {"stacks": [], "present": [], "subject": [], "position": []}
    for number, name in enumerate(names[place] for place in kept):
        groups = sorted(sessions[name])
        slices = sum(rows for _, rows, _, _ in groups)
        phase = number * GOLDEN % 1  # else one slice of each would always be the lowest
        wanted = np.unique(((np.arange(each) + phase) / each * slices).astype(int))
        for _, rows, file, index in groups:
            take, wanted = wanted[wanted < rows], wanted[wanted >= rows] - rows
            if not len(take):
                continue
            table = shard.read_row_group(file, index)
            shard.check_rows(table, f"{file}, row group {index}")
            parts["stacks"].append(shard.pixels(table)[take])
            parts["present"].append(table["present"].to_numpy()[take])
            parts["subject"].append(np.full(len(take), name[0]))
            above = table["slice"].to_numpy()[take] - groups[0][0]
            parts["position"].append(above / table["num_slices"].to_numpy()[take])
    return {what: np.concatenate(values) for what, values in parts.items()}


def _bins(position: NDArray[Any]) -> NDArray[np.int64]:
    edges = np.quantile(position, np.linspace(0, 1, BINS + 1)[1:-1])
    return np.searchsorted(edges, position, side="right").astype(np.int64)


def _single_contrasts(
    stacks: NDArray[np.uint8], present: NDArray[Any], most: int
) -> tuple[tuple[NDArray[np.uint8], NDArray[np.int64]], NDArray[np.int64]]:
    """Each present contrast alone, put into every channel: (stacks, index of row x channel), and its number."""
    channels = stacks.shape[1]
    index = np.flatnonzero((present[:, None] >> np.arange(channels) & 1).ravel())
    index = index[np.unique(np.linspace(0, len(index) - 1, most).round().astype(int))]
    row, channel = np.divmod(index, channels)
    alone = np.repeat(stacks[row, channel][:, None], channels, axis=1)
    return (alone, index), channel


def _knn(features: NDArray[Any], labels: NDArray[np.int64], subjects: NDArray[Any]) -> float:
    """Balanced accuracy of k-NN over five folds of subjects."""
    predicted = np.zeros_like(labels)
    for train, test in _folds(subjects):
        shares = probe.knn(features[train], labels[train], features[test], NEIGHBOURS)
        predicted[test] = shares.argmax(axis=1)
    recalls = [float((predicted[labels == k] == k).mean()) for k in np.unique(labels)]
    return float(np.mean(recalls))


def _folds(subjects: NDArray[Any]) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    names = np.unique(subjects)
    order = np.random.default_rng(0).permutation(len(names))
    fold = dict(
        zip(names[order].tolist(), (np.arange(len(names)) % min(5, len(names))).tolist(), strict=True)
    )
    of_row = np.array([fold[s] for s in subjects.tolist()])
    for number in sorted(set(fold.values())):
        yield of_row != number, of_row == number


def _labels(
    cls: NDArray[Any],
    rows: Mapping[str, NDArray[Any]],
    shard_set: Path,
    manifest: Mapping[str, Any],
    label: str,
) -> dict[str, float]:
    """Subject-level AUROC of one label of the card, features averaged over slices; absent where it is undefined.

    Classes of fewer than `FEWEST` subjects that were looked at are left out, and so is a label that no session has: the
    table behind it may be optional.
    """
    told = pd.read_parquet(shard_set / "sessions.parquet").get(manifest["card"]["labels"][label]["column"])
    if told is None or told.isna().all():
        return {}
    classes = tuple(manifest["card"]["labels"][label]["classes"])
    task = Classification(
        task="classification", name="monitor", cohort=manifest["cohort"], label=label, classes=classes
    )
    table = adapt.diagnosed(shard_set, task)
    table = table[table["subject"].isin(set(rows["subject"].tolist()))]
    counts = table["label"].value_counts()
    table = table[table["label"].isin(counts.index[counts >= FEWEST])]
    if table["label"].nunique() < 2:
        return {}
    table = table.assign(label=pd.factorize(table["label"], sort=True)[0])
    pooled = np.stack([cls[rows["subject"] == subject].mean(axis=0) for subject in table["subject"]])
    labels = table["label"].to_numpy()
    fold_of = splits.folds(table["subject"].tolist(), labels, table["matched"].tolist(), 5, 0)
    folds = table["subject"].map(fold_of).to_numpy()
    scores: dict[str, list[float]] = {"knn": [], "linear": []}
    for number in sorted(set(folds.tolist())):
        train, test = folds != number, folds == number
        fitted = probe.fit_linear(
            pooled[train],
            labels[train],
            c_grid=(0.01,),
            folds=2,
            seed=0,
            num_classes=table["label"].nunique(),
        )
        tried = {
            "knn": probe.knn(
                pooled[train], labels[train], pooled[test], NEIGHBOURS, num_classes=table["label"].nunique()
            ),
            "linear": fitted.predict(pooled[test]),
        }
        for name, probabilities in tried.items():
            auroc = metrics.classification_metrics(labels[test], probabilities)["auroc"]
            if isinstance(auroc, float):
                scores[name].append(auroc)
    return {f"monitor/{name}_{label}": float(np.mean(found)) for name, found in scores.items() if found}


@contextmanager
def watching(run: Path, shard_set: Artefact | None, spec: Monitor | None) -> Iterator[None]:
    """Measure what the workers leave in `run/monitor` while the body works, and what is left at its end."""
    if spec is None or shard_set is None:
        yield
        return
    with repeatedly(lambda: _measure_all(run / FOLDER, shard_set, spec), 1.0):
        yield
    _measure_all(run / FOLDER, shard_set, spec)


def _measure_all(folder: Path, shard_set: Artefact, spec: Monitor) -> None:
    import ray

    task = ray.remote(num_cpus=spec.cpus, num_gpus=spec.gpus, max_retries=2)(_measure_file)
    for step in sorted(folder.glob("*")):
        if step.name.isdigit() and (step / checkpoint.BACKBONE).is_file() and not (step / MEASURED).is_file():
            try:
                found = ray.get(task.remote(step, shard_set.path, spec))
            except ray.exceptions.RayError as error:  # a look costs a point of a curve, never the run
                traceback.print_exc()
                store.write_atomic(step / MEASURED, json.dumps({FAILED: str(error).strip().splitlines()[-1]}))
                (step / checkpoint.BACKBONE).unlink()
                continue
            store.write_atomic(step / MEASURED, json.dumps(found))
            with journals.Journal(folder / "journal", f"step{step.name}", resume=int(step.name)) as journal:
                journal.metrics(int(step.name), found)
            (step / checkpoint.BACKBONE).unlink()


def _measure_file(step: Path, shard_set: Path, spec: Monitor) -> dict[str, float]:
    torch.set_num_threads(spec.threads)
    card = checkpoint.read_card(step)
    form = {name: card[name] for name in ("arch", "in_channels", "image_size")}
    backbone, _ = checkpoint.load_backbone("run:monitored", **form, pretrained=Artefact(step))
    return measure(backbone, shard_set, spec)


def leave(run: Path, step: int, backbone: Backbone, card: Mapping[str, Any]) -> None:
    """What a worker calls: the teacher's backbone, to be measured as of `step`."""
    folder = run / FOLDER / f"{step:08}"
    if not (folder / MEASURED).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.export(folder, backbone, card)
