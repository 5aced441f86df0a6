"""What there is of an experiment already: raw files, finished artefacts, and what could not be had.

Nothing is made here. What a stage needs and is not there ends in a `UserError` that names the command which makes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cranium import store, sweep_progress
from cranium.config import (
    FROZEN,
    Adaptation,
    Classification,
    Experiment,
    Machine,
    Segmentation,
    Stack,
    UserError,
    hiding,
)
from cranium.store import Artefact
from cranium.study import Study, clock

if TYPE_CHECKING:
    from cranium.segmenting import LabelFiles
    from cranium.sweep import Part

Features = dict[tuple[str, ...], Artefact]  # see `sweep.Features`
DEMO_COHORTS = ("demo_ssl", "demo", "demo_external")


def demo_artefact(study: Study) -> Artefact | None:
    if study.exp.demo is None:
        return None
    from cranium import demo as maker

    key = {"recipe": maker.RECIPE, "demo": study.exp.demo}
    return store.artefact(study.machine.store, "demo", "demo", key)


def raw_folder(study: Study, cohort: str) -> Path | None:
    """The folder of a cohort's files; None for a demo cohort that could not be made."""
    if given := study.machine.raw.get(cohort):
        if not given.is_dir():
            raise UserError("NO_RAW", f"raw.{cohort}={given} is no folder")
        return given
    if cohort in DEMO_COHORTS and (made := demo_artefact(study)):
        if not made.done:
            raise UserError("NO_DEMO", "the demo cohorts are not made yet; run `cranium demo` first")
        if (made.path / cohort).is_dir():
            return made.path / cohort
        reasons = dict(made.manifest()["missing"])
        study.missing[cohort] = str(reasons.get(cohort, "not made"))
        return None
    raise UserError("NO_RAW", f"where are the files of cohort {cohort}? give raw.{cohort}=DIR")


def shard_set_of(study: Study, cohort: str, raw: Path) -> Artefact:
    from cranium import ingest as stage

    return stage.artefact(study.cards[cohort], raw, study.exp.ingest, study.machine)


def ingested(study: Study, cohorts: tuple[str, ...]) -> dict[str, Artefact]:
    """The finished shard sets of `cohorts`. Raises `UserError(NOT_INGESTED)` naming the command that makes one."""
    sets: dict[str, Artefact] = {}
    for cohort in cohorts:
        raw = raw_folder(study, cohort)
        if raw is None:
            continue
        made = shard_set_of(study, cohort, raw)
        if not made.done:
            reason = f"cohort {cohort} is not ingested with these settings; run `cranium ingest` first"
            raise UserError("NOT_INGESTED", reason)
        sets[cohort] = made
    return sets


def had(sets: Mapping[str, Artefact], study: Study, cohort: str) -> Artefact:
    if cohort not in sets:
        raise UserError(
            "NO_COHORT", f"cohort {cohort} could not be had: {study.missing.get(cohort, 'unknown')}", 1
        )
    return sets[cohort]


@contextlib.contextmanager
def without(study: Study, init: str) -> Iterator[None]:
    """Weights that can't be had cost their own row, not the experiment; the report and the exit code say so."""
    try:
        yield
    except UserError as error:
        if error.code != "NO_WEIGHTS":
            raise
        study.missing[init] = str(error)


def pretrainings(study: Study) -> dict[str, Artefact]:
    from cranium import pretrain as stage

    spec = study.exp.pretrain
    if spec is None:
        return {}
    sets = ingested(study, spec.cohorts)
    corpus = [had(sets, study, cohort) for cohort in spec.cohorts]
    made: dict[str, Artefact] = {
        init: stage.artefact(study.exp, study.machine, init, corpus) for init in spec.inits
    }
    if absent := [init for init, result in made.items() if not result.done]:
        raise UserError(
            "NOT_PRETRAINED", f"{', '.join(absent)} is not pretrained yet; run `cranium pretrain` first"
        )
    return made


def pretraining(study: Study, init: str | None = None, stack: Stack | None = None) -> Artefact:
    """The finished pretraining that makes `init` of stacks of this kind; None: the only one there is."""
    views = study.views()
    if (stack is None and len(views) > 1) or (stack is not None and stack not in views):
        raise UserError("USAGE", f"of which stacks? stack=... one of {', '.join(views)}")
    made = pretrainings(views[stack] if stack else next(iter(views.values())))
    if init is None and len(made) == 1:
        return next(iter(made.values()))
    if init not in made:
        raise UserError("USAGE", f"which pretraining? init=... one of {', '.join(made) or 'none'}")
    return made[init]


def weights(study: Study, init: str, pretrained: Mapping[str, Artefact]) -> Artefact | None:
    """The pretraining behind an initialisation, if one is; `run:<id>` is looked up in the store.

    What a run saw must be declared, or the leakage gate could not see it: its cohorts must be `pretrain.cohorts`.
    """
    if not init.startswith("run:"):
        return pretrained.get(init)
    from cranium import checkpoint

    made = checkpoint.find_run(study.machine.store, init, study.machine.tracking)
    saw, declared = made.manifest()["cohorts"], study.exp.pretrain.cohorts if study.exp.pretrain else ()
    if unseen := sorted(set(saw) - set(declared)):
        reason = f"{init} was pretrained on {', '.join(unseen)}, which pretrain.cohorts does not name"
        raise UserError(
            "LEAKAGE", f"{reason}; name them (and pretrain.inits=[]), so that leakage can be checked"
        )
    return made


def subsets(exp: Experiment) -> tuple[tuple[str, ...], ...]:
    """Of contrasts, that features are wanted for; (): all that is there."""
    assert exp.sweep
    channels, spec = exp.ingest.channels, exp.sweep.contrasts
    wanted = (*spec.trained(channels), *spec.judged(channels))
    return tuple(dict.fromkeys(hiding(subset, channels) for subset in wanted))


def to_embed(exp: Experiment) -> list[tuple[str, str, Adaptation | None]]:
    """(init, cohort, None) where features (or volumes) are wanted, (init, cohort, adaptation) where tokens are."""
    assert exp.sweep and exp.adapt
    found: list[tuple[str, str, Adaptation | None]] = []
    for init in exp.sweep.init:
        for task in exp.adapt.tasks:
            match task:
                case Classification():
                    frozen = init != "covariates" and FROZEN & set(exp.sweep.adaptations(task, init))
                    ways: tuple[Adaptation | None, ...] = (None,) if frozen else ()
                case Segmentation():
                    ways = tuple(way for way in exp.sweep.adaptations(task, init) if way in FROZEN)
            found += [(init, cohort, way) for cohort in (task.cohort, *task.external) for way in ways]
    return list(dict.fromkeys(found))


def embeddings(
    study: Study, init: str, shard_set: Artefact, weights: Artefact | None, way: Adaptation | None
) -> dict[tuple[str, ...], Artefact]:
    """By the subset of contrasts that alone is seen."""
    from cranium import embed, tokens, volumes

    exp, machine = study.exp, study.machine
    if init == "volumes":
        return {(): volumes.artefact(machine, shard_set)}
    if way is not None:
        return {(): tokens.artefact(exp, machine, init, shard_set, weights, way)}
    return {s: embed.artefact(exp, machine, init, shard_set, weights, s) for s in subsets(exp)}


def embedded(study: Study, sets: Mapping[str, Artefact]) -> Features:
    pretrained, features = pretrainings(study), Features()
    for init, cohort, way in to_embed(study.exp):
        if cohort not in sets:
            continue
        made = embeddings(study, init, sets[cohort], weights(study, init, pretrained), way)
        for subset, one in made.items():
            if not one.done:
                what = f"{cohort} is not embedded with {' '.join([init, *subset])}"
                raise UserError("NOT_EMBEDDED", f"{what} yet; run `cranium embed` first")
            features[(init, cohort, *([way] if way else []), *subset)] = one
    return features


def label_files(study: Study) -> dict[str, LabelFiles]:
    """Where the label files of every cohort with a segmentation task are: it is scored against them."""
    from cranium import ingest as stage
    from cranium.segmenting import LabelFiles

    assert study.exp.adapt
    tasks = [task for task in study.exp.adapt.tasks if isinstance(task, Segmentation)]
    found = {}
    for cohort in dict.fromkeys(c for task in tasks for c in (task.cohort, *task.external)):
        if raw := raw_folder(study, cohort):
            paths = stage.label_files(study.cards[cohort], raw, study.exp.ingest, study.machine)
            found[cohort] = LabelFiles(raw.resolve(), paths)
    return found


def started(study: Study) -> dict[str, Artefact]:
    """The pretraining behind each initialisation that a network is trained from."""
    exp = study.exp
    assert exp.sweep
    if not set(exp.sweep.adaptation) - FROZEN:
        return {}
    pretrained = pretrainings(study)
    found = {init: weights(study, init, pretrained) for init in exp.sweep.init if init not in study.missing}
    return {init: made for init, made in found.items() if made}


def parts(
    views: Mapping[Stack, Study],
    sets: Mapping[Stack, Mapping[str, Artefact]],
    features: Mapping[Stack, Features] | None = None,
) -> list[Part]:
    """What a grid is made of, by kind of stack; without features, what is needed to assign folds."""
    from cranium.sweep import Part

    exps = {stack: obtainable(view, sets[stack]) for stack, view in views.items()}
    every = [exp.sweep.group_by for exp in exps.values() if exp.sweep]
    group_by = tuple(scheme for scheme in every[0] if all(scheme in one for one in every))
    found = []
    for stack, view in views.items():
        sweep = exps[stack].sweep
        assert sweep
        exp = exps[stack].model_copy(update={"sweep": sweep.model_copy(update={"group_by": group_by})})
        if features is None:
            found.append(Part(exp, sets[stack]))
        else:
            found.append(Part(exp, sets[stack], features[stack], label_files(view), started(view)))
    return found


def obtainable(study: Study, sets: Mapping[str, Artefact]) -> Experiment:
    """The experiment without initialisations, external cohorts and groupings that could not be had."""
    exp = study.exp
    assert exp.sweep and exp.adapt
    inits = tuple(init for init in exp.sweep.init if init not in study.missing)
    tasks = []
    for task in exp.adapt.tasks:
        had(sets, study, task.cohort)
        external = tuple(c for c in task.external if c in sets)
        tasks.append(task.model_copy(update={"external": external}))
    return exp.model_copy(
        update={
            "sweep": exp.sweep.model_copy(update={"init": inits, "group_by": _groupings(study, sets)}),
            "adapt": exp.adapt.model_copy(update={"tasks": tuple(tasks)}),
        }
    )


def _groupings(study: Study, sets: Mapping[str, Artefact]) -> tuple[str, ...]:
    """What folds can be grouped by: leaving one group out needs two of them in every task's cohort."""
    import pandas as pd

    assert study.exp.sweep and study.exp.adapt
    possible = []
    for scheme in study.exp.sweep.group_by:
        for cohort in sorted({task.cohort for task in study.exp.adapt.tasks}):
            table = pd.read_parquet(sets[cohort].path / "sessions.parquet")
            if scheme in table and table[scheme].nunique() < 2:
                study.missing[f"folds that leave one {scheme} out"] = f"cohort {cohort} has only one {scheme}"
                break
        else:
            possible.append(scheme)
    return tuple(possible)


def _said(far: sweep_progress.Progress) -> str:
    said = f"{far.done} of {far.cells} cells done, {far.failed} failed, {far.missing} missing"
    eta = f", ETA {clock(far.eta)}" if far.eta is not None else ""
    return f"running, {said}{eta}" if far.running else said


STAGES = ("demo", "ingest", "pretrain", "embed", "sweep", "report")


def status(exp: Experiment, machine: Machine) -> list[tuple[str, str, str]]:
    """(stage, folder, state) of what lies in the store under this experiment's names, in the order data flows."""
    cohorts = tuple(f"{cohort}-" for cohort in exp.ingest.cohorts)
    inits = exp.sweep.init if exp.sweep else ()
    prefixes = {
        "demo": ("demo-",) if exp.demo else (),
        "ingest": cohorts,
        "pretrain": tuple(f"{init}-{exp.arch}-" for init in exp.pretrain.inits) if exp.pretrain else (),
        "embed": tuple(
            f"{init.replace(':', '_')}_{cohort}{rest}"
            for init in inits
            for cohort in exp.ingest.cohorts
            for rest in ("-", "_tokens-", "_only_")
        ),
        "sweep": (f"{exp.name}-",),
        "report": (f"{exp.name}-",),
    }
    found = []
    for stage in STAGES:
        folder = machine.store / stage
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_dir() and path.name.startswith(prefixes[stage]):
                state = "done" if Artefact(path).done else "begun"
                if stage == "sweep" and (far := sweep_progress.of(machine.store, Artefact(path))):
                    state = f"{state}: {_said(far)}"
                found.append((stage, path.name, "forgotten" if (path / store.TOMBSTONE).exists() else state))
    return found


def shard_sets(exp: Experiment, machine: Machine) -> list[Artefact]:
    """Every finished shard set of the experiment's cohorts, all versions of it."""
    return [made for cohort in exp.ingest.cohorts for made in store.find(machine.store, "ingest", cohort)]
