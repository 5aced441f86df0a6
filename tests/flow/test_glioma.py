"""Real scans: four glioma patients (BRATS 2013/2015 by way of DeepMedic; Menze et al. 2015), for checks only."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cranium import embed, ingest
from cranium.config import Experiment, Machine
from cranium.models.probe import fit_linear
from cranium.volume import nifti, slices
from cranium.volume.quality import Rejected
from glioma import PATIENTS, card

pytestmark = pytest.mark.flow


def tumour_per_slice(test_data: Path, sessions: pd.DataFrame) -> dict[tuple[str, int], float]:
    """(patient, slice) -> millilitres of tumour on that slice of the conformed grid, from the voxel labels."""
    found = {}
    for row in sessions.itertuples():
        path = test_data / f"data/glioma4/brats_2013_pat{row.subject}_1/OTMultiClass.nii.gz"
        labels = nifti.read(path, orientation="sform")
        shape = tuple(json.loads(row.crop)["shape"])
        grid = slices.Grid(shape, np.array(json.loads(row.stack_affine)))
        # Every second voxel of 1 mm is half-way between two pixels of 2 mm: the axis decides.
        on_grid = slices.onto_grid(*nifti.to_ras(labels.data, labels.affine), grid, labels=True)
        voxel = abs(np.linalg.det(grid.affine[:3, :3])) / 1000
        for index in range(shape[0]):
            found[row.subject, index] = float((np.nan_to_num(on_grid[index]) > 0).sum()) * voxel
    return found


def test_tumour_slices_are_told_from_others_leaving_one_patient_out(
    ray_cluster: object, test_data: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = test_data / "weights" / "dinov2_vits14_derived.fp16.safetensors"
    if not weights.is_file():
        pytest.skip(f"{weights.name} is not among the test data")
    exp = Experiment.model_validate(
        {
            "name": "glioma",
            "ingest": {
                "cohorts": ["glioma"],
                "contrasts": ["T1ce", "FLAIR"],
                "size": 112,
                "spacing_mm": 2.0,
                "slice_spacing_mm": 4.0,
            },
        }
    )
    machine = machine.model_copy(update={"weights": weights})
    shards = ingest.ingest(card(), test_data / "data" / "glioma4", exp.ingest, machine)
    counts = shards.manifest()["counts"]
    assert counts["subjects"] == 4 and counts["rejected"] == 0 and counts["scans"] == 8
    assert (counts["label_maps_accepted"], counts["label_maps_rejected"]) == (4, 0)
    columns, features = embed.read(embed.embed(exp, machine, "dinov2", shards)[0].path)
    sessions = pd.read_parquet(shards.path / "sessions.parquet")
    tumour = tumour_per_slice(test_data, sessions)
    for row in sessions.itertuples():  # what the shards hold, by class, is what the label file says
        first, stop, _ = json.loads(row.crop)["slices"]
        expected = sum(tumour[row.subject, z] for z in range(first, stop))
        assert sum(json.loads(row.label_ml).values()) == pytest.approx(expected, abs=0.01)
    labels = np.array(
        [tumour[s, int(z)] > 0.1 for s, z in zip(columns["subject"], columns["slice"], strict=True)]
    )
    scores = {}
    for patient in PATIENTS:
        test = columns["subject"] == patient
        fitted = fit_linear(
            features[~test],
            labels[~test].astype(int),
            c_grid=(1e-4, 1e-3, 1e-2),
            folds=3,
            seed=0,
            groups=columns["subject"][~test],
        )
        scores[patient] = roc_auc_score(labels[test], fitted.predict(features[test])[:, 1])
    with capsys.disabled():
        shown = ", ".join(f"{patient} {score:.2f}" for patient, score in scores.items())
        print(f"\nslice-level tumour AUROC, each patient left out: {shown}")
    assert set(scores) == set(PATIENTS)
    # Chance is 0.5; what each patient scores is printed. With four patients only the mean is held to anything.
    assert np.mean(list(scores.values())) > 0.7


def test_a_cut_real_scan_is_rejected(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "data/glioma4/brats_2013_pat0003_1/T1c_subtrMeanDivStd.nii.gz"
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(Rejected) as caught:
        nifti.read(cut)
    assert caught.value.code == "GZ_TRUNCATED"
    assert len(gzip.decompress(source.read_bytes())) > 30_000_000
