"""A scan and a cell of classification: from phantoms through ingest, features, a fit and back, in one process.

What a cell keeps of itself is read back equal in every bit, so a test subject's raw scans give the probabilities that
the cell was judged by: to 1e-6, for a matrix of one subject is multiplied in another order than one of several.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import phantoms
from cells import in_place
from cranium import (
    adapt,
    cli,
    embed,
    finished_cell,
    ingest,
    new_scans,
    predict,
    probing,
    search_trials,
    shardset,
    tuning,
)
from cranium.cards import Card
from cranium.config import (
    Adaptation,
    Attention,
    Cell,
    Classification,
    Experiment,
    Finetune,
    Knn,
    Lora,
    Machine,
    Probe,
    Search,
    UserError,
)
from cranium.models.attend import AttentionProbe, Bags

CONDITIONS = ("control", "atrophy")
FOLDS = {f"{n:03}": n % 4 // 2 for n in range(1, 9)}  # two subjects of each class in each fold
WHOLE, LACKING = "001", "004"
SHORT = {"epochs": 2, "warmup": 1, "slices": 2, "max_slices": 5, "batch_size": 2}
TASK = Classification(
    task="classification", name="wide", cohort="phantom", label="condition", classes=CONDITIONS
)
EXPERIMENT = Experiment.model_validate(
    {
        "name": "tiny",
        "ingest": {
            "cohorts": ["phantom"],
            "contrasts": ["T1w", "FLAIR"],
            "size": 56,
            "spacing_mm": 4.0,
            "slice_spacing_mm": 8.0,
            "mask": ["supplied", "otsu"],
        },
        "stream": {"fill": "replicate"},
        "pretrain": {"cohorts": ["phantom"], "inits": [], "arch": "vit_tiny_patch14"},
        "embed": {"batch_size": 5},
        "adapt": {"tasks": [TASK.model_dump()]},
        "sweep": {"init": ["random"]},
    }
)


@dataclass(frozen=True)
class Made:
    """A store with a shard set and its features, and the raw folder with its card."""

    machine: Machine
    tree: Path
    few: Path  # of it, two subjects of the test fold: one of them lacks FLAIR
    card: Path
    cohort: adapt.Cohort

    def cell(
        self, adaptation: Adaptation, init: str = "random", pool: str = "mean", keep: bool = True
    ) -> finished_cell.Trained:
        """A finished cell; those that train a network attend where `pool` says so."""
        specs = {
            "linear": Probe(),
            "knn": Knn(),
            "attention": Attention(steps=20),
            "finetune": Finetune(keep=keep, **SHORT),
            "lora": Lora(**SHORT, search=Search(trials=2, space={"rank": (4, 8)}, asha=None)),
        }
        of = {"task": "wide", "cohort": "phantom", "init": init, "adaptation": adaptation, "fold": 0}
        of |= {"label_fraction": 1.0, "scheme": "subject", "seed": 0, "contrasts": ["T1w", "FLAIR"]}
        task = TASK.model_copy(update={"pool": pool})
        name = f"{adaptation}_{init}_{pool}_{keep:d}-00000000"
        folder = self.machine.store / "adapt" / name
        folder.mkdir(parents=True, exist_ok=True)
        # What a search of the LoRA cell found: another rank than is declared.
        (folder / search_trials.RECORD).write_text(json.dumps({"settings": {"rank": 4}}))
        work = adapt.Work(
            Cell.model_validate(of),
            task,
            specs[adaptation],
            ("site", "present"),
            self.cohort,
            (),
            folder,
            start=tuning.Start(init, "vit_tiny_patch14", 0, ("cls", "patch_mean"), "replicate"),
        )
        adapt.run_cell(work, FOLDS)
        return finished_cell.find(self.machine.store, name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return ingested(tmp_path_factory.mktemp("classification"), EXPERIMENT)


def ingested(root: Path, exp: Experiment) -> Made:
    tree = phantoms.bids_tree(
        root / "raw",
        num_subjects=8,
        conditions=CONDITIONS,
        contrasts=("T1w", "FLAIR"),
        missing=((), ("FLAIR",)),
        tilt=False,
        spacing=(6.0, 6.0, 6.0),
        shape=(30, 36, 26),
    )
    card = phantoms.write_card(root / "cards", contrasts=("T1w", "FLAIR"))
    machine = Machine(store=root / "store")
    with in_place():
        content = Card.model_validate(phantoms.card(contrasts=("T1w", "FLAIR")))
        shards = ingest.ingest(content, tree, exp.ingest, machine)
        (features,) = embed.embed(exp, machine, "random", shards)
    few = root / "few"
    for part in (f"sub-{WHOLE}", f"sub-{LACKING}"):
        shutil.copytree(tree / part, few / part)
        shutil.copytree(tree / "derivatives/masks" / part, few / "derivatives/masks" / part)
    shutil.copy(tree / "participants.tsv", few)
    return Made(machine, tree, few, card, adapt.Cohort("phantom", shards.path, features.path))


@pytest.mark.parametrize(
    ("adaptation", "init", "pool"),
    [
        ("linear", "random", "mean"),
        ("linear", "random", "max"),
        ("knn", "random", "mean"),
        ("attention", "random", "mean"),
        ("finetune", "random", "attention"),
        ("lora", "random", "mean"),
        ("finetune", "cnn", "mean"),
    ],
)
def test_raw_scans_get_the_probabilities_that_the_cell_was_judged_by(
    made: Made, tmp_path: Path, adaptation: Adaptation, init: str, pool: str
) -> None:
    cell = made.cell(adaptation, init, pool)
    spec = new_scans.Spec(bids=made.few, card=str(made.card), out=tmp_path)
    done, refused = predict.predict(made.machine, cell, spec)
    assert not refused and [one.about["subject"] for one in done] == [WHOLE, LACKING]
    assert [" ".join(one.about["contrasts"]) for one in done] == ["T1w FLAIR", "T1w"]
    kept = pd.read_parquet(cell.cell.path / adapt.PREDICTIONS).set_index("subject")
    for about in (one.about for one in done):
        stored = kept.loc[about["subject"], ["prob_control", "prob_atrophy"]].to_numpy(float)
        np.testing.assert_allclose(list(about["probabilities"].values()), stored, atol=1e-6, rtol=0)
        assert about["most_probable"] == CONDITIONS[stored.argmax()]
        assert predict.notes(about)[0] == f"subject {about['subject']} of the cell's test fold"
        attention = about["attention"]
        assert (attention is not None) == (adaptation == "attention" or pool == "attention")
        if attention is not None:
            assert sum(attention) == pytest.approx(1, abs=1e-6)
            assert len(attention) == len(about["slices"]["used"])
    slices = done[0].about["slices"]
    assert len(slices["used"]) == (5 if adaptation in ("finetune", "lora") else slices["of"])
    picture = np.asarray(Image.open(tmp_path / done[0].about["files"]["picture"]))
    assert picture.shape[1] > 400 and picture.std() > 10  # something is drawn
    rows = (tmp_path / predict.TABLE).read_text().splitlines()
    assert rows[0].startswith("subject,session,contrasts,control,atrophy,most probable") and len(rows) == 3


def test_stacks_of_several_slices_of_every_contrast_are_made_of_new_scans_too(tmp_path: Path) -> None:
    """`stack: both`: two contrasts, three slices of each, through a probe and through a whole network."""
    stacked = EXPERIMENT.model_copy(update={"ingest": EXPERIMENT.ingest.model_copy(update={"stack": "both"})})
    made = ingested(tmp_path, stacked)
    for adaptation in ("linear", "finetune"):
        cell = made.cell(adaptation)  # type: ignore[arg-type]
        assert cell.shards["shape"] == [2, 3, 56, 56] and cell.ingest.stack == "both"
        spec = new_scans.Spec(bids=made.few, card=str(made.card), out=tmp_path / adaptation)
        done, refused = predict.predict(made.machine, cell, spec)
        assert not refused and [" ".join(one.about["contrasts"]) for one in done] == ["T1w FLAIR", "T1w"]
        kept = pd.read_parquet(cell.cell.path / adapt.PREDICTIONS).set_index("subject")
        for about in (one.about for one in done):
            stored = kept.loc[about["subject"], ["prob_control", "prob_atrophy"]].to_numpy(float)
            np.testing.assert_allclose(list(about["probabilities"].values()), stored, atol=1e-6, rtol=0)


@pytest.mark.parametrize("classes", [2, 3])
def test_what_is_kept_of_a_probe_is_it_in_every_bit(tmp_path: Path, classes: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(24) % classes
    values = rng.normal(size=(24, 4, 6)).astype(np.float32) + labels[:, None, None]
    bags = Bags(values.reshape(-1, 6), np.repeat(np.arange(24), 4))
    for spec in (Probe(), Knn(k=3)):
        fitted = probing.of_vectors(spec, values.mean(1), labels, classes + 1, 0)
        probing.save(fitted, tmp_path / "head.safetensors")
        again = probing.load(spec, tmp_path / "head.safetensors")
        assert np.array_equal(again.predict(values[:, 0]), fitted.predict(values[:, 0]))
        assert again.chosen_by == fitted.chosen_by
    spec = Attention(steps=10)
    attending = probing.of_slices(spec, bags, labels, classes, 0)
    probing.save(attending, tmp_path / "head.safetensors")
    back = probing.load(spec, tmp_path / "head.safetensors")
    assert isinstance(back, AttentionProbe) and back.steps == attending.steps
    assert np.array_equal(back.predict(bags), attending.predict(bags))
    assert back.attention(bags)[:4].sum() == pytest.approx(1, abs=1e-6)


def refusal(made: Made, cell: finished_cell.Trained, out: Path, **asked: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        predict.predict(made.machine, cell, new_scans.Spec(out=out, **asked))
    return caught.value


def test_contrasts_that_the_cohort_never_has_together_are_refused(made: Made, tmp_path: Path) -> None:
    cell, anat = made.cell("linear"), made.tree / f"sub-{WHOLE}" / "anat"
    t1w, flair = (anat / f"sub-{WHOLE}_{c}.nii.gz" for c in ("T1w", "FLAIR"))
    alone = refusal(made, cell, tmp_path, scan={"FLAIR": flair})
    assert alone.code == "CONTRASTS" and "FLAIR alone" in str(alone)
    assert "scan.T1w=FILE, scan.FLAIR=FILE or scan.T1w=FILE" in str(alone)
    strange = refusal(made, cell, tmp_path, scan={"T1w": t1w, "T2w": flair})
    assert strange.code == "CONTRASTS" and "does not look at T2w" in str(strange)
    assert refusal(made, cell, tmp_path, scan={"T1w": t1w}, bids=made.tree).code == "USAGE"


def test_a_folder_of_a_session_is_read_by_the_names_of_its_files(made: Made, tmp_path: Path) -> None:
    cell, folder = made.cell("linear"), made.tree / f"sub-{WHOLE}"
    mask = made.tree / f"derivatives/masks/sub-{WHOLE}/anat/sub-{WHOLE}_T1w_mask.nii.gz"
    ((one,), _) = predict.predict(made.machine, cell, new_scans.Spec(session=folder, mask=mask, out=tmp_path))
    assert one.path.name == f"sub-{WHOLE}_pred.json" and one.about["contrasts"] == ("T1w", "FLAIR")
    doubled = tmp_path / "doubled"
    for name in ("a_T1w.nii.gz", "b_T1w.nii.gz"):
        doubled.mkdir(exist_ok=True)
        (doubled / name).touch()
    assert refusal(made, cell, tmp_path, session=doubled).code == "AMBIGUOUS"
    assert refusal(made, cell, tmp_path, session=tmp_path / "nowhere").code == "NO_RAW"


def test_in_a_tree_what_cannot_be_used_is_told_and_the_rest_is_done(made: Made, tmp_path: Path) -> None:
    cell, tree = made.cell("linear"), tmp_path / "tree"
    shutil.copytree(made.few, tree)
    scan = tree / f"sub-{WHOLE}/anat/sub-{WHOLE}_T1w.nii.gz"
    scan.write_bytes(scan.read_bytes()[:-100])
    (tree / "sub-009/anat").mkdir(parents=True)
    flair = tree / f"sub-{WHOLE}/anat/sub-{WHOLE}_FLAIR.nii.gz"
    shutil.copy(flair, tree / "sub-009/anat/sub-009_FLAIR.nii.gz")
    words = ["predict", cell.cell.path.name, f"bids={tree}", f"card={made.card}"]
    words += [f"out={tmp_path / 'out'}", f"store={made.machine.store}", "--json"]
    ended = CliRunner().invoke(cli.app, words)
    assert ended.exit_code == 3
    facts = json.loads(ended.stdout.splitlines()[-1])
    assert facts["left_out"] == ["009", WHOLE] and facts["made"] == [
        str(tmp_path / f"out/{LACKING}_pred.json")
    ]
    assert f"left out: {WHOLE}: REJECTED" in ended.stdout and "GZ_TRUNCATED" in ended.stdout
    about = json.loads(Path(facts["made"][0]).read_text())
    assert about["shard_set_recipe"] == shardset.RECIPE and about["versions"]["torch"] in torch.__version__
    assert about["preprocessing_hash"] == cell.shards["preprocessing_hash"]


def test_a_cell_without_its_head_says_so(made: Made, tmp_path: Path) -> None:
    scan = {"T1w": made.tree / f"sub-{WHOLE}/anat/sub-{WHOLE}_T1w.nii.gz"}
    head = made.cell("knn").cell.path / adapt.HEAD
    bytes_ = bytearray(head.read_bytes())
    bytes_[-1] ^= 1
    head.write_bytes(bytes_)
    assert refusal(made, made.cell("knn"), tmp_path, scan=scan).code == "WEIGHTS_DAMAGED"
    bytes_[-1] ^= 1
    head.write_bytes(bytes_)
    unkept = refusal(made, made.cell("finetune", keep=False), tmp_path, scan=scan)
    assert unkept.code == "NO_HEAD" and "adapt.finetune.keep=true" in str(unkept)
    blind = refusal(made, made.cell("linear", "covariates"), tmp_path, scan=scan)
    assert blind.code == "NO_HEAD" and "covariates, not at slices" in str(blind)
