"""Runs, params and metrics: a journal of plain files first, MLflow from it. The sole importer of mlflow.

Whoever computes only appends to a journal; one replayer sends it on, whenever MLflow can be reached. So a tracking
server that is down costs lateness, never work. mlflow is imported inside functions: it takes seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from cranium import journals
from cranium.store import write_atomic

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY = "cranium.key"  # the tag that makes creating a run idempotent
STORE = "cranium.store"  # the tag of the store it was made in: two may share a server, and the keys of what they make
PARENT = "mlflow.parentRunId"
GONE = "killed"  # the tag of a run whose process was killed, until it is taken up again
# MLflow's limits for one batch, one param.
MAX_METRICS, MAX_PARAMS, MAX_TAGS, MAX_VALUE, MAX_NAME = (1000, 100, 100, 6000, 250)
LANES = 4  # requests at a time to a server: most of each is its own work
Point = tuple[str, float, int, int]  # metric, value, milliseconds since the epoch, step
ARTEFACTS = "mlflow-artifacts"  # beside a sqlite database

METRICS: Mapping[str, str] = {
    "train/loss": "sum of the weighted terms",
    "train/dino_global": "DINO loss between the global crops",
    "train/dino_local": "DINO loss of local crops against global ones",
    "train/ibot": "iBOT loss on masked patches",
    "train/koleo": "KoLeo: spread of the CLS features",
    "train/target_entropy": "entropy of the teacher's targets, nats; 0 is collapse",
    "train/prototypes_used": "share of the prototypes that are some target's largest",
    "train/feature_std": "of the unit CLS features; 0 is collapse",
    "train/effective_rank": "of the CLS features of the teacher, first worker; 1 is collapse",
    "train/lr": "learning rate of the last block",
    "train/weight_decay": "of the weights that decay",
    "train/momentum": "of the teacher",
    "train/teacher_temperature": "that the teacher's targets are sharpened with",
    "train/grad_norm_backbone": "of the gradients of the backbone, before clipping",
    "train/grad_norm_dino_head": "of those of the DINO head",
    "train/grad_norm_ibot_head": "of those of the iBOT head, where it is another",
    "train/skipped": "updates left out so far because they were not finite",
    "sys/data_wait_seconds": "of a step, spent waiting for data",
    "sys/data_wait_share": "of a step, spent waiting for data",
    "monitor/knn_position": "balanced accuracy of slice position (fifths), k-NN, monitoring cohort",
    "monitor/knn_contrast": "balanced accuracy of the contrast, k-NN, monitoring cohort",
    "monitor/linear_<label>": "AUROC of a label, linear probe, monitoring cohort; knn_<label> likewise",
    "sys/stacks_per_second": "slice stacks through the step, all workers",
    "sys/seconds": "wall time of a stage",
    "test/auroc": "area under the ROC curve, macro one-vs-rest, test fold; external/<cohort>/... likewise; of subjects "
    "of whom only some contrasts are seen: test/<contrasts>/auroc",
    "test/aupr": "area under the precision-recall curve, test fold",
    "test/balanced_accuracy": "mean recall of the classes, test fold",
    "test/f1": "of the most probable class, macro beyond two, test fold",
    "test/sensitivity_at_90": "sensitivity at 90 % specificity, macro one-vs-rest, test fold",
    "test/brier": "mean squared error of the probabilities, test fold",
    "test/ece": "expected calibration error, 15 bins, test fold",
    "external/<cohort>/sensitivity_at_home_threshold": "at the thresholds of 90 % specificity on the test fold",
    "external/<cohort>/specificity_at_home_threshold": "likewise",
    "search/trials": "that a cell spent on its settings; of them search/ended_early and search/diverged",
    "search/epochs": "that these trials were trained for",
    "search/validation_auroc": "of the winner, too high; search/declared_validation_auroc of what was declared",
    "n_train": "labelled training subjects of a cell",
    "n_test": "test subjects of a cell",
    "cells": "cells of a sweep",
}


class TrackingError(Exception):
    """MLflow can't be reached or refuses; the work itself is done and kept."""


@dataclass(frozen=True)
class Run:
    id: str
    key: str
    name: str
    status: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]


class Tracker:
    """One MLflow experiment; of its runs, those of one store where `store` names it.

    Every method raises `TrackingError` within seconds when MLflow does not answer.
    """

    def __init__(self, uri: str, experiment: str, store: str = "") -> None:
        self.uri, self.store = uri, store
        with reaching(uri):
            self.client = connected(uri)
            self.experiment_id = self._experiment(experiment)

    def _experiment(self, name: str) -> str:
        with _schema_lock(self.uri):  # two processes that first use a database at once break its schema
            found = self.client.get_experiment_by_name(name)
            if found is None:
                return str(
                    self.client.create_experiment(
                        name,
                        artifact_location=_artefact_location(self.uri),
                        tags={"mlflow.experimentKind": "custom_model_development"},  # opens as training runs
                    )
                )
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def run(self, key: str, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
        """The run of this key: found, or made. A restart makes no second one; one that had stopped is RUNNING again."""
        with reaching(self.uri), _schema_lock(self.uri):
            own = {KEY: key, **({STORE: self.store} if self.store else {})}
            wanted = {**tags, **own, "mlflow.runName": name, **({PARENT: parent} if parent else {})}
            if found := self.found(own):
                run_id = str(found.info.run_id)
                self.send(run_id, tags={k: v for k, v in wanted.items() if found.data.tags.get(k) != v})
                if found.info.status in ("FAILED", "KILLED"):  # taken up again
                    self.client.update_run(run_id, status="RUNNING")
                    if GONE in found.data.tags:
                        self.client.delete_tag(run_id, GONE)
                return run_id
            return str(self.client.create_run(self.experiment_id, run_name=name, tags=wanted).info.run_id)

    def found(self, tags: Mapping[str, str]) -> Any:
        """MLflow's own object of a run that has these tags; None where there is none."""
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        page = self.client.search_runs([self.experiment_id], wanted, max_results=1)
        return page[0] if page else None

    def record(
        self,
        key: str,
        name: str,
        parent: str,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        metrics: Mapping[str, float],
        status: str = "FINISHED",
    ) -> str:
        """A whole run at once, FINISHED or FAILED; one that is finished is left as it is. For the cells of a grid."""
        run_id = self.run(key, name, tags, parent)
        with reaching(self.uri):
            if self.client.get_run(run_id).info.status == "RUNNING":
                # Not `send`: some of it may be there already, from a command that was killed.
                self.log(run_id, metrics, params=params)
                self.client.set_terminated(run_id, status)
        return run_id

    def params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Log params that are not there yet; MLflow's params can't change."""
        self.log(run_id, params=values)

    def log(
        self,
        run_id: str,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        step: int = 0,
    ) -> None:
        """Metrics, tags and params at once. A metric that has this value already is not logged again."""
        metrics = {named(k): float(v) for k, v in (metrics or {}).items()}
        params = {named(k): str(v) for k, v in (params or {}).items()}
        with reaching(self.uri):
            data = self.client.get_run(run_id).data
            now = int(time.time() * 1000)
            self.send(
                run_id,
                [(k, v, now, step) for k, v in metrics.items() if data.metrics.get(k) != v],
                {k: v for k, v in params.items() if k not in data.params},
                {k: str(v) for k, v in (tags or {}).items() if data.tags.get(k) != str(v)},
            )

    def send(
        self,
        run_id: str,
        metrics: list[Point] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Metrics (name, value, milliseconds, step), params and tags, in batches that MLflow takes."""
        from mlflow.entities import Metric, Param, RunTag

        points = [Metric(*point) for point in metrics or []]
        pairs = [Param(k, v[:MAX_VALUE]) for k, v in (params or {}).items()]
        labels = [RunTag(k, v[:MAX_VALUE]) for k, v in (tags or {}).items()]
        while points or pairs or labels:
            room = MAX_METRICS - len(pairs[:MAX_PARAMS]) - len(labels[:MAX_TAGS])  # 1000 entities in all
            self.client.log_batch(run_id, points[:room], pairs[:MAX_PARAMS], labels[:MAX_TAGS])
            points, pairs, labels = points[room:], pairs[MAX_PARAMS:], labels[MAX_TAGS:]

    def replay(self, run_id: str, folder: Path, ask: bool = False) -> int:
        """Send what the journal in `folder` holds and this run lacks; return how many points were sent.

        `<folder>/sent.json` remembers the last step sent of every metric, under an exclusive lock: nothing is sent
        twice, also when an attempt repeats steps that an earlier one had already reported. `ask`: not our memory says
        what MLflow has, but MLflow, which may have lost some of it.
        """
        entries = journals.read(folder)
        if not entries:
            return 0
        with reaching(self.uri), _exclusive(folder / "sent.lock"):
            marks_path = folder / "sent.json"
            remembered = json.loads(marks_path.read_text()) if marks_path.is_file() else {}
            marks: dict[str, int] = remembered.setdefault(f"{self.uri} {run_id}", {})
            points = [
                (named(name), value, int(entry.time * 1000), entry.step)
                for entry in entries
                for name, value in entry.metrics.items()
                if ask or entry.step > marks.get(named(name), -1)
            ]
            if ask:
                there = {
                    (name, point.step)
                    for name in {name for name, *_ in points}
                    for point in self.client.get_metric_history(run_id, name)
                }
                points = [point for point in points if (point[0], point[3]) not in there]
            writing, broken_off = threading.Lock(), threading.Event()
            lanes = self._lanes(points)
            # Smaller ones, so that a slow server has no more to do before it has to answer.
            size = MAX_METRICS // len(lanes)

            def drain(lane: list[Point]) -> None:
                for start in range(0, len(lane), size):
                    if broken_off.is_set():
                        return
                    chunk = lane[start : start + size]
                    # If we die here, the same points come again: MLflow knows them by time.
                    self.send(run_id, chunk)
                    with writing:
                        marks.update({name: step for name, _, _, step in chunk})
                        write_atomic(marks_path, json.dumps(remembered, sort_keys=True))

            with ThreadPoolExecutor(len(lanes)) as pool:
                sending = [pool.submit(drain, lane) for lane in lanes]
                try:
                    wait(sending, return_when=FIRST_EXCEPTION)
                finally:  # a refusal in one, or a signal: the others need not send all they have
                    broken_off.set()
            for lane_sent in sending:
                lane_sent.result()
            return len(points)

    def _lanes(self, points: list[Point]) -> list[list[Point]]:
        """Points to send side by side, each metric's in one lane and in order; SQLite takes one writer at a time."""
        if _sqlite(self.uri):
            return [points]
        lane_of = {name: number % LANES for number, name in enumerate(sorted({name for name, *_ in points}))}
        return [[point for point in points if lane_of[point[0]] == lane] for lane in range(LANES)]

    def artefact(self, run_id: str, path: Path) -> None:
        """Attach a file, or the files of a folder."""
        with reaching(self.uri):
            log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
            log(run_id, str(path))

    def finish(self, run_id: str, status: str = "FINISHED", ended: float | None = None) -> None:
        """End a run: FINISHED, FAILED or KILLED, now or at a time in seconds. A finished run stays as it is."""
        with reaching(self.uri):
            if self.client.get_run(run_id).info.status != status:
                self.client.set_terminated(run_id, status, ended and int(1000 * ended))

    def children(self, parent: str) -> list[Run]:
        """The runs below `parent`, oldest first."""
        return self._all(f"tags.`{PARENT}` = '{parent}'")

    def running(self) -> list[Run]:
        """The runs of the store that have not ended, as far as MLflow knows."""
        return self._all(f"attributes.status = 'RUNNING' and tags.`{STORE}` = '{self.store}'")

    def _all(self, wanted: str) -> list[Run]:
        with reaching(self.uri):
            runs: list[Run] = []
            token: str | None = None
            while True:
                page = self.client.search_runs(
                    [self.experiment_id], wanted, order_by=["start_time ASC"], page_token=token
                )
                runs += [_run(found) for found in page]
                token = page.token
                if not token:
                    return runs


def forget(uri: str, run_ids: list[str], date: str, artefacts: tuple[str, ...]) -> None:
    """Tag runs as made with a subject who was forgotten on `date`, and delete these of their artefacts."""
    with reaching(uri):
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        client = connected(uri)
        for run_id in run_ids:
            info = client.get_run(run_id).info
            if info.lifecycle_stage == "deleted":
                continue
            client.set_tag(run_id, "forgotten", date)
            for name in {item.path for item in client.list_artifacts(run_id)} & set(artefacts):
                get_artifact_repository(info.artifact_uri, tracking_uri=uri).delete_artifacts(name)


def _run(found: Any) -> Run:
    info, data = found.info, found.data
    return Run(
        str(info.run_id),
        data.tags.get(KEY, ""),
        str(info.run_name),
        str(info.status),
        data.tags,
        data.params,
        data.metrics,
    )


def run_of_alias(uri: str, model: str, alias: str) -> str:
    """The run behind `<model>@<alias>` of MLflow's registry. Raises `TrackingError` when there is none."""
    with reaching(uri):
        return str(connected(uri).get_model_version_by_alias(model, alias).run_id or "")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested plain values as `a.b.c -> text`, which is what MLflow's params are."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = plain(value)
    return flat


def named(text: str) -> str:
    """A metric's or param's name as MLflow takes it: letters of any script, digits, `_ - . `, and `/` as in a path.

    What had to be changed ends in a hash of what it was, so that two names stay two.
    """
    parts = re.sub(r"[^\w/. -]", "_", text).split("/")
    name = "/".join(part for part in parts if part.strip("."))
    if name == text and 0 < len(name) <= MAX_NAME:
        return text
    return f"{name[: MAX_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def plain(value: Any) -> str:
    """A value as a tag or param: text as it is, lists joined by commas, the rest as JSON."""
    if isinstance(value, str):
        return value
    return ",".join(map(plain, value)) if isinstance(value, list | tuple) else json.dumps(value)


def connected(uri: str) -> MlflowClient:
    """A client that gives up within seconds."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from mlflow import MlflowClient

    with _schema_lock(uri):
        if (database := _sqlite(uri)) and not database.exists():
            _make(database)
        return MlflowClient(tracking_uri=uri)


def _make(database: Path) -> None:
    """A new database, whole or not at all: MLflow refuses for ever one that was killed while it made the tables."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    draft = database.with_name(f"{database.name}.part")
    for left in database.parent.glob(f"{draft.name}*"):  # by a kill: the draft, its rollback journal
        left.unlink()
    SqlAlchemyStore(f"sqlite:///{draft}", (database.parent / ARTEFACTS).absolute().as_uri()).engine.dispose()
    draft.replace(database)


def _sqlite(uri: str) -> Path | None:
    return Path(urlparse(uri).path[1:]) if uri.startswith("sqlite:///") else None


def _artefact_location(uri: str) -> str | None:
    """Beside a sqlite database; a server knows its own. MLflow's default would be the current folder."""
    database = _sqlite(uri)
    return (database.parent / ARTEFACTS).absolute().as_uri() if database else None


@contextlib.contextmanager
def _schema_lock(uri: str) -> Iterator[None]:
    database = _sqlite(uri)
    with _exclusive(database.with_suffix(".lock")) if database else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Turn what goes wrong with MLflow into a `TrackingError`."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TrackingError(f"MLflow at {uri} does not take it: {reason}") from error
