"""Results by sex, age band and site: against a slow loop over people, with what cannot be said left unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from cranium import report_strata

AGES = [None, 17.9, 18.0, 59.0, 60.0, 88.0]


def cell(root: Path, init: str, fold: int, fraction: float = 1.0, **columns: Any) -> Path:
    rng = np.random.default_rng([fold, len(init)])
    table = pd.DataFrame({"subject": [f"{init}{fold}{i:03d}" for i in range(36)], "role": "test"})
    table = table.assign(label=np.arange(36) // 2 % 2, group=table["subject"], prob_b=rng.random(36))
    table = table.assign(prob_a=1 - table["prob_b"], cohort="home")[
        ["subject", "role", "label", "group", "prob_a", "prob_b", "cohort"]
    ].assign(subset="")
    table = table.assign(**columns)
    away = table.assign(role="external", cohort="away", prob_b=0.5)
    folder = root / f"{init}-{fold}-{fraction}"
    folder.mkdir(parents=True)
    hidden = table.assign(subset="T1w", prob_b=0.5)
    pd.concat([table, away, hidden]).to_parquet(folder / "predictions.parquet")
    spec = {
        "task": "lesion",
        "cohort": "home",
        "contrasts": ["T1w"],
        "stack": "contrasts",
        "scheme": "subject",
        "adaptation": "linear",
    }
    spec |= {"init": init, "fold": fold, "seed": 0, "label_fraction": fraction}
    (folder / "manifest.json").write_text(json.dumps({"cell": spec}))
    return folder


def rows(folders: list[Path]) -> list[dict[str, Any]]:
    (section,) = report_strata.section(folders, 200)
    return [dict(zip(t.columns, row, strict=True)) for t in section.folded for row in t.rows]


def test_strata_are_means_over_folds_of_the_people_in_them(tmp_path: Path) -> None:
    sex, site = ["F", "F", "M", "M", "M", "M"] * 6, [f"s{i // 12}" for i in range(36)]
    folders = [
        cell(tmp_path, init, fold, fraction, sex=sex, site=site, age=AGES * 6)
        for init in ("scratch", "random")
        for fold in range(3)
        for fraction in (0.5, 1.0)
    ]
    found = rows(folders)
    assert [row["init"] for row in found] == ["random"] * 10 + ["scratch"] * 10
    for row in found:
        values, people = [], 0
        for fold in range(3):
            table = pd.read_parquet(tmp_path / f"{row['init']}-{fold}-1.0" / "predictions.parquet")
            table = table[(table["role"] == "test") & (table["subset"] == "")]
            if row["by"] == "age":
                low, _, high = row["stratum"].partition(" to ")
                above, below = float(low.split()[0]), float(high or 129) + 1
                mine = table[(table["age"] >= above) & (table["age"] < below)]
            else:
                mine = table[table[row["by"]] == row["stratum"]]
            people += len(mine)
            values.append(roc_auc_score(mine["label"], mine["prob_b"]))
        assert row["n"] == people and row["folds with a value"] == "3 of 3"
        assert abs(row["AUROC"] - np.mean(values)) < 1e-12
    ages = [row["stratum"] for row in found[:10] if row["by"] == "age"]
    assert ages == ["0 to 17", "18 to 39", "40 to 59", "60 to 69", "80 and above"]
    assert [row["n"] for row in found[:10] if row["by"] == "age"] == [18] * 5


def test_a_stratum_without_a_class_is_counted_and_has_no_value(tmp_path: Path) -> None:
    alone = ["x" if i // 2 % 2 == 0 else "y" for i in range(36)]  # one class at each site
    found = rows([cell(tmp_path, "random", fold, site=alone, sex="F") for fold in range(2)])
    assert [(row["by"], row["stratum"]) for row in found] == [
        ("site", "x"),
        ("site", "y"),
    ]  # one sex is no split
    for row in found:
        assert (row["n"], row["rarest class"], row["AUROC"], row["folds with a value"]) == (
            36,
            0,
            "undefined",
            "0 of 2",
        )
        assert row["95 % interval"].startswith("no interval")


def test_a_cohort_that_tells_nothing_of_its_people_has_no_section(tmp_path: Path) -> None:
    assert report_strata.section([cell(tmp_path, "random", 0)], 200) == []
