from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cranium import store, sweep
from cranium.config import Experiment, Machine, UserError
from cranium.store import Artefact

LABELS = {"condition": {"column": "condition", "classes": {"control": ["control"], "lesion": ["lesion"]}}}


def shard_set(
    root: Path, cohort: str, heads: list[str], *, overlaps: list[str] = (), tag: str = ""
) -> Artefact:
    """A shard set's manifest and sessions, no pixels: 24 subjects spread over `heads`."""
    folder = root / "ingest" / f"{cohort}-0"
    folder.mkdir(parents=True)
    table = pd.DataFrame({"cohort": cohort, "subject": [f"{i:02d}" for i in range(24)], "session": ""})
    table = table.assign(
        head=[heads[(i // 2) % len(heads)] for i in range(24)],
        block=[f"b{i // 2}" for i in range(24)],
        condition=["control", "lesion"] * 12,
        present=7,
        sources=[json.dumps({"T1w": {"path": "x", "sha256": f"{tag or cohort}{i}"}}) for i in range(24)],
    )
    table.to_parquet(folder / "sessions.parquet")
    card = {"labels": LABELS, "groups": ["head"], "matched": "block", "simulated": True}
    card["overlaps"] = [{"cohort": other} for other in overlaps]
    store.commit(folder, {"cohort": cohort, "card": card, "channels": ["T1w"]})
    return Artefact(folder)


def experiment(accept: list[str] = (), **sweep_settings: object) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "grid",
            "ingest": {"cohorts": ["ssl", "home", "away"]},
            "pretrain": {"cohorts": ["ssl"], "inits": ["scratch"]},
            "stream": {"lanes": 8},
            "adapt": {
                "tasks": [
                    {
                        "name": "lesion",
                        "cohort": "home",
                        "label": "condition",
                        "classes": ["control", "lesion"],
                        "external": ["away"],
                    }
                ],
                "accept_leakage": accept,
            },
            "sweep": {"init": ["random", "scratch"], "label_fractions": [0.5, 1.0], "folds": 3}
            | sweep_settings,
        }
    )


def sets(root: Path, **heads: list[str]) -> dict[str, Artefact]:
    own = {name: [f"{name}{i}" for i in range(12)] for name in ("ssl", "home", "away")}
    return {name: shard_set(root, name, used) for name, used in (own | heads).items()}


def features(root: Path) -> dict[tuple[str, str], Artefact]:
    return {
        (i, c): Artefact(root / "embed" / f"{i}_{c}") for i in ("random", "scratch") for c in ("home", "away")
    }


def test_a_clean_design_passes_and_the_grid_is_whole(tmp_path: Path):
    made = sets(tmp_path)
    grid = sweep.declare(
        experiment(group_by=["subject", "head"]), Machine(store=tmp_path), made, features(tmp_path)
    )
    assert grid.stamps == ()
    assert len(grid.works) == 2 * 2 * (3 + 12)  # inits x fractions x (folds + heads)
    assert len({work.folder for work in grid.works}) == len(grid.works)
    assert set(grid.folds) == {"lesion/subject/0", "lesion/head/0"}
    assert len(grid.missing) == len(grid.works)


@pytest.mark.parametrize(
    ("heads", "name"),
    [
        ({"ssl": ["home1", "ssl1"]}, "head:ssl+test"),
        ({"away": ["ssl1", "away1"]}, "head:external+ssl"),
        ({"home": ["h0", "h1", "h2"]}, "head:test+train"),
    ],
)
def test_a_head_on_two_sides_is_refused_until_accepted_by_name(tmp_path: Path, heads, name):
    made = sets(tmp_path, **heads)
    with pytest.raises(UserError, match="accept by name") as refused:
        sweep.assign(experiment(), made)
    assert refused.value.code == "LEAKAGE" and name in str(refused.value)
    _, stamps = sweep.assign(experiment(accept=[name]), made)
    assert any("head" in stamp for stamp in stamps)


def test_the_ssl_corpus_matters_only_to_backbones_made_from_it(tmp_path: Path):
    made = sets(tmp_path, ssl=["home1", "ssl1"])
    _, stamps = sweep.assign(experiment(init=["random", "covariates"]), made)
    assert stamps == ()


def test_one_file_under_two_names_is_refused(tmp_path: Path):
    made = sets(tmp_path)
    made["away"] = shard_set(tmp_path / "copy", "away", ["away0"], tag="home")
    with pytest.raises(UserError, match="content"):
        sweep.assign(experiment(), made)


def test_a_declared_overlap_is_refused_from_either_card(tmp_path: Path):
    made = sets(tmp_path)
    for name, other in (("ssl", "home"), ("home", "ssl")):
        heads = [f"{name}{i}" for i in range(12)]
        declared = made | {name: shard_set(tmp_path / f"declared-{name}", name, heads, overlaps=[other])}
        with pytest.raises(UserError, match=r"overlap:ssl\+test"):
            sweep.assign(experiment(), declared)


def test_identity_follows_what_shapes_the_result(tmp_path: Path):
    made, machine = sets(tmp_path), Machine(store=tmp_path)

    def folders(exp: Experiment, inputs: dict[tuple[str, str], Artefact] | None = None) -> list[str]:
        return [w.folder.name for w in sweep.declare(exp, machine, made, inputs or features(tmp_path)).works]

    base = folders(experiment())
    assert folders(experiment(compute={"num_workers": 4})) == base
    other = experiment()
    probe = other.adapt.model_copy(update={"probe": other.adapt.probe.model_copy(update={"c_grid": (1.0,)})})
    assert not set(folders(other.model_copy(update={"adapt": probe}))) & set(base)
    moved = features(tmp_path) | {("scratch", "home"): Artefact(tmp_path / "embed" / "another")}
    changed = [a != b for a, b in zip(base, folders(experiment(), moved), strict=True)]
    assert changed == ["scratch" in name for name in base]


def test_more_fractions_leave_the_other_cells_as_they_are(tmp_path: Path):
    made, machine = sets(tmp_path), Machine(store=tmp_path)
    few = sweep.declare(experiment(label_fractions=[1.0]), machine, made, features(tmp_path))
    many = sweep.declare(experiment(label_fractions=[0.25, 1.0]), machine, made, features(tmp_path))
    assert {w.folder for w in few.works} < {w.folder for w in many.works}
    assert np.array_equal(few.folds["lesion/subject/0"], many.folds["lesion/subject/0"])
