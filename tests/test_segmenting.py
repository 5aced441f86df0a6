"""A cell of segmentation on a shard set made from phantoms: tokens written directly, so no backbone and no Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import phantoms
from cranium import report_segmentation, segmenting, store, tokens
from cranium.config import Cell, Decoder, Segmentation, UserError
from cranium.figures.page import Link
from cranium.volume import labels, nifti, shard, slices

SIZE, PATCH = 56, 2
CARD = {"segmentation": {"lesion": [4], "ventricle": [7]}}
TASK = Segmentation.model_validate(
    {
        "task": "segmentation",
        "name": "findings",
        "cohort": "home",
        "classes": {"lesion": ["lesion"], "ventricle": ["ventricle"]},
        "regions": {"any": ["lesion", "ventricle"]},
        "tolerance_mm": 4.0,
    }
)
SHAPE = (48, 56, 36)


def cohort(root: Path, name: str, lesions: list[bool], first: int = 0) -> segmenting.Cohort:
    """A cohort whose tokens say what is in their patch: its share of each class, and noise."""
    rng = np.random.default_rng(first)
    shards, made, raw = root / "ingest" / name, root / "embed" / name, root / "raw" / name
    (shards / "shards").mkdir(parents=True)
    made.mkdir(parents=True)
    tables, groups, sessions, rows, every, files = [], [], [], [], [], {}
    for number, lesion in enumerate(lesions, first):
        subject, voxel = f"{number:03d}", phantoms.affine((4.0, 4.0, 5.0), SHAPE, (4.0, 0, 6.0))
        head = phantoms.head(number, "lesion" if lesion else "control")
        tissue = phantoms.tissues(replace(head, lesion_mm=22.0), SHAPE, voxel)
        drawn = np.select([tissue == 5, tissue == 2], [4, 7], 0).astype(np.int16)
        path = phantoms.write(raw / f"{subject}.nii.gz", drawn, voxel)
        files[subject, ""] = path.name
        grid = slices.session_grid(tissue > 1, voxel, SIZE, 4.0, 5.0)
        run = range(2, grid.shape[0] - 2)
        found = nifti.read(path, labels=True)
        ras, placed = nifti.to_ras(labels.numbered(found, [(4,), (7,)]), found.affine)
        on_grid = slices.onto_grid(ras, placed, grid, labels=True)[run.start : run.stop]
        pixels = np.where(on_grid > 0, 200, 90).astype(np.uint8)[:, None, None]
        tables.append(
            shard.encode(
                pixels,
                channels=("T1w",),
                cohort=name,
                subject=subject,
                session="",
                slices=list(run),
                num_slices=len(run),
                present=1,
                masks=on_grid[:, None],
            )
        )
        groups.append({"subject": subject, "session": "", "rows": len(run), "first_slice": run.start})
        ml = {c: float((on_grid == k).sum()) * 0.08 for k, c in enumerate(("lesion", "ventricle"), 1)}
        sessions.append(
            {
                "cohort": name,
                "subject": subject,
                "session": "",
                "present": 1,
                "site": f"s{number % 2}",
                "label_ml": json.dumps(ml),
                "native_shape": json.dumps({"T1w": SHAPE}),
                "native_affine": json.dumps({"T1w": voxel.round(6).tolist()}),
                "stack_affine": json.dumps(grid.affine.round(6).tolist()),
                "crop": json.dumps({"shape": grid.shape, "slices": [run.start, run.stop, 1]}),
                "transforms": json.dumps({"T1w": np.eye(4).tolist()}),
            }
        )
        side = SIZE // PATCH
        patches = on_grid.reshape(len(run), side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4)
        shares = np.stack([(patches == k).mean(axis=(3, 4)) for k in (1, 2)], -1)
        noise = rng.normal(0, 0.05, (*shares.shape[:3], 4))
        every.append(np.concatenate([shares, noise], -1).reshape(len(run), 1, side * side, 6))
        rows += [{"subject": subject, "session": "", "slice": z, "present": 1} for z in run]
    shard.write(shards / "shards" / "0.parquet", tables)
    pd.DataFrame(sessions).to_parquet(shards / "sessions.parquet")
    entry = {"file": "shards/0.parquet", "rows": len(rows), "row_groups": groups}
    manifest = {"cohort": name, "card": CARD, "classes": ["lesion", "ventricle"], "channels": ["T1w"]}
    manifest |= {"shape": [1, 1, SIZE, SIZE], "preprocessing_hash": "0", "counts": {"stacks": len(rows)}}
    store.commit(shards, {**manifest, "shards": [entry], "preprocessing": {"orientation": "agree"}})
    np.save(made / tokens.TOKENS, np.concatenate(every).astype(np.float16))
    pd.DataFrame(rows).to_parquet(made / tokens.ROWS)
    store.commit(made, {"pixels": SIZE})
    return segmenting.Cohort(name, shards, made, segmenting.LabelFiles(raw, files))


def work(root: Path, home: segmenting.Cohort, *away: segmenting.Cohort, **more: object) -> segmenting.Work:
    fields = {"task": "findings", "cohort": "home", "init": "random", "adaptation": "linear"}
    fields |= {"label_fraction": 1.0, "scheme": "subject", "fold": 0, "seed": 0, "contrasts": ("T1w",)}
    cell = Cell.model_validate(fields | more)
    decoder = Decoder(steps=120, batch_size=8, lr=0.1, width=8)
    return segmenting.Work(cell, TASK, decoder, home, away, root / "adapt" / cell.name)


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> tuple[segmenting.Cohort, segmenting.Cohort]:
    root = tmp_path_factory.mktemp("cohorts")
    home = cohort(root, "home", [True, True, True, False, True, True])
    return home, cohort(root, "away", [True, False], first=50)


FOLDS = {f"{n:03d}": n // 2 for n in range(6)}


@pytest.fixture(scope="module")
def judged(cohorts, tmp_path_factory: pytest.TempPathFactory) -> segmenting.Work:  # type: ignore[no-untyped-def]
    job = work(tmp_path_factory.mktemp("cells"), *cohorts, fold=1)
    segmenting.run_cell(job, FOLDS)
    return job


def test_a_cell_finds_what_its_tokens_say_on_the_scans_own_voxels(judged, cohorts) -> None:  # type: ignore[no-untyped-def]
    scores = store.read_manifest(judged.folder)["metrics"]
    rows = pd.read_parquet(judged.folder / segmenting.PREDICTIONS)
    test = rows[rows["role"] == "test"].set_index(["subject", "region"])
    assert set(test.index) == {(s, r) for s in ("002", "003") for r in ("lesion", "ventricle", "any")}
    assert scores["test/dice/lesion"] == pytest.approx(test.loc[("002", "lesion"), "dice"])
    assert scores["test/dice"] > 0.5 and scores["external/away/dice"] > 0.5
    assert scores["test/dice"] == pytest.approx(
        (scores["test/dice/lesion"] + scores["test/dice/ventricle"]) / 2
    )
    counts = store.read_manifest(judged.folder)["counts"]
    assert (counts["n_train"], counts["n_test"], counts["n_test_positive"]) == (4, 2, 2)
    for subject in ("002", "003"):
        path = judged.folder / segmenting.MAPS / f"sub-{subject}_dseg.nii.gz"
        ours, theirs = nib.load(path), nib.load(cohorts[0].label_files.of(subject, ""))
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)
        found, truth = np.asarray(ours.dataobj), np.asarray(theirs.dataobj)
        dice = 2 * ((found == 2) & (truth == 7)).sum() / ((found == 2).sum() + (truth == 7).sum())
        assert dice == pytest.approx(test.loc[(subject, "ventricle"), "dice"])  # of the files themselves
        assert (judged.folder / segmenting.OVERLAYS / f"sub-{subject}.png").is_file()
    legend = (judged.folder / segmenting.MAPS / "dseg.tsv").read_text()
    assert legend == "index\tname\n0\tbackground\n1\tlesion\n2\tventricle\n"


def test_where_nothing_is_there_to_find_the_rule_is_told(judged) -> None:  # type: ignore[no-untyped-def]
    """Subject 003 has no lesion: found nothing, it is left out with a reason; found something, it counts 0."""
    rows = pd.read_parquet(judged.folder / segmenting.PREDICTIONS)
    row = rows[(rows["subject"] == "003") & (rows["region"] == "lesion")].iloc[0]
    assert row["truth_ml"] == 0 and not row["missed"]
    if row["predicted_ml"] == 0:
        assert np.isnan(row["dice"]) and "nothing to find" in row["undefined"]
        assert "test/home/003/lesion" in store.read_manifest(judged.folder)["undefined"]
    else:
        assert row["dice"] == 0.0


def test_a_missed_class_stays_in_the_mean() -> None:
    rows = [
        {"role": "test", "cohort": "home", "region": "lesion", "dice": d, "hd95_mm": h, "surface_dice": d}
        | {"missed": m}
        for d, h, m in ((0.8, 3.0, False), (0.0, 200.0, True), (None, None, False))
    ]
    found = segmenting._metrics(pd.DataFrame(rows), {"lesion": ()})
    assert found["test/dice/lesion"] == pytest.approx(0.4) and found["test/missed/lesion"] == 1.0
    assert found["test/hd95_mm"] == pytest.approx(101.5)
    nothing = segmenting._metrics(pd.DataFrame(rows[2:]), {"lesion": ()})
    assert nothing["test/dice"] is None and nothing["test/dice/lesion"] is None


def test_a_done_cell_is_not_run_again_and_the_same_cell_gives_the_same_maps(
    judged, cohorts, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    again = replace(judged, folder=tmp_path / "again")
    scores = segmenting.run_cell(again, FOLDS)
    assert scores == store.read_manifest(judged.folder)["metrics"]
    (again.folder / segmenting.PREDICTIONS).unlink()
    assert segmenting.run_cell(again, FOLDS) == scores


def test_the_fraction_shrinks_the_training_subjects_only(cohorts, tmp_path) -> None:  # type: ignore[no-untyped-def]
    job = work(tmp_path, cohorts[0], label_fraction=0.5, fold=0, adaptation="conv")
    segmenting.run_cell(job, FOLDS)
    counts = store.read_manifest(job.folder)["counts"]
    assert (counts["n_train"], counts["n_test"]) == (2, 2)


def test_what_a_task_asks_must_be_in_the_card_and_in_the_scans(cohorts, tmp_path) -> None:  # type: ignore[no-untyped-def]
    home, _ = cohorts
    table = segmenting.subjects(home.shard_set, TASK)
    assert table["label"].tolist() == [1] * 6  # every head has ventricles
    lesion = TASK.model_copy(update={"classes": {"lesion": ("lesion",)}, "regions": {}})
    assert segmenting.subjects(home.shard_set, lesion)["label"].tolist() == [1, 1, 1, 0, 1, 1]
    with pytest.raises(UserError, match="'tumour' is no class of the card; it has lesion, ventricle"):
        segmenting.subjects(home.shard_set, TASK.model_copy(update={"classes": {"x": ("tumour",)}}))
    gone = replace(home, label_files=replace(home.label_files, paths={}))
    with pytest.raises(UserError, match="no label file of 002"):
        segmenting.run_cell(replace(work(tmp_path, gone, fold=1), task=lesion), FOLDS)


def test_the_report_shows_every_subject_and_means_what_the_cells_mean(judged, cohorts, tmp_path) -> None:  # type: ignore[no-untyped-def]
    other = work(tmp_path, *cohorts, fold=0)
    segmenting.run_cell(other, FOLDS)
    table = report_segmentation.read([judged.folder, other.folder], {judged.folder.name: "r1"})
    sections, said = report_segmentation.sections(table, Link, 200)
    assert [section.key for section in sections] == ["maps", "pictures"]
    assert len(sections[0].plates) == 6  # three regions, at home and away
    ventricle = next(p for p in sections[0].plates if p.title.endswith(": ventricle"))
    means = [store.read_manifest(f)["metrics"]["test/dice/ventricle"] for f in (judged.folder, other.folder)]
    assert ventricle.tables[0].rows[0][1] == pytest.approx(np.mean(means))
    assert [row[1] for row in ventricle.tables[1].rows] == ["000", "001", "002", "003"]
    assert ventricle.tables[1].rows[2][-1] == Link("r1")
    rows = sections[1].plates[0].sheet.rows
    assert [title.split(":")[0] for title in rows] == ["random · best", "random · median", "random · worst"]
    for tiles in rows.values():
        assert [tile.label for tile in tiles] == ["truth", "prediction"]
        assert all(tile.image and tile.image.startswith("data:image/png") for tile in tiles)
    dices = [float(title.rsplit(" ", 1)[1]) for title in rows]
    assert dices == sorted(dices, reverse=True)
    assert "over 4 test subjects" in said[0]


def test_a_cnn_stands_beside_every_adaptation_and_one_table_holds_them_all(judged, cohorts, tmp_path) -> None:  # type: ignore[no-untyped-def]
    conv = work(tmp_path, *cohorts, fold=1, adaptation="conv")
    segmenting.run_cell(conv, FOLDS)
    table = report_segmentation.read([judged.folder, conv.folder], {})
    cnn = table[table["adaptation"] == "linear"].assign(init="cnn", adaptation="finetune")
    placed = report_segmentation.beside_references(pd.concat([table, cnn]))
    assert placed.groupby(["init", "adaptation"]).size().to_dict() == {
        (init, way): len(cnn) for init in ("random", "cnn") for way in ("linear", "conv")
    }
    alone = report_segmentation.beside_references(cnn)
    pd.testing.assert_frame_equal(alone, cnn.reset_index(drop=True), check_dtype=False)

    sections, _ = report_segmentation.sections(pd.concat([table, cnn]), Link, 100)
    (across,) = [section for section in sections if section.key == "map-adaptations"]
    ventricle = next(one for one in across.tables if one.name.endswith(": ventricle"))
    assert ventricle.columns == ("init", "linear", "conv")
    (random, baseline) = ventricle.rows
    means = [store.read_manifest(job.folder)["metrics"]["test/dice/ventricle"] for job in (judged, conv)]
    assert [cell.split(" (")[0] for cell in random[1:]] == [f"{mean:.2f}" for mean in means]
    assert baseline == ("cnn", random[1], random[1])


def test_who_is_in_no_fold_is_neither_learnt_from_nor_tested(cohorts, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """With another kind of stack 001 and 004 cannot be used, so that no kind of stack is learnt from them."""
    job = work(tmp_path, cohorts[0], fold=0)
    segmenting.run_cell(job, {s: k for s, k in FOLDS.items() if s not in ("001", "004")})
    counts = store.read_manifest(job.folder)["counts"]
    assert (counts["n_train"], counts["n_test"]) == (3, 1)
    assert set(pd.read_parquet(job.folder / segmenting.PREDICTIONS)["subject"]) == {"000"}


def test_kinds_of_stack_stand_apart_and_are_compared_subject_by_subject(judged, cohorts, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The same cells again as if they were of other stacks, every Dice moved by what is then the difference."""
    other = work(tmp_path, *cohorts, fold=0)
    segmenting.run_cell(other, FOLDS)
    table = report_segmentation.read([judged.folder, other.folder], {})
    assert set(table["stack"]) == {"contrasts"}
    moved = table.assign(stack="both", dice=table["dice"] + 0.25)
    sections, said = report_segmentation.sections(pd.concat([table, moved], ignore_index=True), Link, 200)
    (tests,) = (section for section in sections if section.key == "map-tests")
    (between,) = tests.tables
    assert between.name == (
        "One kind of stack against another, random: Findings in home, linear decoder on frozen tokens, "
        "folds grouped by subject"
    )
    assert [row[:2] for row in between.rows] == [
        (region, "both minus contrasts") for region in ("lesion", "ventricle", "any")
    ]
    for row in between.rows:
        assert row[2] == pytest.approx(0.25) and row[3] == "+0.25 to +0.25"
    assert len(said) == 2 and "(T1w, neighbouring slices of each contrast)" in said[0] + said[1]
