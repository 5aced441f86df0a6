"""A search for better settings inside each cell's own labelled subjects: Optuna and ASHA on Ray Tune.

Trials of one cell come one after another, those of different cells side by side. So what a cell tries follows from
its own subjects and seed alone, on any number of workers, and a search that was killed and is asked for again goes the
same way: a trial whose epochs are on disk (`search_trials.py`) tells them instead of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from cranium import adapt, search_trials, tuning
from cranium.config import Compute, Finetune, Range, Search, UserError
from cranium.search_trials import Settings, Trial
from cranium.watch import repeatedly
from ray import tune

Folds = Mapping[str, int]
Report = Callable[[float, float], None]  # share of the schedule, in per cent; best score so far
SCORE, PROGRESS = "score", "progress"


def wanted(work: adapt.Work, folds: Folds) -> bool:
    """Whether a cell has a search before it: one is asked for, not over, and somebody can be held out to select by."""
    if not isinstance(work.spec, Finetune) or not work.spec.search or search_trials.concluded(work.folder):
        return False
    train = adapt.learnt_from(work, folds)
    return bool(tuning.hold_out(train, work.spec.validation, work.cell.seed))


def search(
    name: str,
    storage: Path,
    wanted: Sequence[tuple[adapt.Work, Folds]],
    compute: Compute,
    tell: Callable[[int, int, str], None],
) -> dict[str, str]:
    """Search for the settings of these cells, each with its folds; folder name -> reason of those that failed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    works, folds = [work for work, _ in wanted], [of for _, of in wanted]
    specs = [_searched(work) for work in works]
    cells = Cells(works)
    total = sum(_of(spec).trials for spec in specs)
    threads = compute.threads or max(1, int(compute.cpus_per_worker))
    trial = tune.with_parameters(_trial, works=tuple(works), folds=tuple(folds), threads=threads)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": compute.cpus_per_worker, "gpu": compute.gpus_per_worker}),
        tune_config=tune.TuneConfig(
            metric=SCORE,
            mode="max",
            search_alg=cells,
            scheduler=Halving([_of(spec) for spec in specs]),
            num_samples=total,
            max_concurrent_trials=compute.num_workers,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(storage),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
    with repeatedly(lambda: tell(cells.ended, total, "trials"), 0.5):
        results = tuner.fit()
    failures = {
        works[result.config["cell"]].folder.name: str(result.error).strip().splitlines()[-1]
        for result in results
        if result.error and result.config
    }
    return {
        work.folder.name: "its search ended early"
        for work in works
        if not search_trials.concluded(work.folder)
    } | failures


def _searched(work: adapt.Work) -> Finetune:
    assert isinstance(work.spec, Finetune)
    return work.spec


def _of(spec: Finetune) -> Search:
    assert spec.search
    return spec.search


# ---- what Tune asks -------------------------------------------------------------------------------------------------


class Cells(Searcher):  # type: ignore[misc]
    """An Optuna study for each cell, one trial of it at a time; the first one tries what is declared.

    Nothing is saved when Tune saves: the files of the trials are the state.
    """

    def __init__(self, works: Sequence[adapt.Work]) -> None:
        super().__init__(metric=SCORE, mode="max")
        self.works = tuple(works)
        self.studies = [study(_searched(work)) for work in works]
        self.left = [_of(_searched(work)).trials for work in works]
        self.running: dict[str, int] = {}  # Tune's id of a trial -> its cell
        self.ended = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        busy = set(self.running.values())
        if not any(self.left) and not busy:
            return str(Searcher.FINISHED)
        for cell, left in enumerate(self.left):
            if left and cell not in busy:
                spec = _searched(self.works[cell])
                self.running[trial_id], self.left[cell] = cell, left - 1
                settings = self.studies[cell].suggest(trial_id)
                return {"cell": cell, "number": _of(spec).trials - left, "settings": settings}
        return None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.studies[self.running[trial_id]].on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        cell = self.running.pop(trial_id)
        if error or result is None:  # no past to go on from: the cell fails, and is taken up again next time
            self.left[cell] = 0
            return
        self.studies[cell].on_trial_complete(trial_id, result)
        self.ended += 1
        if not self.left[cell]:
            search_trials.conclude(self.works[cell].folder, _searched(self.works[cell]))

    def save(self, checkpoint_path: str) -> None: ...


class Halving(FIFOScheduler):  # type: ignore[misc]
    """ASHA for each cell: its trials compete with one another only."""

    def __init__(self, searches: Sequence[Search]) -> None:
        super().__init__()
        self.cells = [halving(search) for search in searches]

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        self.cells[trial.config["cell"]].on_trial_add(controller, trial)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return str(self.cells[trial.config["cell"]].on_trial_result(controller, trial, result))

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.cells[trial.config["cell"]].on_trial_complete(controller, trial, result)

    def on_trial_remove(self, controller: Any, trial: Any) -> None:
        self.cells[trial.config["cell"]].on_trial_remove(controller, trial)


def study(spec: Finetune) -> OptunaSearch:
    """A seeded study of the declared space; its first suggestion is the declared settings."""
    space = {name: _distribution(spec, name) for name in sorted(_of(spec).space)}
    declared = {name: getattr(spec, name) for name in space}
    sampler = optuna.samplers.TPESampler(seed=_of(spec).seed)
    return OptunaSearch(space, metric=SCORE, mode="max", sampler=sampler, points_to_evaluate=[declared])


def _distribution(spec: Finetune, name: Any) -> BaseDistribution:
    space = _of(spec).space[name]
    if not isinstance(space, Range):
        return CategoricalDistribution([getattr(spec.with_settings({name: one}), name) for one in space])
    if type(spec).model_fields[name].annotation is int:
        return IntDistribution(int(space.low), int(space.high), log=space.log)
    return FloatDistribution(space.low, space.high, log=space.log)


def halving(search: Search) -> Any:
    """The scheduler of one cell, in per cent of a trial's own schedule."""
    if not search.asha:
        return FIFOScheduler()
    return ASHAScheduler(
        PROGRESS,
        SCORE,
        "max",
        max_t=100,
        grace_period=100 * search.asha.grace,
        reduction_factor=search.asha.reduction,
    )


# ---- one trial ------------------------------------------------------------------------------------------------------


def _trial(config: dict[str, Any], works: Sequence[adapt.Work], folds: Sequence[Folds], threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    cell = config["cell"]

    def report(progress: float, score: float) -> None:
        tune.report({PROGRESS: progress, SCORE: score})

    attempt(works[cell], folds[cell], config["number"], config["settings"], report)


def attempt(work: adapt.Work, folds: Folds, number: int, settings: Settings, report: Report) -> None:
    """Fine-tune on the cell's labelled subjects with these settings; report, and keep, each epoch's validation scores.

    Epochs that were kept before are reported first, and are not kept anew when the fit comes by them again.
    """
    spec = _searched(work).with_settings(settings)
    trial = search_trials.read(work.folder, number) or Trial(settings)
    if (
        trial.settings != settings
    ):  # of another past: its search had other weights or another machine below it
        trial = Trial(settings)
    for epoch in range(1, len(trial.curve) + 1):
        report(100 * epoch / spec.epochs, trial.score(epoch))
    if trial.diverged:
        report(100, search_trials.WORST)
    if trial.diverged or len(trial.curve) == spec.epochs:
        return
    done = 0

    def tell(auroc: float, loss: float) -> None:
        nonlocal trial, done
        done += 1
        if done > len(trial.curve):
            trial = Trial(settings, (*trial.curve, (auroc, loss)))
            search_trials.write(work.folder, number, trial)
            report(100 * done / spec.epochs, trial.score())

    train = adapt.learnt_from(work, folds)
    try:
        adapt.learn(work, spec, train, tell)
    except UserError as error:
        if error.code != "LOSS":
            raise
        search_trials.write(work.folder, number, Trial(settings, trial.curve, str(error)))
        report(100, search_trials.WORST)
