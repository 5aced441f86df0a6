"""Pooling, labels and covariates (row S3)."""

from __future__ import annotations

import numpy as np
import pytest

from cranium.tasks import classification


def test_pooling_is_the_mean_of_each_subject_in_any_row_order() -> None:
    rng = np.random.default_rng(0)
    ids = [f"sub-{k}" for k in rng.integers(0, 7, 50)]
    features = rng.normal(size=(50, 4)).astype(np.float32)
    names, pooled = classification.pool_subjects(ids, features)
    assert names == sorted(set(ids)) and pooled.dtype == np.float32
    for name, row in zip(names, pooled, strict=True):
        np.testing.assert_allclose(row, features[[i == name for i in ids]].mean(axis=0), rtol=1e-5)


def test_pooling_refuses_broken_features() -> None:
    with pytest.raises(ValueError, match=r"features of 1 subject\(s\) are not finite: b"):
        classification.pool_subjects(["a", "b"], [[1.0], [np.nan]])
    with pytest.raises(ValueError, match="2 subject ids"):
        classification.pool_subjects(["a", "b"], [[1.0]])


def test_labels_follow_the_declared_order() -> None:
    assert classification.encode_labels(["CN", "AD", "CN"], ["CN", "AD"]).tolist() == [0, 1, 0]


@pytest.mark.parametrize("strange", ["AD ", "0.0", 0, 1.0, float("nan"), None, "", "MCI", "ad"])
def test_strange_labels_are_refused_with_counts(strange: object) -> None:
    with pytest.raises(classification.LabelError, match=r"LABEL: 1 of 3 .*'CN' x 2") as caught:
        classification.encode_labels(["CN", "CN", strange], ["CN", "AD", "0"])
    blank = strange is None or strange == "" or strange != strange
    assert ("missing x 1" if blank else f"{strange!r} x 1") in str(caught.value)


def test_covariates_by_hand() -> None:
    table = {
        "head": ["h2", "h1", "h2"],
        "site": ["a", "a", None],
        "present": [0b101, 0b111, 0b001],
        "age": [60, None, 70],
        "sex": ["F", "M", "F"],
    }
    x, names = classification.covariates(table)
    assert names == ["head=h1", "head=h2", "site=missing", "site=a", "present:0", "present:1", "present:2"]
    assert x.tolist() == [[0, 1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0, 0]]
    x, names = classification.covariates(table, ["age", "sex"])
    assert names == ["age", "age:missing", "sex=F", "sex=M"]
    assert x.tolist() == [[60, 0, 1, 0], [65, 1, 0, 1], [70, 0, 1, 0]]
    with pytest.raises(ValueError, match="no column 'scanner'"):
        classification.covariates(table, ["scanner"])
