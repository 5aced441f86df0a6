"""One HTML page on one experiment, computed from the predictions that each cell kept.

Every statistic is made here (by `tasks.comparison`) from `predictions.parquet`; the metrics in a cell's manifest
are only checked against it. The page is self-contained and loads nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cranium import (
    report_adaptations,
    report_contrasts,
    report_external,
    report_measures,
    report_search,
    report_segmentation,
    report_stacks,
    report_strata,
    wording,
)
from cranium.config import UserError
from cranium.figures import corpus, page, plots, training
from cranium.figures.page import Link, Plate, Section, Table
from cranium.reading import share
from cranium.tasks import comparison, ensembles
from cranium.tasks.comparison import TEST, Cell, Comparison, Point, Setting, Shown
from cranium.tasks.metrics import Undefined, auroc
from cranium.tasks.statistics import Fold, Interval

INTERVAL = (
    f"95{wording.NO_BREAK}% percentile bootstrap interval of the mean over folds (test groups drawn with replacement; "
    "the models are fixed, so the variance of training is not in it)"
)

# How the figures of a section are read: said once, above them.
MEANS = (
    "A ring is the AUROC of one cell (fold and seed), a bar runs from chance to the mean over folds with a thick "
    f"mark at the mean, a whisker is its {INTERVAL}. Covariates are head, site and presence of contrasts; volumes are "
    "ml of brain, tissues and ventricles; cnn is a small network trained from scratch. Rows without a backbone are "
    "the same beside every adaptation."
)
FRACTIONS = (
    "A marker is the mean AUROC over folds at that share of labelled training subjects (n of them below; log scale), "
    f"a band its {INTERVAL}. Fractions are nested and the same subjects for every initialisation."
)
OUTSIDE = (
    "A filled disc is the mean AUROC on held-out folds, a ring the mean of the same models on another cohort, which no "
    f"model was trained on; a line is the {INTERVAL}. External subjects are drawn once for all folds."
)


@dataclass(frozen=True)
class ReportInputs:
    """Everything the page is made of, as plain values.

    cohorts: shard sets `<store>/ingest/<cohort>-<hash>/`. pretraining: name of the run (its initialisation) -> a
    folder that holds its journal. cells: `<store>/adapt/<name>-<hash>/`. source: the sentence under every figure.
    stamps: what a reader must know before any number. notes: what could not be had. seconds: where the time went,
    by stage. runs: title -> MLflow run id; cell_runs: name of a cell's folder -> its own. mlflow_ui:
    address of the MLflow pages for links (http or https), mlflow_experiment its experiment id; without both, ids
    are plain text.
    """

    cohorts: Sequence[Path]
    pretraining: Mapping[str, Path]
    cells: Sequence[Path]
    source: str
    title: str | None = None
    asks: str = ""
    stamps: Sequence[str] = ()
    notes: Sequence[str] = ()
    seconds: Mapping[str, float] | None = None
    config: str = ""
    git: str = ""
    versions: Mapping[str, str] | None = None
    runs: Mapping[str, str] | None = None
    cell_runs: Mapping[str, str] | None = None
    mlflow_uri: str = ""
    mlflow_ui: str | None = None
    mlflow_experiment: str | None = None
    bootstrap: int = 2000


def write(exp_name: str, inputs: ReportInputs, out: Path) -> Path:
    """Compute and write the page to the file `out` (whole or not at all); returns `out`.

    Raises UserError(REPORT) when there is no cell, or an input is missing or damaged.
    """
    if not inputs.cells:
        raise UserError("REPORT", f"{exp_name} has no finished cell; run `cranium sweep` first")
    try:
        cohorts = [corpus.read(folder) for folder in inputs.cohorts]
        curves = training.plate(inputs.pretraining)
        runs = inputs.cell_runs or {}
        segmented = [folder for folder in inputs.cells if _task(folder) == "segmentation"]
        judged = [folder for folder in inputs.cells if folder not in segmented]
        read = [_read_cell(folder, runs.get(folder.name, "")) for folder in judged]
        maps = report_segmentation.read(segmented, runs) if segmented else None
        sheet = [corpus.presence(cohorts), corpus.examples(cohorts)] if cohorts else []
    except (OSError, KeyError, ValueError) as error:
        raise UserError("REPORT", f"an input of the report cannot be read: {error}") from error

    def ui(run: str) -> Link:
        return _link(run, inputs)

    cells = [cell for cell, _ in read]
    cells = comparison.beside_references(cells)
    found = comparison.points(cells, inputs.bootstrap)
    pairs = comparison.comparisons(found, inputs.bootstrap)
    kinds = comparison.between_stacks(found, inputs.bootstrap)
    on_maps, said = ([], []) if maps is None else report_segmentation.sections(maps, ui, inputs.bootstrap)
    sections = [
        *(_results(found, pairs, inputs) if found else []),
        *(report_measures.section(found, _settings(found), inputs.bootstrap) if found else []),
        *report_adaptations.section(found, inputs.bootstrap),
        *report_stacks.section(found, kinds),
        *report_contrasts.section(cells, inputs.bootstrap),
        *report_strata.section(judged, inputs.bootstrap),
        *report_search.section(judged),
        *on_maps,
        Section("cohorts", "Cohorts", (), tuple(sheet), (corpus.counts(cohorts),) if cohorts else ()),
        *([Section("training", "Pretraining", (), (curves,))] if curves else []),
        _gaps(cohorts),
        _provenance(inputs),
    ]
    values: dict[str, Any] = {
        "title": inputs.title or exp_name,
        "source": inputs.source,
        "stamps": list(inputs.stamps),
        "answer": [
            *([inputs.asks] if inputs.asks else []),
            *_answer(found, pairs),
            *report_stacks.answer(kinds),
            *said,
        ],
        "facts": _facts(cohorts, len(inputs.cells)),
        "sections": sections,
        "notes": [*inputs.notes, *(note for _, notes in read for note in notes)],
        "documents": [("The resolved config", inputs.config)] if inputs.config else [],
    }
    html = page.render(share() / "dashboards" / "report.html.j2", values)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    part.write_text(html, encoding="utf-8")
    os.replace(part, out)
    return out


# ---- reading --------------------------------------------------------------------------------------------------------


def _task(folder: Path) -> str:
    return str(json.loads((folder / "manifest.json").read_text())["task"]["task"])


def _read_cell(folder: Path, run_id: str) -> tuple[Cell, list[str]]:
    """A cell with its scores in subject order, and what about it does not agree."""
    manifest = json.loads((folder / "manifest.json").read_text())
    spec, counts = manifest["cell"], manifest["counts"]
    rows = pd.read_parquet(folder / "predictions.parquet").sort_values("subject", kind="stable")
    rows["test"] = np.where(rows["role"] == TEST, TEST, rows["cohort"])
    probs = [f"prob_{name}" for name in manifest["task"]["classes"]]
    own = {str(test): part for test, part in rows[rows["subset"] == ""].groupby("test")}
    subsets: dict[tuple[str, ...], dict[str, Shown]] = {tuple(subset): {} for subset in spec["subsets"]}
    for (test, subset), part in rows[rows["subset"] != ""].groupby(["test", "subset"]):
        there = own.get(str(test), part[:0])
        shared = set(part["subject"]) & set(there["subject"])
        pair = [_fold(side[side["subject"].isin(shared)], probs) for side in (part, there)]
        subsets[tuple(subset.split("+"))][str(test)] = Shown(_fold(part, probs), *pair)
    why = str(manifest.get("unlearnable", ""))
    if why:  # on every test, so that no mean is silently one of fewer folds
        own = dict.fromkeys((TEST, *manifest["task"]["external"]), rows)
    tests = {test: _fold(part, probs) for test, part in own.items()}
    cell = Cell(
        setting=Setting(
            task=str(manifest["task"]["name"]),
            cohort=str(spec["cohort"]),
            contrasts=" + ".join(spec["contrasts"]),
            stack=str(spec["stack"]),
            scheme=str(spec["scheme"]),
            adaptation=str(spec["adaptation"]),
        ),
        init=str(spec["init"]),
        label_fraction=float(spec["label_fraction"]),
        fold=int(spec["fold"]),
        seed=int(spec["seed"]),
        n_train=int(counts["n_train"]),
        n_train_positive=int(counts["n_train_positive"]),
        n_validation=int(counts["n_validation"]),
        n_test=int(counts["n_test"]),
        tests=tests,
        run_id=run_id,
        name=folder.name,
        contrasts=tuple(spec["contrasts"]),
        fill=str(spec["fill"]),
        subsets=subsets,
        unlearnable=why,
    )
    return cell, _disagreements(cell, manifest["metrics"])


def _fold(rows: pd.DataFrame, probs: list[str]) -> Fold:
    groups = tuple(str(group) for group in rows["group"])
    return Fold(rows["label"].to_numpy(np.int64), rows[probs].to_numpy(), groups)


def _disagreements(cell: Cell, metrics: Mapping[str, float | None]) -> list[str]:
    kept_scores = [(test, "", scores) for test, scores in cell.tests.items()]
    for subset, of in cell.subsets.items():
        kept_scores += [(test, f"{'_'.join(subset)}/", shown.scores) for test, shown in of.items()]
    notes = []
    for test, part, scores in kept_scores:
        key = f"test/{part}auroc" if test == TEST else f"external/{test}/{part}auroc"
        value = auroc(scores.labels, scores.probs)
        kept = metrics.get(key)
        if kept is not None and (isinstance(value, Undefined) or abs(value - kept) > 1e-6):
            notes.append(f"{cell.name}: {key} in its manifest is {kept}, its predictions give {value}.")
    return notes


# ---- words ----------------------------------------------------------------------------------------------------------


def _answer(found: Sequence[Point], pairs: Sequence[Comparison]) -> list[str]:
    """The result in sentences that claim no more than the intervals and the corrected test allow."""
    sentences = []
    settings = _settings(found)
    for setting in settings:
        here = [p for p in found if p.setting == setting and p.test == TEST]
        full, fewest = max(p.label_fraction for p in here), min(p.label_fraction for p in here)
        said = [
            f"{wording.setting(setting, settings)}: with all labels {_means(here, full)}.",
            _verdict(setting, full, pairs),
            f"With the fewest labels {_means(here, fewest)}." if fewest < full else "",
            _chance(here, full) if setting in comparison.cheapest(settings) else "",
        ]
        sentences.append(" ".join(sentence for sentence in said if sentence))
    return sentences


def _means(here: Sequence[Point], fraction: float) -> str:
    """`(about 24 training subjects) the mean AUROC is 0.73 (0.63 to 0.82) for random, ...`."""
    ours = [p for p in here if p.label_fraction == fraction]
    learned = [p for p in ours if p.init != "covariates"] or ours
    n_train = round(float(np.mean([cell.n_train for p in learned for cell in p.cells])))
    means = [
        f"{p.mean:.2f} ({wording.interval(p.interval)}) for {p.init}"
        if p.mean is not None
        else f"undefined for {p.init}"
        for p in learned
    ]
    return f"(about {n_train} training subjects) the mean AUROC is {', '.join(means)}"


def _verdict(setting: Setting, full: float, pairs: Sequence[Comparison]) -> str:
    """What may be said of the pairs of initialisations at the largest fraction."""
    ours = [
        pair
        for pair in pairs
        if pair.setting == setting and pair.label_fraction == full and "covariates" not in (pair.a, pair.b)
    ]
    said = []
    for pair in ours:
        if pair.shown and isinstance(pair.interval, Interval):
            better, worse = (pair.a, pair.b) if pair.interval.estimate > 0 else (pair.b, pair.a)
            said.append(
                f"{better} is above {worse} by {abs(pair.interval.estimate):.2f} ({pair.a} minus {pair.b}: "
                f"{wording.interval(pair.interval, signed=True)}; corrected p {wording.p_value(pair.holm)})."
            )
    rest = [pair for pair in ours if not pair.shown]
    if len(rest) > 1:
        said.append(
            f"No difference was shown for {len(rest)} of {len(ours)} pairs, which is no evidence that there is none"
            f"{_would_miss(rest)}."
        )
    elif rest:
        pair = rest[0]
        reason = (
            f"with this many subjects and folds that is no evidence that there is none{_would_miss(rest)}"
        )
        if isinstance(pair.interval, Interval) and not pair.interval.low <= 0 <= pair.interval.high:
            reason = (
                "the interval over test subjects excludes 0, but the corrected test over folds does not agree"
            )
        said.append(
            f"No difference was shown between {pair.a} and {pair.b} ({pair.a} minus {pair.b}: "
            f"{wording.interval(pair.interval, signed=True)}; corrected p {wording.p_value(pair.holm)}): {reason}."
        )
    return " ".join(said)


def _would_miss(pairs: Sequence[Comparison]) -> str:
    """What true differences these tests would not find; nothing where that is unknown."""
    known = [pair.detectable for pair in pairs]
    sizes = [size for size in known if isinstance(size, float)]
    if not sizes:
        return ""
    if min(sizes) >= 1:
        return ": any true difference would be missed more often than once in five"
    span = f"{min(sizes):.2f}" if len(sizes) == 1 else f"{min(sizes):.2f} to {max(sizes):.2f} (by the pair)"
    return f": a true difference below {span} would be missed more often than once in five"


def _chance(here: Sequence[Point], full: float) -> str:
    """Whether what is known without a pixel already tells the classes apart."""
    known = [p for p in here if p.init == "covariates" and p.label_fraction == full]
    if not known or isinstance(known[0].interval, Undefined):
        return ""
    interval = known[0].interval
    if interval.low <= 0.5 <= interval.high:
        tail = "whose interval holds chance, 0.5"
    else:
        tail = "whose interval does not hold 0.5: part of any score above may be the scanner or the cohort"
    return f"Covariates alone give {interval.estimate:.2f} ({wording.interval(interval)}), {tail}."


def _facts(cohorts: Sequence[corpus.Cohort], cells: int) -> list[tuple[str, str]]:
    total = {
        key: sum(int(c.manifest["counts"][key]) for c in cohorts)
        for key in ("subjects", "stacks", "rejected")
    }
    return [
        ("cohorts", f"{len(cohorts)}"),
        ("subjects", f"{total['subjects']:,}"),
        ("slice stacks", f"{total['stacks']:,}"),
        ("rejected scans", f"{total['rejected']:,}"),
        ("cells", f"{cells:,}"),
    ]


# ---- results --------------------------------------------------------------------------------------------------------


def _settings(found: Sequence[Point]) -> list[Setting]:
    """Ordinary folds before leave one group out."""
    return sorted(
        {p.setting for p in found},
        key=lambda s: (
            s[:2],
            comparison.by_stack(s),
            s.scheme != "subject",
            s.scheme,
            comparison.cheapness(s.adaptation),
        ),
    )


def _mark(point: Point) -> plots.Mark:
    dots = tuple(value for value in point.fold_values if not isinstance(value, Undefined))
    if isinstance(point.interval, Undefined):
        return plots.Mark(point.init, point.mean, dots=dots, note=point.interval.reason)
    return plots.Mark(point.init, point.mean, point.interval.low, point.interval.high, dots)


def _link(run: str, inputs: ReportInputs) -> Link:
    if not run or not inputs.mlflow_ui or not inputs.mlflow_experiment:
        return Link(run)
    return Link(run, f"{inputs.mlflow_ui.rstrip('/')}/#/experiments/{inputs.mlflow_experiment}/runs/{run}")


def _point_table(found: Sequence[Point], name: str) -> Table:
    rows: list[tuple[object, ...]] = []
    for p in found:
        low, high, resampled = None, None, ""
        if isinstance(p.interval, Undefined):
            resampled = p.interval.reason
        else:
            low, high = p.interval.low, p.interval.high
            how = "within folds" if p.interval.by_fold else "over folds"
            resampled = f"{p.interval.num_groups} groups, {how}".replace(" ", wording.NO_BREAK)
        n = [cell.n_train for cell in p.cells]
        positive = [cell.n_train_positive for cell in p.cells]
        n_test = [len(cell.tests[p.test].labels) for cell in p.cells]
        select = [cell.n_validation for cell in p.cells]
        size = (_span(n), _span(positive), _span(select), _span(n_test), resampled)
        rows.append((p.init, f"{100 * p.label_fraction:g} %", p.test, p.mean, low, high, len(p.cells), *size))
    columns = ("init", "labels", "tested on", "mean AUROC", "low", "high", "cells", "n train", "of these positive",
               "of these select", "n test", "resampled")  # fmt: skip
    return Table(columns, tuple(rows), name)


def _span(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _cell_table(found: Sequence[Point], inputs: ReportInputs) -> Table:
    rows: list[tuple[object, ...]] = []
    for p in found:
        for cell, value in zip(p.cells, p.fold_values, strict=True):
            shown = value.reason if isinstance(value, Undefined) else value
            rows.append(
                (
                    p.init,
                    p.test,
                    cell.fold,
                    cell.seed,
                    shown,
                    cell.n_train,
                    cell.n_test,
                    _link(cell.run_id, inputs),
                )
            )
    return Table(
        ("init", "tested on", "fold", "seed", "AUROC", "n train", "n test", "run"),
        tuple(rows),
        "folds and runs",
    )


def _pair_table(pairs: Sequence[Comparison], name: str) -> Table:
    """A row a pair; what no pair has over seeds is said above the tables, not in every row."""
    seeds = any(not isinstance(pair.over_seeds, Undefined) for pair in pairs)
    rows: list[tuple[object, ...]] = []
    for pair in pairs:
        known = isinstance(pair.interval, Interval)
        rows.append(
            (
                f"{pair.a} minus {pair.b}",
                f"{100 * pair.label_fraction:g} %",
                pair.interval.estimate if isinstance(pair.interval, Interval) else None,
                wording.interval(pair.interval, signed=True).replace(" ", wording.NO_BREAK)
                if known
                else wording.interval(pair.interval),
                pair.paired.reason if isinstance(pair.paired, Undefined) else wording.p_value(pair.paired.p),
                pair.corrected.reason
                if isinstance(pair.corrected, Undefined)
                else wording.p_value(pair.corrected.p),
                "exploratory" if pair.holm is None else wording.p_value(pair.holm),
                "undefined" if isinstance(pair.detectable, Undefined) else pair.detectable,
                *([_over_seeds(pair)] if seeds else []),
            )
        )
    columns = (
        "difference",
        "labels",
        "AUROC",
        "95 % interval",
        "paired t, p",
        "corrected t, p",
        "corrected p, Holm",
        "detectable",
        *(["Wilcoxon over seeds, p"] if seeds else []),
    )
    return Table(columns, tuple(rows), name)


def _over_seeds(pair: Comparison) -> str:
    found = pair.over_seeds
    return found.reason if isinstance(found, Undefined) else wording.p_value(found.p)


def _wilcoxon(pairs: Sequence[Comparison]) -> str:
    """How the test over seeds is read, or why there is none."""
    refused = [pair.over_seeds.reason for pair in pairs if isinstance(pair.over_seeds, Undefined)]
    if pairs and len(refused) == len(pairs):
        return f"There is no test over seeds: {refused[0]}."
    return (
        "Wilcoxon's test pairs the means over folds of each seed; seeds share their subjects, so it speaks of training "
        "again, not of other people."
    )


def _results(found: Sequence[Point], pairs: Sequence[Comparison], inputs: ReportInputs) -> list[Section]:
    """Comparison of initialisations, few labels, and external cohorts: a figure for each setting."""
    main, few, outside, tests, smaller = [], [], [], [], []
    settings = _settings(found)
    for setting in settings:
        mine = [p for p in found if p.setting == setting]
        inside = [p for p in mine if p.test == TEST]
        full = max(p.label_fraction for p in inside)
        top = [p for p in inside if p.label_fraction == full]
        where = wording.setting(setting, settings)
        main.append(_main_plate(top, where, inputs))
        if len({p.label_fraction for p in inside}) > 1:
            few.append(_fraction_plate(inside, where))
        for cohort in sorted({p.test for p in mine} - {TEST}):
            beside = [p for p in mine if p.test == cohort and p.label_fraction == full]
            outside.append(_external_plate(top, beside, cohort, where, inputs))
        ours = [p for p in pairs if p.setting == setting]
        tests.append(_pair_table([p for p in ours if p.label_fraction == full], where))
        smaller.append(
            _pair_table([p for p in ours if p.label_fraction < full], f"Smaller label fractions: {where}")
        )
    text = (
        "Differences are a minus b on the same test subjects. The interval resamples test groups; the two-sided "
        "t-tests are paired over folds. The corrected resampled t-test (Nadeau and Bengio) allows for training sets "
        "that overlap; Holm adjusts it over all pairs at the largest label fraction. A difference counts as shown "
        "only when its interval excludes 0 and its adjusted p is below 0.05. Smaller fractions are exploratory. "
        "Rows without a backbone are compared with each other once, beside the cheapest adaptation.",
        "Detectable is the true difference that the corrected test, before Holm, would find in four of five studies "
        "with this spread over folds: what is smaller is mostly missed, so one that was not shown may be there. "
        f"{_wilcoxon(pairs)}",
    )
    sections = [Section("initialisations", "Initialisations", (MEANS,), tuple(main))]
    if few:
        sections.append(Section("labels", "Few labels", (FRACTIONS,), tuple(few)))
    if outside:
        tables = report_external.tables(ensembles.pairs(found), settings)
        told = (OUTSIDE, *([report_external.READ] if tables else []))
        sections.append(Section("external", "External cohorts", told, tuple(outside), (), tables))
    held = tuple(tuple(table for table in some if table.rows) for some in (tests, smaller))
    sections.append(Section("tests", "Comparisons", text, (), *held))
    return sections


def _main_plate(top: Sequence[Point], where: str, inputs: ReportInputs) -> Plate:
    caption = ""
    rough = [p.interval for p in top if isinstance(p.interval, Interval) and not p.interval.by_fold]
    if rough:
        caption = (
            f"Here whole folds are drawn, as each is one group of {rough[0].num_groups}: with so few the whisker is "
            "close to their range and too narrow."
        )
    picture = plots.bars([_mark(p) for p in top], f"AUROC by initialisation: {where}")
    return Plate(where, caption, picture, (_point_table(top, "means"), _cell_table(top, inputs)))


def _fraction_plate(inside: Sequence[Point], where: str) -> Plate:
    fractions = tuple(sorted({p.label_fraction for p in inside}))
    sizes = {}
    for fraction in fractions:
        here = [cell.n_train for p in inside if p.label_fraction == fraction for cell in p.cells]
        sizes[fraction] = f"n {min(here)}" if min(here) == max(here) else f"n {min(here)} to {max(here)}"
    lines = []
    for init in sorted({p.init for p in inside}, key=comparison.rank):
        ours = sorted((p for p in inside if p.init == init), key=lambda p: p.label_fraction)
        lines.append(plots.Curve(init, tuple(p.label_fraction for p in ours), tuple(_mark(p) for p in ours)))
    picture = plots.curves(lines, sizes, f"AUROC against label fraction: {where}")
    return Plate(where, "", picture, (_point_table(inside, "label fractions"),))


def _external_plate(
    top: Sequence[Point], beside: Sequence[Point], cohort: str, where: str, inputs: ReportInputs
) -> Plate:
    outside = {p.init: p for p in beside}
    both = [(p, outside[p.init]) for p in top if p.init in outside]
    rows = [(_mark(a), _mark(b)) for a, b in both]
    picture = plots.pairs(rows, ("held-out folds", cohort), f"Internal beside external AUROC: {where}")
    ordered = [p for pair in both for p in pair]
    tables = (_point_table(ordered, "internal and external"), _cell_table(beside, inputs))
    return Plate(f"{cohort} beside held-out folds: {where}", "", picture, tables)


# ---- where it comes from --------------------------------------------------------------------------------------------


def _gaps(cohorts: Sequence[corpus.Cohort]) -> Section:
    rejected = corpus.rejections(cohorts)
    text = () if rejected.rows else ("No scan was rejected.",)
    return Section("gaps", "What could not be had", text, (), (rejected,) if rejected.rows else ())


def _provenance(inputs: ReportInputs) -> Section:
    plates = []
    if inputs.seconds:
        total = plots.clock(sum(inputs.seconds.values()))
        table = Table(("stage", "seconds"), tuple((k, float(v)) for k, v in inputs.seconds.items()), "time")
        caption = (
            f"A bar is the wall time of one stage; {total} in all. A stage that was already done is not here."
        )
        picture = plots.durations(inputs.seconds, "Wall time by stage")
        plates.append(Plate("Where the time went", caption, picture, (table,)))
    facts: list[tuple[object, ...]] = [("code", inputs.git)] if inputs.git else []
    facts += [("MLflow", inputs.mlflow_uri)] if inputs.mlflow_uri else []
    facts += [(name, version) for name, version in (inputs.versions or {}).items()]
    facts += [(f"run: {name}", _link(run, inputs)) for name, run in (inputs.runs or {}).items()]
    tracked = sum(1 for folder in inputs.cells if (inputs.cell_runs or {}).get(folder.name))
    facts.append(("cells with a run", f"{tracked} of {len(inputs.cells)}"))
    return Section(
        "provenance", "Provenance", (), tuple(plates), (Table(("what", "value"), tuple(facts), "provenance"),)
    )
