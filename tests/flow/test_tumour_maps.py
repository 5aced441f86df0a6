"""Segmentation as a user runs it, on four glioma patients: T1ce alone, each patient left out, frozen tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml

from glioma import PATIENTS, card

pytestmark = pytest.mark.flow
EXPERIMENT = {
    "name": "tumour",
    "asks": "Is a tumour found on T1ce alone, each patient left out?",
    "ingest": {"cohorts": ["glioma"], "contrasts": ["T1ce"], "slice_spacing_mm": 4.0},
    "adapt": {
        "tasks": [
            {
                "task": "segmentation",
                "name": "tumour",
                "cohort": "glioma",
                "classes": {"tumour": ["necrosis", "oedema", "nonenhancing", "enhancing"]},
            }
        ],
        "decoder": {"steps": 300, "batch_size": 8},
    },
    "sweep": {"init": ["random", "dinov2"], "label_fractions": [1.0], "folds": 4},
}


@pytest.mark.timeout(900)
def test_frozen_dinov2_tokens_against_random_ones_leaving_one_patient_out(
    test_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = test_data / "weights" / "dinov2_vits14_derived.fp16.safetensors"
    if not weights.is_file():
        pytest.skip(f"{weights.name} is not among the test data")
    raw, store = test_data / "data" / "glioma4", tmp_path / "store"
    (tmp_path / "datasets").mkdir()
    about = card().model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "datasets" / "glioma.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
    (tmp_path / "tumour.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    facts = [f"store={store}", f"weights={weights}", f"raw.glioma={raw}"]
    command = [sys.executable, "-m", "cranium.cli", "run", str(tmp_path / "tumour.yaml"), *facts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    cells = [folder for folder in (store / "adapt").iterdir() if (folder / "manifest.json").is_file()]
    table = pd.concat(
        [
            pd.read_parquet(folder / "predictions.parquet").assign(
                init=json.loads((folder / "manifest.json").read_text())["cell"]["init"], folder=folder
            )
            for folder in cells
        ]
    )
    dice = table.pivot(index="subject", columns="init", values="dice")
    with capsys.disabled():
        print(f"\nDice of the whole tumour on T1ce, each patient left out:\n{dice.round(3).to_string()}")
        print(table.groupby("init")[["dice", "hd95_mm", "surface_dice"]].mean().round(3).to_string())
    assert sorted(dice.index) == list(PATIENTS) and dice.notna().all(axis=None)
    # Three patients to learn from say little of each single one; which of the two is better they do say.
    assert dice["dinov2"].mean() > dice["random"].mean()
    for row in table.to_dict(
        "records"
    ):  # what was scored is what was written, on the voxels of the label file
        ours = nib.load(row["folder"] / "maps" / row["map"])
        theirs = nib.load(raw / f"brats_2013_pat{row['subject']}_1/OTMultiClass.nii.gz")
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-3)
        found, truth = np.asarray(ours.dataobj) > 0, np.asarray(theirs.dataobj) > 0
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) == pytest.approx(row["dice"])
    page = next((store / "report").glob("tumour-*/report.html")).read_text()
    assert all(f">{patient}<" in page for patient in PATIENTS) and "data:image/png" in page
