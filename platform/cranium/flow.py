"""What spans stages: each verb of the command line on one experiment, and `run` for all of them.

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

from cranium import cluster, errors, inventory, meters, recording, store, trust
from cranium.config import FROZEN, Stack, UserError, to_yaml
from cranium.inventory import Features
from cranium.reading import share
from cranium.store import Artefact
from cranium.study import Study, bar

if TYPE_CHECKING:
    from cranium.sweep import Grid, Part

# By kind of stack, then by cohort, by initialisation, and as `inventory.Features`.
Sets = Mapping[Stack, Mapping[str, Artefact]]
Pretrained = Mapping[Stack, Mapping[str, Artefact]]
Embedded = Mapping[Stack, Features]

# ---- verbs, in the order data flows ---------------------------------------------------------------------------------


def demo(study: Study) -> Artefact:
    """The demo cohorts, made from real heads."""
    from cranium import demo as maker

    spec, made = study.exp.demo, inventory.demo_artefact(study)
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


def ingest(study: Study) -> Sets:
    """Every cohort of the experiment as a shard set of each kind of stack."""
    return {stack: _ingest(view) for stack, view in study.views().items()}


def _ingest(study: Study) -> dict[str, Artefact]:
    from cranium import ingest as stage

    sets: dict[str, Artefact] = {}
    for cohort in study.exp.ingest.cohorts:
        card, raw = study.cards[cohort], inventory.raw_folder(study, cohort)
        if raw is None:
            continue
        name = study.named(f"ingest {cohort}")
        made = inventory.shard_set_of(study, cohort, raw)
        if made.done and not (made.path / "work").is_dir():  # else it was killed before it had tidied up
            study.skipped(name)
        else:
            with study.stage(name) as tell, _working(study, "ingest", made):
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
        with study.stage(study.named(f"quality {cohort}")) as tell:
            figures.write(made.path, share() / "dashboards" / "quality.html.j2", tell)
    page = made.path / figures.PAGE
    study.made[study.named(f"quality {cohort}")] = str(page)
    study.console.print(f"  {study.named(cohort)}: quality page {page}", highlight=False, soft_wrap=True)


def _count(study: Study, cohort: str, made: Artefact) -> None:
    manifest = made.manifest()
    counts, cohort = manifest["counts"], study.named(cohort)
    text = f"{counts['stacks']} stacks of {counts['subjects']} subjects from {counts['accepted']} scans"
    study.console.print(f"  {cohort}: {text}", highlight=False)
    for note in manifest["notes"]:
        study.note(f"{cohort}: {note}")
    if gone := len(manifest.get("forgotten", ())):
        study.note(f"{cohort}: {gone} of its subjects {'is' if gone == 1 else 'are'} forgotten and left out")
    if counts["rejected"]:
        study.whole.rejected = True
        reasons = ", ".join(f"{n} x {code}" for code, n in sorted(manifest["rejections"].items()))
        table = made.path / "quarantine.parquet"
        study.note(
            f"{cohort}: {counts['rejected']} of {counts['scans']} scans rejected ({reasons}); see {table}"
        )
    if counts.get("label_maps_rejected"):
        study.whole.rejected = True
        lost = counts["label_maps_rejected"]
        kept = counts["label_maps_accepted"] + counts["label_maps_warned"]
        study.note(
            f"{cohort}: {lost} of {lost + kept} label maps rejected, their scans kept; see quarantine.parquet"
        )


def pretrain(study: Study, sets: Sets | None = None) -> Pretrained:
    """Every pretraining of the experiment, by the initialisation it makes; of each kind of stack one."""
    return {s: _pretrain(view, sets[s] if sets else None) for s, view in study.views().items()}


def _pretrain(study: Study, sets: Mapping[str, Artefact] | None) -> dict[str, Artefact]:
    spec = study.exp.pretrain
    if spec is None:
        return {}
    sets = inventory.ingested(study, spec.cohorts) if sets is None else sets
    corpus = [inventory.had(sets, study, cohort) for cohort in spec.cohorts]
    from cranium import health_page  # after what may be refused: torch takes seconds
    from cranium import pretrain as stage

    results: dict[str, Artefact] = {}
    for init in spec.inits:
        name = study.named(f"pretrain {init}")
        made = stage.artefact(study.exp, study.machine, init, corpus)
        study.made[name] = str(made.path)
        study.made[study.named(f"health {init}")] = str(made.path / health_page.PAGE)
        fresh = not made.done
        if fresh:
            _write_resolved(study, made)
            for shards in corpus:
                trust.check(shards)
            with inventory.without(study, init), study.stage(name) as tell, _working(study, "pretrain", made):
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
    from cranium import health_page
    from cranium.course import Course

    if not health_page.current(made):
        health_page.write(Course(made, study.exp, init, tuple(corpus)))


@contextlib.contextmanager
def _working(study: Study, stage: str, made: Artefact) -> Iterator[None]:
    """Be connected to Ray, and say there what is being worked on; `UserError(OUT_OF_MEMORY)` says what to change."""
    try:
        with cluster.connect(study.machine), meters.running(stage, study.exp.name, made.path.name):
            yield
    except Exception as error:
        ran_out = None if errors.mendable(error) else errors.out_of_memory(error)
        if ran_out is None:
            raise
        where, what = ran_out
        mend = errors.less_memory(study.exp, stage, where)
        raise UserError(
            "OUT_OF_MEMORY", f"{what}; {mend}; the same command goes on from what is there", 1
        ) from error


def replay(study: Study, capture: Path) -> None:
    """The step that a capture of one of the experiment's pretrainings tells of, done again and looked into."""
    spec = study.exp.pretrain
    if spec is None:
        raise UserError("CONFIG", f"experiment {study.exp.name} has no `pretrain:`: nothing to replay")
    from cranium import pretrain as stage
    from cranium import replay as again

    found: dict[str, tuple[Study, str, list[Artefact]]] = {}
    for view in study.views().values():
        sets = inventory.ingested(view, spec.cohorts)
        corpus = [inventory.had(sets, view, cohort) for cohort in spec.cohorts]
        for init in spec.inits:
            found[stage.artefact(view.exp, view.machine, init, corpus).path.name] = (view, init, corpus)
    of, name, seen = found.get(capture.absolute().parents[1].name, next(iter(found.values())))
    with study.stage("replay"), cluster.connect(study.machine):
        lines = again.replay(of.exp, of.machine, name, seen, capture)
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
    return inventory.had(inventory.ingested(study, (spec.cohort,)) | dict(sets), study, spec.cohort)


def embed(study: Study, sets: Sets | None = None, pretrained: Pretrained | None = None) -> Embedded:
    """Features of every cohort a task uses under every initialisation of the sweep, of each kind of stack."""
    if study.exp.sweep is None or study.exp.adapt is None:
        raise UserError(
            "CONFIG", f"experiment {study.exp.name} has no `adapt:` and `sweep:`: nothing to embed for"
        )
    return {
        s: _embed(view, sets[s] if sets else None, pretrained[s] if pretrained else None)
        for s, view in study.views().items()
    }


def _embed(
    study: Study, sets: Mapping[str, Artefact] | None, pretrained: Mapping[str, Artefact] | None
) -> Features:
    from cranium import embed as stage
    from cranium import tokens as dense
    from cranium import volumes

    exp = study.exp
    assert exp.adapt
    cohorts = tuple(dict.fromkeys(c for task in exp.adapt.tasks for c in (task.cohort, *task.external)))
    sets = inventory.ingested(study, cohorts) if sets is None else sets
    pretrained = inventory.pretrainings(study) if pretrained is None else pretrained
    features: Features = {}
    for init, cohort, way in inventory.to_embed(exp):
        if cohort not in sets or init in study.missing:
            continue
        name = study.named(" ".join(["embed", init, cohort, *([way] if way else [])]))
        weights = inventory.weights(study, init, pretrained)
        made = inventory.embeddings(study, init, sets[cohort], weights, way)
        if all(one.done for one in made.values()):
            study.skipped(name)
        else:
            trust.check(sets[cohort])
            with (
                inventory.without(study, init),
                study.stage(name) as tell,
                _working(study, "embed", next(iter(made.values()))),
            ):
                if init == "volumes":
                    volumes.measure(exp, study.machine, sets[cohort], tell)
                elif way is None:
                    stage.embed(exp, study.machine, init, sets[cohort], weights, tell, list(made))
                else:
                    dense.embed_tokens(exp, study.machine, init, sets[cohort], weights, way, tell)
        for subset, one in made.items():
            if one.done:
                features[(init, cohort, *([way] if way else []), *subset)] = one
                study.made[" ".join([name, *subset])] = str(one.path)
    return features


def _require_same_preprocessing(grid: Grid) -> None:
    """Of networks that are trained from the pixels; `embed` asks it of features."""
    from cranium import embed as stage

    pairs = {
        (work.start.pretrained, cohort.shard_set)
        for work in grid.missing
        for cohort in (work.cohort, *work.external)
        if work.start and work.start.pretrained
    }
    for pretrained, shard_set in sorted(pairs):
        stage.require_same_preprocessing(Artefact(pretrained), store.read_manifest(shard_set))


def sweep(study: Study, sets: Sets | None = None, features: Embedded | None = None) -> Grid:
    """Every cell of the declared grid that is not there yet."""
    from cranium import sweep as stage

    if study.exp.sweep is None or study.exp.adapt is None:
        raise UserError("CONFIG", f"experiment {study.exp.name} has no `adapt:` and `sweep:`")
    parts = _parts(study, _ingested(study) if sets is None else sets, features)
    grid = stage.declare(study.machine, parts)
    study.made["sweep"] = str(grid.artefact.path)
    cells = len(grid.missing)
    failures: dict[str, str] = {}
    if cells or not grid.artefact.done:
        _write_resolved(study, grid.artefact)
        if any(work.cell.adaptation not in FROZEN for work in grid.missing):
            read = {c.shard_set for work in grid.missing for c in (work.cohort, *work.external)}
            for folder in sorted(read):
                trust.check(Artefact(folder))
            _require_same_preprocessing(grid)
        with (
            store.lock(study.machine.store, grid.artefact.id),
            study.stage(f"sweep ({cells} of {len(grid.works)} cells)") as tell,
            _working(study, "sweep", grid.artefact),
            recording.sweeping(study, grid, tell) as live,
        ):
            failures = stage.sweep(grid, parts[0].exp, live)
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


def _ingested(study: Study) -> Sets:
    return {s: inventory.ingested(view, study.exp.ingest.cohorts) for s, view in study.views().items()}


def _parts(study: Study, sets: Sets, features: Embedded | None = None) -> list[Part]:
    """What the grid is made of; the features must be there."""
    views = study.views()
    if features is None:
        features = {s: inventory.embedded(view, sets[s]) for s, view in views.items()}
    return inventory.parts(views, sets, features)


def _declared(study: Study, sets: Sets) -> Grid:
    """The grid of an experiment whose features are there."""
    from cranium import sweep as grids

    return grids.declare(study.machine, _parts(study, sets))


def sync(study: Study) -> None:
    """Send whatever MLflow lacks of what is done."""
    pretrained = {s: inventory.pretrainings(view) for s, view in study.views().items()}
    recording.sync(study, pretrained, _declared(study, _ingested(study)) if study.exp.sweep else None)


def report(
    study: Study,
    sets: Sets | None = None,
    pretrained: Pretrained | None = None,
    grid: Grid | None = None,
) -> Artefact:
    """One page on all of it: what was asked, what was found, what could not be had."""
    from cranium import report as stage

    exp, views = study.exp, study.views()
    sets = _ingested(study) if sets is None else sets
    if pretrained is None:
        pretrained = {s: inventory.pretrainings(view) for s, view in views.items()}
    if grid is None:
        grid = _declared(study, sets)
        if grid.missing:
            count = f"{len(grid.missing)} of {len(grid.works)}"
            raise UserError("NOT_SWEPT", f"{count} cells are not there yet; run `cranium sweep` first")
    named = {views[s].named(init): made for s, inits in pretrained.items() for init, made in inits.items()}
    # Of whose stacks cohorts are shown: those with the most contrasts.
    shown = max(sets, key=lambda stack: len(views[stack].exp.ingest.channels))
    tracked = {name: recording.runs(study, made).get("run", "") for name, made in named.items()}
    tracked["sweep"] = recording.runs(study, grid.artefact).get("run", "")
    tracked = {name: run for name, run in tracked.items() if run}
    demo_made = inventory.demo_artefact(study)
    had_not = dict(demo_made.manifest()["missing"]) if demo_made else {}
    key = {
        "report": exp.report,
        "asks": exp.asks,
        "grid": grid.artefact.id,
        "pretrained": [made.id for made in named.values()],
        "shards": [made.id for some in sets.values() for made in some.values()],
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
                cohorts=[shards.path for shards in sets[shown].values()],
                pretraining={name: result.path / "journal" for name, result in named.items()},
                cells=[work.folder for work in grid.works],
                source=str(demo_made.manifest()["stamp"]) if demo_made else ", ".join(sets[shown]),
                title=exp.report.title,
                asks=exp.asks,
                stamps=grid.stamps,
                notes=[
                    *(f"{what}: {why}" for what, why in (had_not | study.missing).items()),
                    *([f"Cohorts and counts are those of `stack: {shown}`."] if len(sets) > 1 else []),
                ],
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
            recording.catch_up(study, pretrained)
            report(study, sets, pretrained, grid)


def resume(study: Study) -> None:
    """`run`, but no pretraining begins anew while an unfinished one differs from it in some setting."""
    if spec := study.exp.pretrain:
        from cranium import pretrain as stage

        try:
            sets = {s: inventory.ingested(view, spec.cohorts) for s, view in study.views().items()}
        except UserError as error:
            if error.code != "NOT_INGESTED":
                raise
        else:
            for stack, view in study.views().items():
                for init in spec.inits:
                    corpus = [inventory.had(sets[stack], view, cohort) for cohort in spec.cohorts]
                    stage.check_resume(view.exp, view.machine, init, corpus)
    run(study)


def _gate(study: Study, sets: Sets) -> None:
    """Refuse leakage before hours are spent on training."""
    from cranium import sweep as stage

    if study.exp.sweep is not None:
        stage.assign(inventory.parts(study.views(), sets))


def _write_resolved(study: Study, made: Artefact) -> None:
    store.write_atomic(made.path / "resolved.yaml", to_yaml(study.exp))


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
