"""A search sees its cell's labelled subjects only, spends the same everywhere, and goes the same way after a kill."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

import searches
from cranium import adapt, report_search, search_trials, searching, sessions, store, tuning
from cranium.config import Finetune, Lora, UserError
from cranium.search_trials import Trial
from searches import SPEC, cohort, folds, kept, played, work

# ---- what can be asked for ------------------------------------------------------------------------------------------


def asked(space: dict[str, Any], model: type[Finetune] = Finetune, **more: Any) -> Finetune:
    search = {"trials": 4, "space": space} | more.pop("search", {})
    return model.model_validate({"search": search} | more)


@pytest.mark.parametrize(
    ("space", "more", "said"),
    [
        ({"blr": {"low": 1e-2, "high": 1e-3}}, {}, "low must be below high"),
        ({"blr": {"low": 0, "high": 1, "log": True}}, {}, "log: true wants low above 0"),
        ({"blr": {"low": 1e-1, "high": 1}}, {}, "leaves out the declared blr, 0.005"),
        ({"drop_path": [0.0, 0.1]}, {}, "leaves out the declared drop_path, 0.2"),
        ({"drop_path": [0.2]}, {}, "nothing to search"),
        ({"drop_path": {"low": 0, "high": 1}}, {}, "search.space.drop_path: Input should be less than 1"),
        ({"epochs": {"low": 20.5, "high": 60}}, {}, "search.space.epochs: Input should be a valid integer"),
        ({"epochs": {"low": 5, "high": 60}}, {}, "warmup must be below epochs"),
        ({"epochs": {"low": 20, "high": 60}}, {}, "is over before 10 epochs of warm-up"),
        ({"rank": [4, 8]}, {}, "only lora has a rank"),
        ({"validation": [0.25, 0.5]}, {}, "Input should be 'epochs'"),
        ({}, {}, "at least 1 item"),
    ],
)
def test_a_search_that_cannot_be_is_refused_with_its_key(
    space: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        asked(space, **more)
    assert said in str(refused.value)


def test_settings_are_read_as_their_own_kind() -> None:
    """YAML reads 1e-3 as text; whole numbers stay whole, so that a file's settings equal those suggested."""
    space: dict[str, Any] = {"blr": ["1e-3", "5e-3"], "rank": [4, 8], "class_weights": ["balanced", "none"]}
    spec = asked(space | {"epochs": {"low": 40, "high": 60}}, Lora, blr=5e-3)
    found = [searching.study(spec).suggest("a"), *(searching.study(spec).suggest(str(n)) for n in range(3))]
    assert found[0] == {"blr": 5e-3, "rank": 8, "class_weights": "balanced", "epochs": 50}
    every = searching.study(spec)
    kinds = {name: {type(every.suggest(str(n))[name]) for n in range(9)} for name in found[0]}
    assert kinds == {"blr": {float}, "rank": {int}, "class_weights": {str}, "epochs": {int}}
    assert spec.with_settings(found[0]) == Lora(blr=5e-3)


def test_the_order_of_keys_in_a_file_changes_nothing() -> None:
    ends: dict[str, Any] = {"blr": {"low": 1e-4, "high": 1}, "drop_path": {"low": 0, "high": 0.5}}
    orders = [dict(ends), dict(reversed(ends.items()))]
    drawn = [
        [study.suggest(str(n)) for n in range(4)] for study in (searching.study(asked(o)) for o in orders)
    ]
    assert drawn[0] == drawn[1] and drawn[0][1] != drawn[0][2]


# ---- what a search does ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> adapt.Cohort:
    return cohort(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def calm(home: adapt.Cohort, tmp_path_factory: pytest.TempPathFactory) -> list[adapt.Work]:
    """Two searches that nobody disturbed."""
    root = tmp_path_factory.mktemp("calm")
    works = [work(root, home, init=init) for init in ("random", "cnn")]
    played(works, folds(home))
    return works


def test_every_initialisation_gets_the_same_budget_and_a_winner_of_its_own(calm: list[adapt.Work]) -> None:
    records = [json.loads(kept(one)["search.json"]) for one in calm]
    tried = [[search_trials.read(one.folder, n) for n in range(5)] for one in calm]
    assert [r["trials"] for r in records] == [5, 5] and all(len(kept(one)) == 6 for one in calm)
    declared = {"blr": 5e-3, "epochs": 4, "drop_path": 0.2}
    assert all(of[0] and of[0].settings == declared for of in tried)  # the recipe is the first trial
    assert [of[1].settings for of in tried if of[1]] == [tried[0][1].settings] * 2  # type: ignore[union-attr]
    assert tried[0] != tried[1]
    for record, of in zip(records, tried, strict=True):
        scores = [trial.score() for trial in of if trial]
        assert record["winner"] == int(np.argmax(scores))
        assert record["settings"] == of[record["winner"]].settings  # type: ignore[union-attr]
        assert record["epochs"] == sum(len(trial.curve) for trial in of if trial)
        assert record["declared_validation_auroc"] <= record["validation_auroc"]


def test_asha_ends_trials_by_the_rule_of_its_paper(calm: list[adapt.Work]) -> None:
    """A slow second opinion: rungs at 0.3 and 0.6 of a schedule, the upper half of those that came so far goes on."""
    ended = 0
    for one in calm:
        rungs: dict[float, list[float]] = {30.0: [], 60.0: []}
        for number in range(5):
            trial = search_trials.read(one.folder, number)
            assert trial
            epochs, length = SPEC.with_settings(trial.settings).epochs, 0
            passed: set[float] = set()
            for epoch in range(1, epochs + 1):
                length = epoch
                score, stopped = trial.score(epoch), False
                reached = [r for r in sorted(rungs, reverse=True) if 100 * epoch / epochs >= r]
                rung = next((r for r in reached if r not in passed), None)
                if rung and epoch < epochs:
                    stopped = bool(rungs[rung]) and score < np.percentile(rungs[rung], 50)
                    rungs[rung].append(score)
                    passed.add(rung)
                if stopped:
                    break
            assert len(trial.curve) == length, (one.cell.init, number)
            ended += length < epochs
    assert ended == sum(json.loads(kept(one)["search.json"])["ended_early"] for one in calm) > 0


def test_test_subjects_are_never_seen(
    calm: list[adapt.Work], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their labels turned round, the search is bit for bit the same; and no pixel of theirs is read."""
    home = cohort(tmp_path)
    of = folds(home)
    test = [subject for subject, fold in of.items() if fold == 0]
    table = pd.read_parquet(home.shard_set / "sessions.parquet")
    turned = table["condition"].map({"control": "lesion", "lesion": "control"})
    table["condition"] = turned.where(table["subject"].isin(test), table["condition"])
    table.to_parquet(home.shard_set / "sessions.parquet")
    seen, read = set[str](), sessions.read

    def noted(shard_set: Path, keys: Any, **more: Any) -> Any:
        listed = list(keys)
        seen.update(subject for subject, _ in listed)
        return read(shard_set, listed, **more)

    monkeypatch.setattr(sessions, "read", noted)
    one = work(tmp_path, home)
    played([one], of)
    assert kept(one) == kept(calm[0])
    assert len(seen) == 16 and not seen & set(test)


def test_killed_and_begun_again_it_goes_the_same_way(
    calm: list[adapt.Work], home: adapt.Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, in the middle of a trial; what had ended is not trained again."""
    one, of = replace(calm[0], folder=tmp_path / "cell"), folds(home)
    for after in (3, 13):
        with pytest.raises(searches.Killed):
            played([one], of, die_after=after)
        assert searching.wanted(one, of)
    over = sum(search_trials.read(one.folder, n) == search_trials.read(calm[0].folder, n) for n in range(5))
    fitted, learn = [], adapt.learn

    def counted(*rest: Any) -> tuning.Tuned:
        fitted.append(rest)
        return learn(*rest)

    monkeypatch.setattr(adapt, "learn", counted)
    played([one], of)
    assert kept(one) == kept(calm[0]) and not searching.wanted(one, of)
    assert len(fitted) == 5 - over and 2 <= over < 5


def test_the_winner_is_fitted_as_the_same_settings_declared_by_hand(
    calm: list[adapt.Work], home: adapt.Cohort, tmp_path: Path
) -> None:
    searched = calm[1]
    adapt.run_cell(searched, folds(home))
    manifest = store.read_manifest(searched.folder)
    record = manifest["search"]
    assert record == json.loads(kept(searched)["search.json"]) and manifest["counts"]["n_validation"] == 4
    declared = work(tmp_path, home, SPEC.with_settings(record["settings"]), init="cnn")
    adapt.run_cell(declared, folds(home))
    predictions = [pd.read_parquet(one.folder / adapt.PREDICTIONS) for one in (searched, declared)]
    pd.testing.assert_frame_equal(*predictions)
    assert store.read_manifest(declared.folder)["search"] is None
    assert max(manifest["validation_auroc"]) == record["validation_auroc"]

    without = work(tmp_path, home, label_fraction=0.1)  # nobody can be spared
    adapt.run_cell(without, folds(home))
    (section,) = report_search.section([searched.folder, without.folder, declared.folder])
    spent, winners = section.tables[0], section.folded[0]
    assert [row[:6] for row in spent.rows] == [
        ("lesion", "random", "finetune", "contrasts", 1, "0"),
        ("lesion", "cnn", "finetune", "contrasts", 1, "5"),
    ]
    assert spent.rows[1][6:] == (5, record["ended_early"], record["diverged"], record["epochs"])
    shown = [dict(zip(winners.columns, row, strict=True)) for row in winners.rows]
    assert shown[0]["won"] == "as declared: nobody to spare" and shown[0]["blr"] == ""
    assert shown[1]["blr"] == record["settings"]["blr"] and shown[1]["n select"] == 4
    assert report_search.section([declared.folder]) == []


def test_a_trial_that_diverges_is_the_worst_and_costs_nobody_else(
    home: adapt.Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, learn = work(tmp_path, home), adapt.learn

    def fragile(of: adapt.Work, spec: Finetune, *rest: Any) -> tuning.Tuned:
        if spec.epochs < 4:
            raise UserError("LOSS", "diverged; lower blr", 1)
        return learn(of, spec, *rest)

    monkeypatch.setattr(adapt, "learn", fragile)
    played([one], folds(home))
    found = [search_trials.read(one.folder, n) for n in range(5)]
    record = json.loads(kept(one)["search.json"])
    assert record["diverged"] == sum(t is not None and t.settings["epochs"] < 4 for t in found) > 0  # type: ignore[operator]
    assert record["settings"]["epochs"] >= 4
    assert {t.score() for t in found if t and t.diverged} == {search_trials.WORST}


def test_where_nobody_can_be_spared_what_is_declared_stands(home: adapt.Cohort, tmp_path: Path) -> None:
    one = work(tmp_path, home, label_fraction=0.1)  # one subject of each class
    assert not searching.wanted(one, folds(home))
    adapt.run_cell(one, folds(home))
    manifest = store.read_manifest(one.folder)
    assert manifest["search"]["trials"] == 0 and "spared" in manifest["search"]["why"]
    assert "of 4" in manifest["chosen_by"]


def test_a_cell_whose_search_is_not_over_is_not_learnt(home: adapt.Cohort, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `cranium sweep`") as refused:
        adapt.run_cell(work(tmp_path, home), folds(home))
    assert refused.value.code == "NOT_SEARCHED"


def test_a_trial_that_fails_closes_its_cell_until_the_next_time(home: adapt.Cohort, tmp_path: Path) -> None:
    works = [work(tmp_path, home, init=init) for init in ("random", "cnn")]
    cells = searching.Cells(works)
    first, second = cells.suggest("a"), cells.suggest("b")
    assert isinstance(first, dict) and isinstance(second, dict)
    assert (first["cell"], second["cell"]) == (0, 1) and cells.suggest("c") is None  # one at a time
    cells.on_trial_complete("a", error=True)
    assert cells.suggest("d") is None and cells.left == [0, 4]
    assert not search_trials.concluded(works[0].folder)


def test_equal_areas_are_told_apart_by_the_loss_and_unequal_ones_never() -> None:
    better, worse = Trial({}, ((0.75, 0.2),)), Trial({}, ((0.75, 0.9),))
    assert better.score() > worse.score()
    assert Trial({}, ((0.76, -math.log(1e-12)),)).score() > Trial({}, ((0.75, 0.0),)).score()
    assert Trial({}, ((0.9, 0.1),), "diverged").score() == search_trials.WORST == Trial({}).score()
    assert (
        Trial({}, ((0.5, 1.0), (0.9, 0.1), (0.4, 2.0))).score(1) < Trial({}, ((0.5, 1.0), (0.9, 0.1))).score()
    )
