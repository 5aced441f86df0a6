"""What spans stages: each verb of the command line on one experiment, `run` for all of them, and what is done already.

A stage whose artefact is there is skipped without starting Ray or MLflow, so a second `run` takes seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cranium import cluster, recording, store, trust
from cranium.config import (
    FROZEN,
    Adaptation,
    Classification,
    Experiment,
    Machine,
    Segmentation,
    UserError,
    share,
    to_yaml,
)
from cranium.store import Artefact
from cranium.study import Study, bar

if TYPE_CHECKING:
    from cranium.segmenting import LabelFiles
    from cranium.sweep import Grid

Features = dict[tuple[str, ...], Artefact]  # see `sweep.Features`
DEMO_COHORTS = ("demo_ssl", "demo", "demo_external")


# ---- verbs, in the order data flows ---------------------------------------------------------------------------------


def demo(study: Study) -> Artefact:
    """The demo cohorts, made from real heads."""
    from cranium import demo as maker

    spec, made = study.exp.demo, _demo_artefact(study)
    if spec is None or made is None:
        raise UserError("CONFIG", f"experiment {study.exp.name} has no `demo:`; use experiments/demo.yaml")
    study.made["demo"] = str(made.path)
    if made.done:
        study.skipped("demo")
    else:
        with study.stage("demo") as tell, store.lock(study.machine.store, made.id):
            workers = max(1, (os.cpu_count() or 2))
            report = maker.make(spec, made.path, study.machine.cache, workers=workers, progress=tell)
            store.commit(made.path, {"stage": "demo", "lines": report.lines(), **dataclasses.asdict(report)})
    for line in made.manifest()["lines"]:
        study.console.print(f"  {line}", highlight=False)
    return made


def ingest(study: Study) -> dict[str, Artefact]:
    """Every cohort of the experiment as a shard set, by name."""
    from cranium import ingest as stage

    sets: dict[str, Artefact] = {}
    for cohort in study.exp.ingest.cohorts:
        card, raw = study.cards[cohort], _raw(study, cohort)
        if raw is None:
            continue
        name = f"ingest {cohort}"
        made = _shard_set(study, cohort, raw)
        if made.done and not (made.path / "work").is_dir():  # else it was killed before it had tidied up
            study.skipped(name)
        else:
            with study.stage(name) as tell, cluster.connect(study.machine):
                stage.ingest(card, raw, study.exp.ingest, study.machine, tell)
        sets[cohort] = made
        study.made[name] = str(made.path)
        _count(study, cohort, made)
        _quality_page(study, cohort, made)
    return sets


def _quality_page(study: Study, cohort: str, made: Artefact) -> None:
    """The page beside the manifest, made when it is not there or shows an earlier state."""
    from cranium.figures import cohort as figures

    if not figures.current(made.path):
        with study.stage(f"quality {cohort}") as tell:
            figures.write(made.path, share() / "dashboards" / "quality.html.j2", tell)
    page = made.path / figures.PAGE
    study.made[f"quality {cohort}"] = str(page)
    study.console.print(f"  {cohort}: quality page {page}", highlight=False, soft_wrap=True)


def _shard_set(study: Study, cohort: str, raw: Path) -> Artefact:
    from cranium import ingest as stage

    return stage.artefact(study.cards[cohort], raw, study.exp.ingest, study.machine)


def _count(study: Study, cohort: str, made: Artefact) -> None:
    manifest = made.manifest()
    counts = manifest["counts"]
    text = f"{counts['stacks']} stacks of {counts['subjects']} subjects from {counts['accepted']} scans"
    study.console.print(f"  {cohort}: {text}", highlight=False)
    for note in manifest["notes"]:
        study.note(f"{cohort}: {note}")
    if gone := len(manifest.get("forgotten", ())):
        study.note(f"{cohort}: {gone} of its subjects {'is' if gone == 1 else 'are'} forgotten and left out")
    if counts["rejected"]:
        study.rejected = True
        reasons = ", ".join(f"{n} x {code}" for code, n in sorted(manifest["rejections"].items()))
        table = made.path / "quarantine.parquet"
        study.note(
            f"{cohort}: {counts['rejected']} of {counts['scans']} scans rejected ({reasons}); see {table}"
        )
    if counts.get("label_maps_rejected"):
        study.rejected = True
        lost = counts["label_maps_rejected"]
        kept = counts["label_maps_accepted"] + counts["label_maps_warned"]
        study.note(
            f"{cohort}: {lost} of {lost + kept} label maps rejected, their scans kept; see quarantine.parquet"
        )


def _raw(study: Study, cohort: str) -> Path | None:
    """The folder of a cohort's files; None for a demo cohort that could not be made."""
    if given := study.machine.raw.get(cohort):
        if not given.is_dir():
            raise UserError("NO_RAW", f"raw.{cohort}={given} is no folder")
        return given
    if cohort in DEMO_COHORTS and (made := _demo_artefact(study)):
        if not made.done:
            raise UserError("NO_DEMO", "the demo cohorts are not made yet; run `cranium demo` first")
        if (made.path / cohort).is_dir():
            return made.path / cohort
        reasons = dict(made.manifest()["missing"])
        study.missing[cohort] = str(reasons.get(cohort, "not made"))
        return None
    raise UserError("NO_RAW", f"where are the files of cohort {cohort}? give raw.{cohort}=DIR")


def ingested(study: Study, cohorts: tuple[str, ...]) -> dict[str, Artefact]:
    """The finished shard sets of `cohorts`. Raises `UserError(NOT_INGESTED)` naming the command that makes one."""
    sets: dict[str, Artefact] = {}
    for cohort in cohorts:
        raw = _raw(study, cohort)
        if raw is None:
            continue
        made = _shard_set(study, cohort, raw)
        if not made.done:
            reason = f"cohort {cohort} is not ingested with these settings; run `cranium ingest` first"
            raise UserError("NOT_INGESTED", reason)
        sets[cohort] = made
    return sets


def pretrain(study: Study, sets: Mapping[str, Artefact] | None = None) -> dict[str, Artefact]:
    """Every pretraining of the experiment, by the initialisation it makes."""
    spec = study.exp.pretrain
    if spec is None:
        return {}
    sets = ingested(study, spec.cohorts) if sets is None else sets
    corpus = [_had(sets, study, cohort) for cohort in spec.cohorts]
    from cranium import checkup  # after what may be refused: torch takes seconds
    from cranium import pretrain as stage

    results: dict[str, Artefact] = {}
    for init in spec.inits:
        name = f"pretrain {init}"
        made = stage.artefact(study.exp, study.machine, init, corpus)
        study.made[name] = str(made.path)
        study.made[f"health {init}"] = str(made.path / checkup.PAGE)
        fresh = not made.done
        if fresh:
            _write_resolved(study, made)
            for shards in corpus:
                trust.check(shards)
            with _without(study, init), study.stage(name) as tell, cluster.connect(study.machine):
                monitored = _monitored(study, sets)
                with recording.live(study, init, made, tell) as live:
                    stage.pretrain(study.exp, study.machine, init, corpus, live, monitored)
        else:
            study.skipped(name)
        if made.done:
            results[init] = made
            if fresh:
                study.console.print(f"  {name}: {stage.spent(made)}", highlight=False, soft_wrap=True)
            for alarm in made.manifest()["alarms"]:
                study.note(
                    f"{name}: {alarm['code']} from step {alarm['step']}: {alarm['seen']}; {alarm['mend']}"
                )
            _health_page(study, init, made, corpus)
            recording.pretrained(study, init, made, fresh)
    return results


def _health_page(study: Study, init: str, made: Artefact, corpus: list[Artefact]) -> None:
    """The page of a finished pretraining, made when it is not there or shows an earlier state."""
    from cranium import checkup
    from cranium.course import Course

    if not checkup.current(made):
        checkup.write(Course(made, study.exp, init, tuple(corpus)))


def replay(study: Study, capture: Path) -> None:
    """The step that a capture of one of the experiment's pretrainings tells of, done again and looked into."""
    spec = study.exp.pretrain
    if spec is None:
        raise UserError("CONFIG", f"experiment {study.exp.name} has no `pretrain:`: nothing to replay")
    sets = ingested(study, spec.cohorts)
    corpus = [_had(sets, study, cohort) for cohort in spec.cohorts]
    from cranium import pretrain as stage
    from cranium import replay as again

    inits = {stage.artefact(study.exp, study.machine, init, corpus).path.name: init for init in spec.inits}
    init = inits.get(capture.absolute().parents[1].name, spec.inits[0])
    with study.stage("replay"), cluster.connect(study.machine):
        lines = again.replay(study.exp, study.machine, init, corpus, capture)
    for line in lines:
        study.note(line)


def _monitored(study: Study, sets: Mapping[str, Artefact]) -> Artefact | None:
    """The shard set the teacher is looked at on, if one is named."""
    assert study.exp.pretrain
    spec = study.exp.pretrain.compute.monitor
    if spec is None:
        return None
    if unknown := sorted(set(spec.labels) - set(study.cards[spec.cohort].labels)):
        raise UserError(
            "CONFIG", f"pretrain.compute.monitor.labels: {spec.cohort} declares no label {unknown}"
        )
    return _had(ingested(study, (spec.cohort,)) | dict(sets), study, spec.cohort)


def embed(
    study: Study, sets: Mapping[str, Artefact] | None = None, pretrained: Mapping[str, Artefact] | None = None
) -> Features:
    """Features of every cohort a task uses under every initialisation of the sweep."""
    from cranium import embed as stage
    from cranium import tokens as dense
    from cranium import volumes

    exp = study.exp
    if exp.sweep is None or exp.adapt is None:
        raise UserError("CONFIG", f"experiment {exp.name} has no `adapt:` and `sweep:`: nothing to embed for")
    cohorts = tuple(dict.fromkeys(c for task in exp.adapt.tasks for c in (task.cohort, *task.external)))
    sets = ingested(study, cohorts) if sets is None else sets
    pretrained = _pretrained(study) if pretrained is None else pretrained
    features: Features = {}
    for init, cohort, way in _to_embed(exp):
        if cohort not in sets or init in study.missing:
            continue
        name = " ".join(["embed", init, cohort, *([way] if way else [])])
        weights = _weights(study, init, pretrained)
        made = _embedding(study, init, sets[cohort], weights, way)
        if made.done:
            study.skipped(name)
        else:
            trust.check(sets[cohort])
            with _without(study, init), study.stage(name) as tell, cluster.connect(study.machine):
                if init == "volumes":
                    volumes.measure(exp, study.machine, sets[cohort], tell)
                elif way is None:
                    stage.embed(exp, study.machine, init, sets[cohort], weights, tell)
                else:
                    dense.embed_tokens(exp, study.machine, init, sets[cohort], weights, way, tell)
        if made.done:
            features[(init, cohort, *([way] if way else []))] = made
            study.made[name] = str(made.path)
    return features


def sweep(study: Study, sets: Mapping[str, Artefact] | None = None, features: Features | None = None) -> Grid:
    """Every cell of the declared grid that is not there yet."""
    from cranium import sweep as stage

    if study.exp.sweep is None or study.exp.adapt is None:
        raise UserError("CONFIG", f"experiment {study.exp.name} has no `adapt:` and `sweep:`")
    if sets is None:
        sets = ingested(study, study.exp.ingest.cohorts)
    features = _embedded(study, sets) if features is None else features
    exp = _what_there_is(study, sets)
    grid = stage.declare(exp, study.machine, sets, features, _label_files(study), _started(study))
    study.made["sweep"] = str(grid.artefact.path)
    cells = len(grid.missing)
    failures: dict[str, str] = {}
    if cells or not grid.artefact.done:
        _write_resolved(study, grid.artefact)
        if any(work.cell.adaptation not in FROZEN for work in grid.missing):
            for cohort in {c.name for work in grid.missing for c in (work.cohort, *work.external)}:
                trust.check(sets[cohort])
        with (
            study.stage(f"sweep ({cells} of {len(grid.works)} cells)") as tell,
            cluster.connect(study.machine),
            recording.sweeping(study, grid, tell) as live,
        ):
            failures = stage.sweep(grid, exp, live)
    else:
        study.skipped(f"sweep ({len(grid.works)} cells)")
    for stamp in grid.stamps:
        study.note(f"accepted overlap: {stamp}")
    recording.swept(study, grid, failures)
    if failures:
        shown = "; ".join(f"{name}: {reason}" for name, reason in sorted(failures.items())[:3])
        raise UserError(
            "CELLS_FAILED",
            f"{len(failures)} of {len(grid.works)} cells failed: {shown}; the same command tries them again",
            1,
        )
    return grid


def report(
    study: Study,
    sets: Mapping[str, Artefact] | None = None,
    pretrained: Mapping[str, Artefact] | None = None,
    grid: Grid | None = None,
) -> Artefact:
    """One page on all of it: what was asked, what was found, what could not be had."""
    from cranium import report as stage
    from cranium import sweep as grids

    exp = study.exp
    sets = ingested(study, exp.ingest.cohorts) if sets is None else sets
    pretrained = _pretrained(study) if pretrained is None else pretrained
    if grid is None:
        exp_had, features = _what_there_is(study, sets), _embedded(study, sets)
        grid = grids.declare(exp_had, study.machine, sets, features, _label_files(study), _started(study))
        if grid.missing:
            count = f"{len(grid.missing)} of {len(grid.works)}"
            raise UserError("NOT_SWEPT", f"{count} cells are not there yet; run `cranium sweep` first")
    tracked = {name: recording.runs(study, made).get("run", "") for name, made in pretrained.items()}
    tracked["sweep"] = recording.runs(study, grid.artefact).get("run", "")
    tracked = {name: run for name, run in tracked.items() if run}
    demo_made = _demo_artefact(study)
    had_not = dict(demo_made.manifest()["missing"]) if demo_made else {}
    key = {
        "report": exp.report,
        "asks": exp.asks,
        "grid": grid.artefact.id,
        "pretrained": [made.id for made in pretrained.values()],
        "shards": [made.id for made in sets.values()],
        "missing": study.missing,
        "runs": tracked,
        "code": recording.git(),
    }
    made = store.artefact(study.machine.store, "report", exp.name, key)
    page = made.path / "report.html"
    study.made["report"] = str(page)
    if made.done:
        study.skipped("report")
        return made
    with study.stage("report"):
        stage.write(
            exp.name,
            stage.ReportInputs(
                cohorts=[shards.path for shards in sets.values()],
                pretraining={name: result.path / "journal" for name, result in pretrained.items()},
                cells=[work.folder for work in grid.works],
                source=str(demo_made.manifest()["stamp"]) if demo_made else ", ".join(sets),
                title=exp.report.title,
                asks=exp.asks,
                stamps=grid.stamps,
                notes=[f"{what}: {why}" for what, why in (had_not | study.missing).items()],
                seconds=dict(study.seconds),
                config=to_yaml(exp),
                git=recording.git(),
                versions={name: version(name) for name in ("ray", "mlflow", "torch", "timm", "numpy")},
                runs=tracked,
                cell_runs=recording.runs(study, grid.artefact),
                mlflow_uri=study.machine.tracking,
                bootstrap=exp.report.bootstrap,
            ),
            page,
        )
        _write_resolved(study, made)
        store.commit(
            made.path,
            {"stage": "report", "experiment": exp.name, "key": key | {"report": exp.report.model_dump()}},
        )
    return made


def _demo_artefact(study: Study) -> Artefact | None:
    if study.exp.demo is None:
        return None
    from cranium import demo as maker

    key = {"recipe": maker.RECIPE, "demo": study.exp.demo}
    return store.artefact(study.machine.store, "demo", "demo", key)


def run(study: Study) -> None:
    """All that the experiment names, skipping what is done; goes on past rejected scans and weights nobody has."""
    with cluster.hold():
        if study.exp.demo is not None:
            demo(study)
        sets = ingest(study)
        _gate(study, sets)
        pretrained = pretrain(study, sets)
        if study.exp.sweep is not None:
            features = embed(study, sets, pretrained)
            grid = sweep(study, sets, features)
            report(study, sets, pretrained, grid)


def resume(study: Study) -> None:
    """`run`, but no pretraining begins anew while an unfinished one differs from it in some setting."""
    if spec := study.exp.pretrain:
        from cranium import pretrain as stage

        try:
            sets = ingested(study, spec.cohorts)
        except UserError as error:
            if error.code != "NOT_INGESTED":
                raise
        else:
            for init in spec.inits:
                corpus = [_had(sets, study, cohort) for cohort in spec.cohorts]
                stage.check_resume(study.exp, study.machine, init, corpus)
    run(study)


def _gate(study: Study, sets: Mapping[str, Artefact]) -> None:
    """Refuse leakage before hours are spent on training."""
    from cranium import sweep as stage

    if study.exp.sweep is not None:
        stage.assign(_what_there_is(study, sets), sets)


# ---- what there is --------------------------------------------------------------------------------------------------


def _had(sets: Mapping[str, Artefact], study: Study, cohort: str) -> Artefact:
    if cohort not in sets:
        raise UserError(
            "NO_COHORT", f"cohort {cohort} could not be had: {study.missing.get(cohort, 'unknown')}", 1
        )
    return sets[cohort]


@contextlib.contextmanager
def _without(study: Study, init: str) -> Iterator[None]:
    """Weights that can't be had cost their own row, not the experiment; the report and the exit code say so."""
    try:
        yield
    except UserError as error:
        if error.code != "NO_WEIGHTS":
            raise
        study.missing[init] = str(error)


def _pretrained(study: Study) -> dict[str, Artefact]:
    from cranium import pretrain as stage

    spec = study.exp.pretrain
    if spec is None:
        return {}
    sets = ingested(study, spec.cohorts)
    corpus = [_had(sets, study, cohort) for cohort in spec.cohorts]
    made: dict[str, Artefact] = {
        init: stage.artefact(study.exp, study.machine, init, corpus) for init in spec.inits
    }
    if absent := [init for init, result in made.items() if not result.done]:
        raise UserError(
            "NOT_PRETRAINED", f"{', '.join(absent)} is not pretrained yet; run `cranium pretrain` first"
        )
    return made


def pretrained(study: Study, init: str | None = None) -> Artefact:
    """The finished pretraining of the experiment that makes `init`; None: the only one there is."""
    made = _pretrained(study)
    if init is None and len(made) == 1:
        return next(iter(made.values()))
    if init not in made:
        raise UserError("USAGE", f"which pretraining? init=... one of {', '.join(made) or 'none'}")
    return made[init]


def _weights(study: Study, init: str, pretrained: Mapping[str, Artefact]) -> Artefact | None:
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


def _to_embed(exp: Experiment) -> list[tuple[str, str, Adaptation | None]]:
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
                    ways = exp.sweep.adaptations(task, init)
            found += [(init, cohort, way) for cohort in (task.cohort, *task.external) for way in ways]
    return list(dict.fromkeys(found))


def _embedding(
    study: Study, init: str, shard_set: Artefact, weights: Artefact | None, way: Adaptation | None
) -> Artefact:
    from cranium import embed, tokens, volumes

    if init == "volumes":
        return volumes.artefact(study.machine, shard_set)
    if way is None:
        return embed.artefact(study.exp, study.machine, init, shard_set, weights)
    return tokens.artefact(study.exp, study.machine, init, shard_set, weights, way)


def _embedded(study: Study, sets: Mapping[str, Artefact]) -> Features:
    pretrained, features = _pretrained(study), Features()
    for init, cohort, way in _to_embed(study.exp):
        if cohort not in sets:
            continue
        made = _embedding(study, init, sets[cohort], _weights(study, init, pretrained), way)
        if not made.done:
            raise UserError(
                "NOT_EMBEDDED", f"{cohort} is not embedded with {init} yet; run `cranium embed` first"
            )
        features[(init, cohort, *([way] if way else []))] = made
    return features


def _label_files(study: Study) -> dict[str, LabelFiles]:
    """Where the label files of every cohort with a segmentation task are: it is scored against them."""
    from cranium import ingest as stage
    from cranium.segmenting import LabelFiles

    assert study.exp.adapt
    tasks = [task for task in study.exp.adapt.tasks if isinstance(task, Segmentation)]
    found = {}
    for cohort in dict.fromkeys(c for task in tasks for c in (task.cohort, *task.external)):
        if raw := _raw(study, cohort):
            paths = stage.label_files(study.cards[cohort], raw, study.exp.ingest, study.machine)
            found[cohort] = LabelFiles(raw.resolve(), paths)
    return found


def _started(study: Study) -> dict[str, Artefact]:
    """The pretraining behind each initialisation that a network is trained from."""
    exp = study.exp
    assert exp.sweep
    if not set(exp.sweep.adaptation) - FROZEN:
        return {}
    pretrained = _pretrained(study)
    found = {init: _weights(study, init, pretrained) for init in exp.sweep.init if init not in study.missing}
    return {init: made for init, made in found.items() if made}


def _what_there_is(study: Study, sets: Mapping[str, Artefact]) -> Experiment:
    """The experiment without initialisations, external cohorts and groupings that could not be had."""
    exp = study.exp
    assert exp.sweep and exp.adapt
    inits = tuple(init for init in exp.sweep.init if init not in study.missing)
    tasks = []
    for task in exp.adapt.tasks:
        _had(sets, study, task.cohort)
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


def _write_resolved(study: Study, made: Artefact) -> None:
    store.write_atomic(made.path / "resolved.yaml", to_yaml(study.exp))


STAGES = ("demo", "ingest", "pretrain", "embed", "sweep", "report")


def status(exp: Experiment, machine: Machine) -> list[tuple[str, str, str]]:
    """(stage, folder, state) of what lies in the store under this experiment's names, in the order data flows."""
    cohorts = tuple(f"{cohort}-" for cohort in exp.ingest.cohorts)
    inits = exp.sweep.init if exp.sweep else ()
    prefixes = {
        "demo": ("demo-",) if exp.demo else (),
        "ingest": cohorts,
        "pretrain": tuple(f"{init}-{exp.arch}-" for init in exp.pretrain.inits) if exp.pretrain else (),
        "embed": tuple(f"{init.replace(':', '_')}_{cohort}" for init in inits for cohort in cohorts),
        "sweep": (f"{exp.name}-",),
        "report": (f"{exp.name}-",),
    }
    found = []
    for stage in STAGES:
        folder = machine.store / stage
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_dir() and path.name.startswith(prefixes[stage]):
                state = "done" if Artefact(path).done else "begun"
                found.append((stage, path.name, "forgotten" if (path / store.TOMBSTONE).exists() else state))
    return found


def shard_sets(exp: Experiment, machine: Machine) -> list[Artefact]:
    """Every finished shard set of the experiment's cohorts, all versions of it."""
    return [made for cohort in exp.ingest.cohorts for made in store.find(machine.store, "ingest", cohort)]


def verify(sets: Sequence[Artefact], console: Console) -> dict[str, list[trust.Problem]]:
    """What is wrong with each shard set, by its id; everything is read again."""
    found: dict[str, list[trust.Problem]] = {}
    for made in sets:
        with bar(console, made.id) as tell:
            try:
                problems = trust.verify(made, tell)
            except UserError as error:  # of the manifest
                problems = [trust.Problem(error.code, store.MANIFEST, str(error), "then verify again")]
        found[made.id] = problems
        if not problems:
            console.print(f"{made.id}: {len(made.manifest()['shards'])} shards as written", highlight=False)
    return found
