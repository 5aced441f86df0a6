"""Subsets of contrasts: what is hidden leaves no trace, and who is judged where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import cells
from cranium import adapt, checkpoint, embed, report, sessions, store, tuning
from cranium.config import Cell, Classification, Experiment, Finetune, Machine
from cranium.tasks import comparison
from cranium.tasks.metrics import Undefined
from shards import CHANNELS, shard_set

LABELS = {"condition": {"column": "condition", "classes": {"control": ["control"], "lesion": ["lesion"]}}}
TASK = Classification(
    task="classification", name="lesion", cohort="tiny", label="condition", classes=("control", "lesion")
)
KEYS = [(f"{n:03d}", "") for n in range(12)]  # 000, 003, ... lack T2w


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("fill", ["zero", "replicate"])
def test_a_hidden_contrast_is_what_an_absent_one_is(tmp_path: Path, fill: str, depth: int) -> None:
    """By a slow loop over rows and channels: all neighbours of a contrast go with it."""
    made = shard_set(tmp_path, depth=depth)
    whole = list(sessions.read(made.path, KEYS))
    for subset in (("T1w",), ("T2w", "FLAIR"), CHANNELS):
        for key, stacks, seen in zip(
            KEYS, whole, sessions.read(made.path, KEYS, fill=fill, contrasts=subset), strict=True
        ):
            there = [c in subset and not (c == "T2w" and int(key[0]) % 3 == 0) for c in CHANNELS]
            for row, shown in zip(stacks.numpy(), seen.numpy(), strict=True):
                for channel in range(3):
                    expected = row[channel] if there[channel] else np.zeros_like(row[0])
                    if not there[channel] and fill == "replicate" and any(there):
                        expected = row[there.index(True)]
                    assert np.array_equal(shown[channel], expected)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("fill", ["zero", "replicate"])
def test_other_pixels_in_a_hidden_contrast_change_no_bit_of_the_features(
    tmp_path: Path, fill: str, depth: int
) -> None:
    one = shard_set(tmp_path / "a", depth=depth)
    two = shard_set(tmp_path / "b", depth=depth, other=dict.fromkeys(range(12), 2))
    backbone, _ = checkpoint.load_backbone(
        "random", arch="vit_tiny_patch14", in_channels=3 * depth, image_size=28
    )
    encoder = embed.Encoder(backbone, ("cls", "patch_mean"), 8, None, fill, (0b111, 0b011, 0b001))
    file = "shards/0.parquet"
    tables = [[encoder._row_group(str(made.path / file), index) for index in range(3)] for made in (one, two)]
    for a, b in zip(*tables, strict=True):
        for subset in range(3):
            mine, theirs = (
                t.filter(t["subset"].to_numpy() == subset)["features"].to_pylist() for t in (a, b)
            )
            assert (mine == theirs) == (subset != 0)


def work(root: Path, made: Path, subsets: tuple[tuple[str, ...], ...], name: str) -> adapt.Work:
    """A fine-tuning that looks at the pixels themselves."""
    cell = Cell(
        task="lesion",
        cohort="tiny",
        init="random",
        adaptation="finetune",
        label_fraction=1.0,
        scheme="subject",
        fold=0,
        seed=0,
        contrasts=CHANNELS,
        subsets=subsets,
    )
    home = adapt.Cohort("tiny", made, None, CHANNELS)
    return adapt.Work(
        cell,
        TASK,
        Finetune(epochs=2, warmup=1, slices=2, max_slices=3),
        (),
        home,
        (),
        root / "adapt" / name,
        start=tuning.Start("random", "vit_tiny_patch14", 0, ("cls",), "zero"),
        shown=tuple(replace(home, contrasts=subset) for subset in subsets),
    )


def labelled(root: Path, other: Mapping[int, int] | None = None) -> Path:
    made = shard_set(root, slices=6, other=other)
    manifest = store.read_manifest(made.path)
    table = pd.read_parquet(made.path / "sessions.parquet").assign(condition=["control", "lesion"] * 6)
    table.to_parquet(made.path / "sessions.parquet")
    store.commit(made.path, manifest | {"card": {"labels": LABELS}})
    return made.path


def test_one_model_is_judged_on_every_subset_and_sees_nothing_else(tmp_path: Path) -> None:
    """FLAIR of the test subjects is another: only where it is seen do their scores change."""
    folds = {f"{n:03d}": n // 4 for n in range(12)}
    subsets = (CHANNELS, ("T1w", "T2w"), ("T1w",))
    kept = []
    for name, other in (("one", None), ("two", dict.fromkeys(range(4), 2))):
        made = labelled(tmp_path / name, other)
        adapt.run_cell(work(tmp_path, made, subsets, name), folds)
        kept.append(pd.read_parquet(tmp_path / "adapt" / name / "predictions.parquet"))
    one, two = (rows.set_index(["subset", "subject"])["prob_lesion"] for rows in kept)
    assert one.index.equals(two.index)
    changed = (one != two).groupby("subset", sort=False).any().to_dict()
    assert changed == {"": True, "T1w+T2w+FLAIR": True, "T1w+T2w": False, "T1w": False}
    who = {subset: list(rows["subject"]) for subset, rows in kept[0].groupby("subset")}
    assert who[""] == who["T1w"] == ["000", "001", "002", "003"]
    assert who["T1w+T2w"] == who["T1w+T2w+FLAIR"] == ["001", "002"]  # the others lack T2w
    assert one["T1w+T2w+FLAIR"].equals(one[""][["001", "002"]])  # nothing is hidden from them
    metrics = store.read_manifest(tmp_path / "adapt" / "one")["metrics"]
    for subset, name in (("", "test/auroc"), ("T1w", "test/T1w/auroc"), ("T1w+T2w", "test/T1w_T2w/auroc")):
        rows = kept[0][kept[0]["subset"] == subset]
        assert metrics[name] == roc_auc_score(rows["label"], rows["prob_lesion"])
    present = kept[0].set_index(["subset", "subject"])["present"]
    assert present["T1w"].tolist() == [1] * 4 and present[""].tolist() == [5, 7, 7, 5]


def test_who_has_none_of_the_contrasts_is_no_example(tmp_path: Path) -> None:
    folds = {f"{n:03d}": n // 4 for n in range(12)}
    job = work(tmp_path, labelled(tmp_path), (), "cell")
    only = ("T2w",)
    job = replace(job, cell=job.cell.model_copy(update={"contrasts": only}))
    job = replace(job, cohort=replace(job.cohort, contrasts=only))
    adapt.run_cell(job, folds)
    counts = store.read_manifest(job.folder)["counts"]
    assert (counts["n_train"], counts["n_train_unseen"], counts["n_test"]) == (6, 2, 2)
    few = replace(job, folder=tmp_path / "adapt" / "few")
    table = pd.read_parquet(job.cohort.shard_set / "sessions.parquet")
    table["condition"] = ["lesion" if n % 3 == 0 else "control" for n in range(12)]  # all lesions lack T2w
    table.to_parquet(job.cohort.shard_set / "sessions.parquet")
    assert adapt.run_cell(few, folds) == {"test/auroc": None}
    why = "the 6 of 8 labelled subjects that have T2w are not of two classes"
    assert store.read_manifest(few.folder)["undefined"] == {"test/auroc": why}
    cell, notes = report._read_cell(few.folder, "")
    (point,) = comparison.points([cell])
    assert point.fold_values == (point.interval,) == (Undefined(why),) and point.mean is None and not notes
    (same,) = comparison.comparisons([point, replace(point, init="scratch")])
    assert same.interval == same.corrected == Undefined(why)
    learnt, _ = report._read_cell(job.folder, "")
    (both,) = comparison.points([replace(learnt, fold=1, setting=cell.setting), cell])
    assert both.mean is None and both.interval == Undefined(why)  # no mean of the folds that are left


def test_features_of_a_subset_are_those_of_hidden_pixels_whatever_else_is_asked(tmp_path: Path) -> None:
    """One pass for many subsets gives each the bits that a pass for it alone gives."""
    made = shard_set(tmp_path)
    backbone, _ = checkpoint.load_backbone("random", arch="vit_tiny_patch14", in_channels=3, image_size=28)
    shown = (0b111, 0b101, 0b010)
    file = str(made.path / "shards" / "0.parquet")
    many = embed.Encoder(backbone, ("cls",), 8, None, "zero", shown)._row_group(file, 0)
    for number, bits in enumerate(shown):
        alone = embed.Encoder(backbone, ("cls",), 8, None, "zero", (bits,))._row_group(file, 0)
        part = many.filter(many["subset"].to_numpy() == number)
        assert part["features"].to_pylist() == alone["features"].to_pylist()
        assert set(part["present"].to_pylist()) == {0b101 & bits}


def test_every_subset_lands_in_a_file_of_its_own(tmp_path: Path) -> None:
    """Through `embed`: each holds all rows, and those that are there are not made again."""
    made, machine = shard_set(tmp_path), Machine(store=tmp_path)
    exp = Experiment.model_validate(
        {
            "name": "tiny",
            "ingest": {"cohorts": ["tiny"], "size": 28},
            "pretrain": {"cohorts": ["tiny"], "arch": "vit_tiny_patch14"},
        }
    )
    with cells.in_place():
        (whole,) = embed.embed(exp, machine, "random", made)
        before = (whole.path / embed.FEATURES).stat().st_mtime_ns
        found = embed.embed(exp, machine, "random", made, subsets=[(), ("T1w",), ("T2w", "FLAIR")])
    assert found[0] == whole and (whole.path / embed.FEATURES).stat().st_mtime_ns == before
    columns = [embed.read(one.path)[0] for one in found]
    assert [sorted(set(c["present"].tolist())) for c in columns] == [[5, 7], [1], [4, 6]]
    assert all(c["subject"].tolist() == columns[0]["subject"].tolist() for c in columns)
    assert [one.manifest()["subset"] for one in found] == [[], ["T1w"], ["T2w", "FLAIR"]]
    values = [embed.read(one.path)[1] for one in found]
    assert values[0].shape == values[1].shape == values[2].shape == (240, 384)
    assert not np.array_equal(values[0], values[1]) and not np.array_equal(values[1], values[2])
