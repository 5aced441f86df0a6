from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from cranium import adapt, embed, probing, store, tuning
from cranium.config import Attention, Cell, Classification, Finetune, Knn, Probe, UserError
from shards import shard_set

LABELS = {
    "condition": {
        "column": "condition",
        "classes": {"control": ["control"], "lesion": ["lesion"], "atrophy": ["atrophy"]},
    }
}
TUNED = Finetune(epochs=2, warmup=1, slices=2, max_slices=3)
SPECS = {"linear": Probe(), "knn": Knn(), "attention": Attention(), "finetune": TUNED}
TASK = Classification(
    task="classification",
    name="lesion",
    cohort="home",
    label="condition",
    classes=("control", "lesion"),
    external=("away",),
)


def cohort(root: Path, name: str, conditions: list[str], signal: float, seed: int) -> adapt.Cohort:
    """A shard set's sessions and a feature artefact, `signal` standard deviations between control and lesion."""
    rng = np.random.default_rng(seed)
    shards, features = root / "ingest" / name, root / "embed" / name
    subjects = [f"{name}{i:03d}" for i in range(len(conditions))]
    table = pd.DataFrame({"cohort": name, "subject": subjects, "session": "", "condition": conditions})
    table = table.assign(head=[f"h{i % 3}" for i in range(len(table))], site="s", present=7, num_slices=4)
    shards.mkdir(parents=True)
    table.to_parquet(shards / "sessions.parquet")
    store.commit(shards, {"cohort": name, "card": {"labels": LABELS}, "channels": ["T1w"]})
    rows = []
    for subject, condition in zip(subjects, conditions, strict=True):
        centre = rng.normal(size=6) + signal * (condition == "lesion")
        for index in range(4):
            vector = (centre + 0.1 * rng.normal(size=6)).astype(np.float32)
            rows.append(
                {
                    "cohort": name,
                    "subject": subject,
                    "session": "",
                    "slice": index,
                    "present": 7,
                    "features": vector.tobytes(),
                }
            )
    features.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), features / "features.parquet")
    return adapt.Cohort(name, shards, features)


def work(root: Path, home: adapt.Cohort, away: adapt.Cohort, **cell: object) -> adapt.Work:
    fields = {
        "task": "lesion",
        "cohort": "home",
        "init": "random",
        "adaptation": "linear",
        "label_fraction": 1.0,
        "scheme": "subject",
    }
    fields |= {"fold": 0, "seed": 0, "contrasts": ("T1w",)} | cell
    return adapt.Work(
        Cell.model_validate(fields),
        TASK,
        SPECS[str(fields["adaptation"])],
        ("head", "site", "present"),
        home,
        (away,),
        root / "adapt" / "cell",
    )


@pytest.fixture
def cohorts(tmp_path: Path) -> tuple[adapt.Cohort, adapt.Cohort]:
    conditions = ["control", "lesion", "atrophy"] * 30
    return cohort(tmp_path, "home", conditions, 2.0, 0), cohort(tmp_path, "away", conditions[:30], 2.0, 1)


def test_a_cell_learns_a_signal_and_its_numbers_are_those_of_its_predictions(tmp_path, cohorts):
    home, away = cohorts
    job = work(tmp_path, home, away)
    table = adapt.subjects(home.shard_set, TASK)
    folds = adapt.assign_folds(table, "subject", 5, 0)
    scores = adapt.run_cell(job, folds)
    predictions = pd.read_parquet(job.folder / "predictions.parquet")
    test = predictions[predictions["role"] == "test"]
    assert scores["test/auroc"] == pytest.approx(roc_auc_score(test["label"], test["prob_lesion"]))
    assert scores["test/auroc"] > 0.8
    assert scores["external/away/auroc"] > 0.8
    assert set(test["subject"]) == {s for s, k in folds.items() if k == 0}
    away_rows = predictions[predictions["role"] == "external"]
    assert len(away_rows) == 20
    controls = np.sort(test.loc[test["label"] == 0, "prob_lesion"])[::-1]
    at = test.loc[
        test["prob_lesion"] > controls[len(controls) // 10], "prob_lesion"
    ].min()  # one in ten may pass
    called = away_rows["prob_lesion"] >= at
    kept = [scores[f"external/away/{name}"] for name in adapt.MOVED]
    assert kept == pytest.approx(
        [called[away_rows["label"] == 1].mean(), 1 - called[away_rows["label"] == 0].mean()]
    )


def test_the_fraction_shrinks_the_training_subjects_only(tmp_path, cohorts):
    home, away = cohorts
    folds = adapt.assign_folds(adapt.subjects(home.shard_set, TASK), "subject", 5, 0)
    job = work(tmp_path, home, away, label_fraction=0.25)
    adapt.run_cell(job, folds)
    counts = store.read_manifest(job.folder)["counts"]
    assert counts["n_train"] == 12  # a quarter of 48
    assert counts["n_train_per_class"] == {"control": 6, "lesion": 6}
    assert counts["n_test"] == 12


def test_subjects_of_other_classes_are_left_out_and_strange_labels_refused(tmp_path, cohorts):
    home, _ = cohorts
    table = adapt.subjects(home.shard_set, TASK)
    assert len(table) == 60 and sorted(set(table["label"])) == [0, 1]
    sessions = pd.read_parquet(home.shard_set / "sessions.parquet")
    sessions.loc[0, "condition"] = "Control "
    sessions.to_parquet(home.shard_set / "sessions.parquet")
    with pytest.raises(UserError, match="Control ") as refused:
        adapt.subjects(home.shard_set, TASK)
    assert refused.value.code == "LABEL"


def test_a_subjects_first_labelled_session_stands_for_it(tmp_path, cohorts):
    home, _ = cohorts
    sessions = pd.read_parquet(home.shard_set / "sessions.parquet")
    later = sessions.iloc[[0]].assign(session="2", condition="lesion")
    pd.concat([later, sessions.assign(session="1")]).to_parquet(home.shard_set / "sessions.parquet")
    table = adapt.subjects(home.shard_set, TASK).set_index("subject")
    assert table.loc["home000", "session"] == "1"
    assert table.loc["home000", "label"] == 0


def test_covariates_know_no_pixels(tmp_path, cohorts):
    """The covariates row works without features; here head, site and present say nothing of the class."""
    home, away = cohorts
    blind = [adapt.Cohort(c.name, c.shard_set, None) for c in (home, away)]
    folds = adapt.assign_folds(adapt.subjects(home.shard_set, TASK), "subject", 5, 0)
    scores = adapt.run_cell(work(tmp_path, blind[0], blind[1], init="covariates"), folds)
    predictions = pd.read_parquet(tmp_path / "adapt" / "cell" / "predictions.parquet")
    assert predictions["prob_lesion"].nunique() <= 6  # 3 heads in each of two cohorts
    assert scores["test/auroc"] is not None


def test_a_done_cell_is_not_run_again(tmp_path, cohorts):
    home, away = cohorts
    job = work(tmp_path, home, away)
    folds = adapt.assign_folds(adapt.subjects(home.shard_set, TASK), "subject", 5, 0)
    first = adapt.run_cell(job, folds)
    (home.features / "features.parquet").unlink()
    assert adapt.run_cell(job, folds) == first


def test_groups_leave_one_out(cohorts):
    home, _ = cohorts
    table = adapt.subjects(home.shard_set, TASK)
    folds = adapt.assign_folds(table, "head", 5, 0)
    heads = table.set_index("subject")["head"].to_dict()
    for fold in set(folds.values()):
        assert len({heads[s] for s, k in folds.items() if k == fold}) == 1
    with pytest.raises(UserError, match="family"):
        adapt.assign_folds(table, "family", 5, 0)


def test_matched_sets_stay_whole_and_covariates_then_say_nothing(tmp_path):
    """Balanced by construction: with whole sets the covariates row is at chance, with split ones far below it."""
    conditions = ["control", "lesion"] * 30
    home = cohort(tmp_path, "home", conditions, 0.0, 0)
    sessions = pd.read_parquet(home.shard_set / "sessions.parquet")
    sessions = sessions.assign(
        block=[f"b{i // 2}" for i in range(60)], head=[f"h{i // 2}" for i in range(60)]
    )
    sessions.to_parquet(home.shard_set / "sessions.parquet")
    scores = {}
    for matched in (None, "block"):
        manifest = store.read_manifest(home.shard_set)
        manifest["card"]["matched"] = matched
        store.commit(home.shard_set, manifest)
        table = adapt.subjects(home.shard_set, TASK)
        folds = adapt.assign_folds(table, "subject", 5, 0)
        if matched:
            assert all(len({folds[s] for s in part["subject"]}) == 1 for _, part in table.groupby("block"))
        job = work(
            tmp_path / str(matched), adapt.Cohort("home", home.shard_set, None), home, init="covariates"
        )
        blind = replace(job, external=())
        scores[matched] = adapt.run_cell(blind, folds)["test/auroc"]
    assert scores["block"] == 0.5
    assert scores[None] < 0.4


def test_missing_features_are_named(tmp_path, cohorts):
    home, away = cohorts
    table = pq.read_table(home.features / "features.parquet")
    pq.write_table(table.slice(8), home.features / "features.parquet")
    folds = adapt.assign_folds(adapt.subjects(home.shard_set, TASK), "subject", 5, 0)
    with pytest.raises(UserError, match=r"home00[01]"):
        adapt.run_cell(work(tmp_path, home, away), folds)


def test_the_manifest_is_plain_json(tmp_path, cohorts):
    home, away = cohorts
    job = work(tmp_path, home, away)
    adapt.run_cell(job, adapt.assign_folds(adapt.subjects(home.shard_set, TASK), "subject", 5, 0))
    manifest = json.loads((job.folder / "manifest.json").read_text())
    assert manifest["cell"]["init"] == "random"
    assert manifest["counts"]["n_validation"] == 0


@pytest.mark.parametrize("adaptation", ["linear", "knn", "attention"])
def test_every_way_on_cached_features_learns_from_the_same_subjects(tmp_path, cohorts, adaptation):
    home, away = cohorts
    folds = adapt.assign_folds(adapt.subjects(home.shard_set, TASK), "subject", 5, 0)
    scores = adapt.run_cell(work(tmp_path, home, away, adaptation=adaptation, label_fraction=0.5), folds)
    assert scores["test/auroc"] > 0.75 and scores["external/away/auroc"] > 0.75
    manifest = store.read_manifest(tmp_path / "adapt" / "cell")
    assert manifest["counts"]["n_train"] == 24 and manifest["chosen_by"]
    assert {"test/ece", "test/brier"} <= scores.keys()


def test_features_of_a_session_are_pooled_whatever_the_order_of_rows(tmp_path, cohorts):
    home, _ = cohorts
    table = adapt.subjects(home.shard_set, TASK)
    mean, top = (probing.pooled(home.features, table, how) for how in ("mean", "max"))
    columns, values = embed.read(home.features)
    for k, subject in enumerate(table["subject"]):
        mine = values[columns["subject"] == subject]
        np.testing.assert_allclose(mean[k], mine.mean(0), rtol=1e-5)
        assert np.array_equal(top[k], mine.max(0))
    bags = probing.bags(home.features, table)
    assert np.array_equal(bags.values[bags.subject == 3], values[columns["subject"] == table["subject"][3]])


def test_a_network_is_trained_and_judged_once_on_the_same_subjects_for_every_start(tmp_path):
    """From pixels: the counts say who was learnt from, and the validation subjects are a part of them."""
    made = shard_set(tmp_path, "home", sessions=12, slices=6)
    manifest = store.read_manifest(made.path)
    sessions = pd.read_parquet(made.path / "sessions.parquet").assign(condition=["control", "lesion"] * 6)
    sessions.to_parquet(made.path / "sessions.parquet")
    store.commit(made.path, manifest | {"card": {"labels": LABELS}})
    home = adapt.Cohort("home", made.path, None)
    folds = adapt.assign_folds(adapt.subjects(made.path, TASK), "subject", 3, 0)
    seen = []
    for init in ("random", "cnn"):
        start = tuning.Start(init, "vit_tiny_patch14", 0, ("cls",), "zero")
        job = work(tmp_path, home, home, init=init, adaptation="finetune")
        job = replace(job, external=(), start=start, folder=tmp_path / "adapt" / init)
        scores = adapt.run_cell(job, folds)
        kept = store.read_manifest(job.folder)
        assert kept["counts"]["n_train"] == 8 and kept["counts"]["n_validation"] == 2
        assert len(kept["validation_auroc"]) == len(kept["loss"]) == 2 and kept["chosen_by"].startswith(
            "epoch"
        )
        seen.append(pd.read_parquet(job.folder / "predictions.parquet")["subject"].tolist())
        assert scores["test/auroc"] is not None
    assert seen[0] == seen[1] == [s for s, k in sorted(folds.items()) if k == 0]


def test_volumes_stand_in_for_nobody_and_say_who_has_none():
    known = np.array([[1000.0, 200.0, 500.0, 300.0, 50.0], [1200.0, 300.0, 500.0, 400.0, 70.0]])
    absent = np.full((1, 5), np.nan)
    train, other = probing.measured([known, absent])
    assert train[0].tolist() == [1000, 200, 500, 300, 50, 0.2, 0.5, 0.3, 0.05, 0]
    np.testing.assert_allclose(other[0, :5], known.mean(0))
    assert other[0, -1] == 1
