"""A scan and a cell: from phantoms through ingest, tokens, a fit and back, in one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import phantoms
from cells import in_place
from cranium import (
    embed,
    finished_cell,
    ingest,
    new_scans,
    predict,
    restitch,
    segmenting,
    store,
    tokens,
    tuning,
)
from cranium.cards import Card
from cranium.config import Cell, Decoder, Experiment, Machine, Segmentation, UserError
from cranium.store import Artefact

CLASSES = {"ventricle": [2], "lesion": [5]}
SHAPE, SPACING = (36, 42, 30), (5.0, 5.0, 5.0)
EXPERIMENT = Experiment.model_validate(
    {
        "name": "tiny",
        "ingest": {
            "cohorts": ["phantom"],
            "contrasts": ["T1w"],
            "size": 56,
            "spacing_mm": 4.0,
            "slice_spacing_mm": 8.0,
            "mask": ["supplied", "otsu"],
        },
        "pretrain": {"cohorts": ["phantom"], "inits": [], "arch": "vit_tiny_patch14"},
        "adapt": {
            "tasks": [
                {
                    "task": "segmentation",
                    "name": "finding",
                    "cohort": "phantom",
                    "classes": {"lesion": ["lesion"], "fluid": ["ventricle"]},
                }
            ],
            "decoder": {"steps": 5, "batch_size": 4},
        },
        "sweep": {"init": ["random"]},
    }
)


FOLDS = {"001": 0, "002": 1, "003": 1}
# Cells learnt from the pixels: what each starts from, how, and whether its network is to be kept.
TUNED = {
    "finding-00000001": ("random", "finetune", True),
    "finding-00000002": ("random", "lora", False),
    "finding-00000003": ("cnn", "finetune", True),
    "finding-00000004": ("random", "finetune", False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, Path, Artefact]:
    """A store with one cell, and the raw folder of its cohort."""
    root = tmp_path_factory.mktemp("predict")
    tree = phantoms.bids_tree(
        root / "raw", num_subjects=3, missing=(), tilt=False, spacing=SPACING, shape=SHAPE
    )
    grid = phantoms.affine(SPACING, SHAPE)
    for index, condition in enumerate(("control", "lesion", "atrophy")):
        tissue = phantoms.tissues(phantoms.head(index, condition), SHAPE, grid)
        drawn = np.where(np.isin(tissue, (2, 5)), tissue, 0).astype(np.uint8)
        phantoms.write(tree / f"labels/sub-00{index + 1}_dseg.nii.gz", drawn, grid)
    content = phantoms.card()
    content["layouts"][0]["segmentation"] = "labels/sub-{subject}_dseg.nii.gz"
    card = Card.model_validate(content | {"segmentation": CLASSES})
    machine, exp = Machine(store=root / "store"), EXPERIMENT
    with in_place():
        shards = ingest.ingest(card, tree, exp.ingest, machine)
        embedded = tokens.embed_tokens(exp, machine, "random", shards, None, "linear")
    files = segmenting.LabelFiles(tree, ingest.label_files(card, tree, exp.ingest, machine))
    cell = Cell.model_validate(
        {"task": "finding", "cohort": "phantom", "init": "random", "adaptation": "linear", "fold": 0}
        | {"label_fraction": 1.0, "scheme": "subject", "seed": 0, "contrasts": ["T1w"]}
    )
    task = exp.adapt.tasks[0]
    assert isinstance(task, Segmentation)
    home = segmenting.Cohort("phantom", shards.path, embedded.path, files)
    folder = machine.store / "adapt" / "finding-00000000"
    work = segmenting.Work(cell, task, Decoder(steps=40, batch_size=4, lr=0.05), home, (), folder)
    segmenting.run_cell(work, FOLDS)
    for name, (init, adaptation, keep) in TUNED.items():
        changed = cell.model_copy(update={"init": init, "adaptation": adaptation})
        start = tuning.Start(init, "vit_tiny_patch14", exp.embed.seed, ("cls",), exp.fill)
        how = {"steps": 30, "batch_size": 4, "lr": 1e-3, "lora_lr": 1e-2, "cnn_lr": 1e-2, "keep": keep}
        spec = Decoder.model_validate({"lr": 0.05, "tuned": how})
        pixels = replace(home, tokens=None)
        segmenting.run_cell(
            segmenting.Work(changed, task, spec, pixels, (), folder.with_name(name), (), start), FOLDS
        )
    return machine, tree, Artefact(folder)


def scan_of(tree: Path, subject: str) -> Path:
    return next(tree.glob(f"sub-{subject}/**/*_T1w.nii.gz"))


def mask_of(tree: Path, subject: str) -> Path:
    return next(tree.glob(f"derivatives/masks/sub-{subject}/**/*_T1w_mask.nii.gz"))


def test_tokens_are_the_backbones_at_its_last_block(made: tuple[Machine, Path, Artefact]) -> None:
    machine, _, cell = made
    shards, embedded = (
        machine.store / s / n for s, n in zip(("ingest", "embed"), cell.manifest()["inputs"][0], strict=True)
    )
    rows, values = tokens.read(embedded)
    backbone, _ = embed.load(EXPERIMENT, machine, "random", store.read_manifest(shards), None)
    stacks = restitch.read_stacks(Artefact(shards), store.read_manifest(shards), "002", "").pixels
    with torch.no_grad():
        expected = backbone(torch.from_numpy(stacks).flatten(1, 2).float() / 255).patches
    mine = values[(rows["subject"] == "002").to_numpy()]
    assert mine.shape == (len(stacks), 1, 16, 192) and mine.dtype == np.float16
    np.testing.assert_allclose(mine[:, 0], expected.numpy(), atol=4e-3)


def test_a_scan_is_predicted_as_the_cell_predicted_it(
    made: tuple[Machine, Path, Artefact], tmp_path: Path
) -> None:
    machine, tree, cell = made
    found = finished_cell.find(machine.store, "00000000")
    spec = new_scans.Spec(scan={"T1w": scan_of(tree, "001")}, mask=mask_of(tree, "001"), out=tmp_path)
    ((one,), _) = predict.predict(machine, found, spec)
    path = tmp_path / one.about["files"]["map"]
    ours, theirs = nib.load(path), nib.load(cell.path / "maps" / "sub-001_dseg.nii.gz")
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)
    assert np.array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
    assert set(np.unique(np.asarray(ours.dataobj))) == {0, 2}  # this head has no lesion
    about = json.loads(one.path.read_text())
    assert about["run"] == "finding-00000000" and about["labels"] == {"lesion": 1, "fluid": 2}
    assert about["scans"]["T1w"]["sha256"] == store.sha256(scan_of(tree, "001"))
    assert (tmp_path / about["files"]["picture"]).is_file()
    voxel = np.prod(SPACING) / 1000
    assert about["ml"]["fluid"] == pytest.approx(np.count_nonzero(ours.dataobj) * voxel, abs=1e-3)
    assert about["known"]["part"] == "test" and predict.notes(about) == [
        "subject 001 of the cell's test fold"
    ]


@pytest.mark.parametrize("name", list(TUNED)[:3])
def test_a_network_predicts_a_scan_as_its_cell_did(
    made: tuple[Machine, Path, Artefact], tmp_path: Path, name: str
) -> None:
    """To the voxel: decoders that guess at random would not agree, nor would one without its statistics."""
    machine, tree, _ = made
    spec = new_scans.Spec(scan={"T1w": scan_of(tree, "001")}, mask=mask_of(tree, "001"), out=tmp_path)
    found = finished_cell.find(machine.store, name)
    ((one,), _) = predict.predict(machine, found, spec)
    ours = np.asarray(nib.load(tmp_path / one.about["files"]["map"]).dataobj)
    theirs = np.asarray(nib.load(found.cell.path / "maps" / "sub-001_dseg.nii.gz").dataobj)
    assert np.array_equal(ours, theirs) and np.count_nonzero(ours)
    assert one.about["head_sha256"] == store.sha256(found.cell.path / segmenting.DECODER)
    assert (one.about["weights"] is None) == (TUNED[name][0] == "cnn")


def test_what_was_not_kept_or_has_changed_is_refused(
    made: tuple[Machine, Path, Artefact], tmp_path: Path
) -> None:
    machine, tree, _ = made
    spec = new_scans.Spec(scan={"T1w": scan_of(tree, "001")}, out=tmp_path)
    with pytest.raises(UserError, match=r"run its sweep with adapt\.decoder\.tuned\.keep=true") as refused:
        predict.predict(machine, finished_cell.find(machine.store, "finding-00000004"), spec)
    assert refused.value.code == "NO_HEAD"
    kept = finished_cell.find(machine.store, "finding-00000002")
    head = kept.cell.path / segmenting.DECODER
    whole = head.read_bytes()
    try:
        head.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError) as refused:
            predict.predict(machine, kept, spec)
    finally:
        head.write_bytes(whole)
    assert refused.value.code == "WEIGHTS_DAMAGED"


def test_a_bids_tree_gives_a_map_for_every_session(
    made: tuple[Machine, Path, Artefact], tmp_path: Path
) -> None:
    machine, tree, _ = made
    written, _ = predict.predict(
        machine,
        finished_cell.find(machine.store, "finding-00000000"),
        new_scans.Spec(bids=tree, out=tmp_path),
    )
    assert [one.about["files"]["map"] for one in written] == [f"00{n}_dseg.nii.gz" for n in (1, 2, 3)]
    assert len((tmp_path / predict.TABLE).read_text().splitlines()) == 4


def test_what_does_not_fit_is_refused(made: tuple[Machine, Path, Artefact], tmp_path: Path) -> None:
    machine, tree, _ = made
    found, scan = finished_cell.find(machine.store, "00000000"), scan_of(tree, "001")

    def refused(**spec: Any) -> str:
        with pytest.raises(UserError) as caught:
            predict.predict(machine, found, new_scans.Spec(out=tmp_path, **spec))
        return f"{caught.value.code}: {caught.value}"

    assert refused(scan={"T2w": scan}).startswith("CONTRASTS") and "scan.T1w=FILE" in refused(
        scan={"T2w": scan}
    )
    assert refused().startswith("USAGE") and refused(scan={"T1w": scan}, bids=tree).startswith("USAGE")
    (tmp_path / "cut.nii.gz").write_bytes(scan.read_bytes()[:-100])
    assert "GZ_TRUNCATED" in refused(scan={"T1w": tmp_path / "cut.nii.gz"})
    with pytest.raises(UserError, match="names 0 finished cells"):
        finished_cell.find(machine.store, "ffffffff")
    found.embedded["source"]["sha256"] = "0"
    with pytest.raises(UserError, match="these are None"):
        predict.predict(machine, found, new_scans.Spec(scan={"T1w": scan}, out=tmp_path))
