"""The page: what it says, what it escapes, what it refuses to claim."""

from __future__ import annotations

import base64
import csv
import html
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from cranium import report
from cranium.config import UserError
from cranium.tasks import metrics
from reports import EVIL, SOURCE, cells, inputs


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = tmp_path_factory.mktemp("store")
    given = inputs(store)
    page = report.write("demo", given, store / "report" / "index.html").read_text()
    assert (
        report.write("demo", given, store / "again.html").read_text() == page
    )  # the same inputs, the same bytes
    return page


def visible(page: str) -> str:
    """What a person reads, without tags."""
    body = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def test_the_page_is_whole_and_loads_nothing(text: str) -> None:
    assert len(text) < 3_000_000
    loads = re.findall(
        r"""<(?:img|link|iframe|source|object|embed|use|image)\b[^>]*?(?:src|href)=["']([^"']*)""", text
    )
    assert loads and all(address.startswith(("data:", "#")) for address in loads)
    assert "<script" not in text and "url(http" not in text and "@import" not in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    for name in (
        "Initialisations",
        "Few labels",
        "External cohorts",
        "Cohorts",
        "Pretraining",
        "What could not be had",
    ):
        assert f">{name}</h2>" in text


def test_every_figure_says_where_it_comes_from_and_has_its_table(text: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL)
    assert len(figures) == 10  # per scheme 3; contrasts, stacks, training, time
    assert all(SOURCE in f and re.search(r"Figure \d+\.", f) for f in figures)
    assert sum("<table>" in f for f in figures) == 9  # the example stacks show no number
    assert all('role="img"' in f for f in figures)


def test_other_measures_and_thresholds_are_those_of_the_kept_predictions(tmp_path: Path) -> None:
    made = cells(tmp_path, {"random": 1.0, "scratch": 2.0}, fractions=(0.5, 1.0))
    page = report.write("demo", inputs(tmp_path, cells=made), tmp_path / "page.html").read_text()
    of_init, away = dict[str, list[tuple[np.ndarray, np.ndarray]]](), dict[str, list[list[float]]]()
    for folder in made:
        if "linear-subject-1-" in folder.name:
            rows = pd.read_parquet(folder / "predictions.parquet")
            home, other = (
                (side["label"].to_numpy(), side["prob_lesion"].to_numpy())
                for side in (rows[rows["role"] == "test"], rows[rows["role"] != "test"])
            )
            init = folder.name.split("-")[1]
            of_init.setdefault(init, []).append(home)
            ranked = np.sort(home[1][home[0] == 0])[::-1]
            at = min(s for s in home[1] if (ranked >= s).mean() <= 0.1)
            called = other[1] >= at
            away.setdefault(init, []).append([called[other[0] == 1].mean(), 1 - called[other[0] == 0].mean()])
    measures, thresholds = tables_of(page, "measures")
    for init, folds in of_init.items():
        (row,) = [row for row in measures if row["init"] == init]
        for name, measure in (("AUPR", average_precision_score), ("Brier", brier_score_loss)):
            assert row[name].startswith(f"{np.mean([measure(y, p) for y, p in folds]):.2f}\u00a0(")
        (row,) = [row for row in thresholds if row["init"] == init]
        shown = [float(row[name]) for name in ("sensitivity", "specificity")]
        assert shown == pytest.approx(np.mean(away[init], axis=0), abs=6e-4)


def test_initialisations_are_compared_by_ensembles_on_other_cohorts(text: str) -> None:
    tables = [table for table in tables_of(text, "external") if "DeLong, p" in table[0]]
    assert len(tables) == 2  # by scheme
    for table in tables:
        assert [row["difference"].split(" minus ") for row in table] == [
            ["scratch", "random"],
            ["covariates", "random"],
            ["covariates", "scratch"],
        ]
        assert all(
            float(row["a minus b"])
            == pytest.approx(float(row["AUROC of a"]) - float(row["AUROC of b"]), abs=1e-6)
            for row in table
        )


def tables_of(page: str, section: str) -> list[list[dict[str, str]]]:
    """The tables of a section, as they are downloaded."""
    (found,) = re.findall(rf'<section id="{section}">.*?</section>', page, re.S)
    texts = [base64.b64decode(part).decode() for part in re.findall(r"base64,([A-Za-z0-9+/=]+)", found)]
    return [list(csv.DictReader(io.StringIO(text))) for text in texts]


def test_means_are_recomputed_from_the_predictions(tmp_path: Path) -> None:
    made = cells(tmp_path, {"random": 1.0, "scratch": 2.0}, fractions=(1.0,), external=False)
    given = inputs(tmp_path / "rest", cells=made)
    manifest = json.loads((made[0] / "manifest.json").read_text())
    manifest["metrics"]["test/auroc"] = 0.123
    (made[0] / "manifest.json").write_text(json.dumps(manifest))
    page = visible(report.write("demo", given, tmp_path / "x.html").read_text())
    values = []
    for folder in made[5:]:
        rows = pq.read_table(folder / "predictions.parquet").to_pandas()
        values.append(metrics.auroc(rows["label"], rows["prob_lesion"]))
    assert re.search(rf"{np.mean(values):.2f} \([0-9. to]+\) for scratch", page)
    assert "in its manifest is 0.123, its predictions give" in page


def test_a_clear_difference_is_claimed_and_none_is_not(tmp_path: Path) -> None:
    def said(gain: float, where: str) -> str:
        made = cells(tmp_path / where, {"random": 0.2, "scratch": gain}, fractions=(1.0,), external=False)
        given = inputs(tmp_path / where / "rest", cells=made)
        return visible(report.write("demo", given, tmp_path / f"{where}.html").read_text())

    assert "scratch is above random by" in said(6.0, "far")
    near = said(0.2, "near")
    assert "No difference was shown between scratch and random" in near and "is above" not in near
    assert re.search(
        r"no evidence that there is none: a true difference below 0\.\d\d would be missed more often", near
    )


def test_a_test_that_no_pair_has_is_refused_once_and_takes_no_column(text: str) -> None:
    shown = visible(text)
    assert shown.count("There is no test over seeds") == 1 and "Wilcoxon needs 6" in shown
    assert "Wilcoxon over seeds, p" not in shown and "detectable" in shown


def test_covariates_that_tell_the_classes_apart_are_called_out(tmp_path: Path) -> None:
    made = cells(tmp_path, {"random": 1.0, "covariates": 4.0}, fractions=(1.0,), external=False)
    page = visible(
        report.write("demo", inputs(tmp_path / "rest", cells=made), tmp_path / "x.html").read_text()
    )
    assert "does not hold 0.5: part of any score above may be the scanner" in page


def test_scripts_in_ids_are_text(tmp_path: Path) -> None:
    made = cells(tmp_path, {"random": 1.0, "scratch": 1.0}, fractions=(0.5, 1.0), evil=True)
    given = inputs(
        tmp_path,
        cells=made,
        evil=True,
        title=EVIL,
        notes=[EVIL],
        stamps=[EVIL],
        config=EVIL,
        mlflow_ui="javascript:alert(1)//",
    )
    page = report.write(EVIL, given, tmp_path / "x.html").read_text()
    assert "<script" not in page and 'href="javascript:' not in page
    assert page.count("&lt;script&gt;") > 10


def test_formulas_in_tables_are_neutralised() -> None:
    table = report.Table(("a", "b"), (("=cmd()", -0.5), ("@x", "\tq")))
    body = base64.b64decode(table.csv.partition("base64,")[2]).decode().splitlines()
    assert body == ["a,b", "'=cmd(),-0.5", "'@x,'\tq"]


def test_a_fold_without_a_class_is_undefined_with_its_reason(tmp_path: Path) -> None:
    made = cells(tmp_path, {"random": 1.0, "scratch": 1.0}, fractions=(1.0,), external=False)
    rows = pq.read_table(made[0] / "predictions.parquet").to_pandas()
    rows["label"] = 0
    pq.write_table(pa.Table.from_pandas(rows), made[0] / "predictions.parquet")
    page = visible(
        report.write("demo", inputs(tmp_path / "rest", cells=made), tmp_path / "x.html").read_text()
    )
    assert "no subject of class 1 among 24" in page and "nan" not in page.lower().split()


def test_no_cells_and_broken_inputs_are_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no finished cell"):
        report.write("demo", report.ReportInputs([], {}, [], SOURCE), tmp_path / "x.html")
    with pytest.raises(UserError, match="cannot be read"):
        report.write("demo", report.ReportInputs([], {}, [tmp_path / "gone"], SOURCE), tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


def test_initialisations_and_adaptations_are_crossed_not_mixed(tmp_path: Path) -> None:
    strength = {"random": 0.5, "scratch": 1.5}
    made = cells(tmp_path, strength | {"covariates": 0.1}, fractions=(1.0,), external=False)
    made += cells(
        tmp_path, {"random": 2.5, "scratch": 3.5}, fractions=(1.0,), external=False, adaptation="finetune"
    )
    page = report.write("demo", inputs(tmp_path / "rest", cells=made), tmp_path / "x.html").read_text()
    tables = [
        re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", t, re.S)
        for t in re.findall(r"<table.*?</table>", page, re.S)
    ]
    crossed = next(t for t in tables if t[:3] == ["init", "linear", "finetune"])
    values = {}
    for init in ("random", "scratch"):
        row = crossed[crossed.index(init) :][1:3]
        values[init] = [float(visible(v).strip()[:4]) for v in row]
        for way, shown in zip(("linear", "finetune"), values[init], strict=True):
            mine = [f for f in made if f.name.startswith(f"lesion-{init}-{way}-")]
            kept = [json.loads((f / "manifest.json").read_text())["metrics"]["test/auroc"] for f in mine]
            assert shown == pytest.approx(np.mean(kept), abs=0.006)
    assert values["random"][0] < values["random"][1] and "random, finetune minus random, linear" in visible(
        page
    )
    assert "folds grouped by subject, finetune" in visible(page)  # each adaptation has a chart of its own
    for once in ("Covariates alone give", "A ring is the AUROC of one cell"):
        assert visible(page).count(once) == 1


def test_missing_contrasts_are_one_table_computed_from_the_kept_predictions(tmp_path: Path) -> None:
    """Every number of it by a slow second way: scikit-learn's AUROC of each fold, and their mean."""
    subsets = [("T1w", "T2w"), ("FLAIR",)]
    made = cells(tmp_path, {"random": 0.5, "scratch": 3.0}, fractions=(0.5, 1.0), subsets=subsets)
    page = report.write("demo", inputs(tmp_path / "rest", cells=made), tmp_path / "x.html").read_text()
    tables = tables_of(page, "contrasts")
    wide, long = dict(zip(("test", "demo_external"), tables[:2], strict=True)), tables[2]
    assert [(r["T1w"], r["T2w"], r["FLAIR"]) for r in wide["test"]] == [
        ("yes", "yes", "yes"),
        ("yes", "yes", "no"),
        ("no", "no", "yes"),
    ]
    for init, test, row in itertools.product(("random", "scratch"), ("test", "demo_external"), range(3)):
        subset, scores, changes, n = ["", *map("+".join, subsets)][row], [], [], 0
        for folder in (f for f in made if f.name.startswith(f"lesion-{init}-linear-subject-1-")):
            rows = pq.read_table(folder / "predictions.parquet").to_pandas()
            rows = rows[(rows["role"] == "test") if test == "test" else (rows["cohort"] == test)]
            own, mine = (rows[rows["subset"] == s] for s in ("", subset))
            own = own[own["subject"].isin(mine["subject"])]
            n = n + len(mine) if test == "test" else len(mine)
            scores.append(roc_auc_score(mine["label"], mine["prob_lesion"]))
            changes.append(scores[-1] - roc_auc_score(own["label"], own["prob_lesion"]))
        shown = wide[test][row]
        assert int(shown["n"]) == n and shown[init].startswith(f"{np.mean(scores):.2f}\xa0(")
        where = {k: shown[k] for k in ("T1w", "T2w", "FLAIR", "subjects")} | {"init": init, "tested on": test}
        (numbers,) = (r for r in long if where.items() <= r.items())
        assert float(numbers["mean AUROC"]) == pytest.approx(np.mean(scores)) and int(numbers["n"]) == n
        assert float(numbers["low"]) < np.mean(scores) < float(numbers["high"])
        if subset:
            assert float(numbers["change"]) == pytest.approx(np.mean(changes))
            said = re.match(r"by\xa0([+-]0\.\d\d)\xa0\(", shown[f"{init}, change"])
            assert float(said[1]) == pytest.approx(np.mean(changes), abs=0.0051)


def test_kinds_of_stack_are_one_figure_and_paired_differences(tmp_path: Path) -> None:
    """By a second way: scikit-learn's AUROC of each fold of each stack, and their mean difference."""
    made = {
        stack: cells(
            tmp_path,
            {"random": gain, "scratch": 2 * gain, "covariates": 0.0},
            fractions=(0.5, 1.0),
            stack=stack,
        )
        for stack, gain in (("contrasts", 0.6), ("neighbours", 0.5), ("both", 1.5))
    }
    given = inputs(tmp_path / "rest", cells=[f for some in made.values() for f in some])
    page = report.write("demo", given, tmp_path / "x.html").read_text()
    tables = tables_of(page, "stacks")
    (means,) = (t for t in tables if "mean AUROC" in t[0])
    (pairs,) = (t for t in tables if "difference" in t[0])

    def auroc(init: str, stack: str) -> float:
        scores = []
        for folder in (f for f in made[stack] if f.name.startswith(f"lesion-{init}-linear-subject-1-")):
            rows = pq.read_table(folder / "predictions.parquet").to_pandas()
            rows = rows[rows["role"] == "test"]
            scores.append(roc_auc_score(rows["label"], rows["prob_lesion"]))
        assert len(scores) == 5
        return float(np.mean(scores))

    assert [(r["init"], r["stack"]) for r in means] == list(itertools.product(("random", "scratch"), made))
    for row in means:
        assert float(row["mean AUROC"]) == pytest.approx(auroc(row["init"], row["stack"]))
    found = {row["difference"]: float(row["AUROC"]) for row in pairs}
    assert len(found) == 2 * 3
    for init, (b, a) in itertools.product(("random", "scratch"), itertools.combinations(made, 2)):
        assert found[f"{init}, {a} minus {b}"] == pytest.approx(auroc(init, a) - auroc(init, b), abs=5e-4)
    said = visible(page)
    change = auroc("random", "both") - auroc("random", "contrasts")
    assert f"random (linear) {change:+.2f} (" in said and "Exploratory" in said
    assert (
        "folds grouped by subject, neighbouring slices of each contrast" in said
    )  # each setting says its own


def test_one_kind_of_stack_has_no_section(text: str) -> None:
    assert 'id="stacks"' not in text and "neighbouring slices" not in text
