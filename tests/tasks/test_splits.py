"""Splits: balance, grouping, nesting, independence of order and hash seed, refusals (rows S1, S2, S4, S5)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cranium.tasks import splits

PLATFORM = Path(splits.__file__).parents[2]


def people(counts: dict[int, int]) -> tuple[list[str], np.ndarray]:
    labels = np.concatenate([np.full(n, label) for label, n in counts.items()])
    return [f"sub-{i:03d}" for i in range(len(labels))], labels


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 40), st.integers(5, 40), st.integers(2, 5), st.integers(0, 10**6))
def test_folds_differ_by_at_most_one_subject_per_class(
    zeros: int, ones: int, num_folds: int, seed: int
) -> None:
    ids, labels = people({0: zeros, 1: ones})
    fold = splits.folds(ids, labels, ids, num_folds, seed)
    assert set(fold) == set(ids)
    for label in (0, 1):
        count = Counter(fold[s] for s, y in zip(ids, labels, strict=True) if y == label)
        assert set(count) == set(range(num_folds))
        assert max(count.values()) - min(count.values()) <= 1
    sizes = Counter(fold.values())
    assert max(sizes.values()) - min(sizes.values()) <= 2


def test_a_family_is_never_split() -> None:
    ids, labels = people({0: 30, 1: 30})
    families = [f"fam-{i % 25}" for i in range(60)]
    fold = splits.folds(ids, labels, families, 5, seed=3)
    for family in set(families):
        assert len({fold[s] for s, f in zip(ids, families, strict=True) if f == family}) == 1
    for k in range(5):
        members = [y for s, y in zip(ids, labels, strict=True) if fold[s] == k]
        assert 9 <= len(members) <= 15 and 3 <= sum(members) <= 9


def test_order_of_rows_does_not_matter_and_seed_does() -> None:
    ids, labels = people({0: 20, 1: 13})
    turned = np.random.default_rng(0).permutation(len(ids))
    shuffled = [ids[i] for i in turned]
    first = splits.folds(ids, labels, ids, 5, 7)
    assert splits.digest(splits.folds(shuffled, labels[turned], shuffled, 5, 7)) == splits.digest(first)
    assert splits.digest(splits.folds(ids, labels, ids, 5, 8)) != splits.digest(first)
    assert splits.label_fraction(shuffled, labels[turned], 0.3, 7) == splits.label_fraction(
        ids, labels, 0.3, 7
    )


@pytest.mark.parametrize("locale", ["C", "tr_TR.UTF-8"])
def test_hash_seed_and_locale_do_not_matter(locale: str) -> None:
    ids = ["sub-i", "sub-I", "Z", "sub-\u0131", "sub-\u0130", "sub-ä", "sub-z", "sub-10", "sub-9", "é"]
    code = (
        f"from cranium.tasks import splits; ids, y = {ids!a}, [0, 1] * 5\n"
        "print(splits.digest(splits.folds(ids, y, ids, 5, 1)), ascii(splits.label_fraction(ids, y, .4, 1)))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=True,
            env={
                **os.environ,
                "PYTHONPATH": str(PLATFORM),
                "PYTHONHASHSEED": hashseed,
                "LC_ALL": locale,
                "PYTHONIOENCODING": "utf-8",
                "OMP_NUM_THREADS": "1",
            },
        ).stdout
        for hashseed in ("0", "4242")
    ]
    fraction = splits.label_fraction(ids, [0, 1] * 5, 0.4, 1)
    here = splits.digest(splits.folds(ids, [0, 1] * 5, ids, 5, 1))
    assert runs[0] == runs[1] == f"{here} {fraction!a}\n".encode()


def test_a_class_smaller_than_the_folds_is_refused_with_its_numbers() -> None:
    ids, labels = people({0: 20, 1: 3})
    with pytest.raises(
        ValueError, match=r"class 1 has 3 subject\(s\) in 3 group\(s\), fewer than num_folds=5"
    ):
        splits.folds(ids, labels, ids, 5, 0)
    ids, labels = people({0: 20, 1: 20})
    with pytest.raises(ValueError, match="at most 2 folds"):
        splits.folds(ids, labels, [f"head-{i % 2}" for i in range(40)], 5, 0)


def test_bad_tables_are_refused() -> None:
    with pytest.raises(ValueError, match=r"repeated: \['a'\]"):
        splits.folds(["a", "a", "b"], [0, 1, 0], ["a", "a", "b"], 2, 0)
    with pytest.raises(ValueError, match="1 negative"):
        splits.folds(["a", "b"], [0, -1], ["a", "b"], 2, 0)
    with pytest.raises(ValueError, match="integers"):
        splits.folds(["a", "b"], [0.0, 1.0], ["a", "b"], 2, 0)


def test_leave_one_group_out_numbers_groups_by_name() -> None:
    fold = splits.leave_one_group_out(["s3", "s1", "s2"], ["b", "a", "b"])
    assert fold == {"s1": 0, "s2": 1, "s3": 1}
    with pytest.raises(ValueError, match="needs 2 groups"):
        splits.leave_one_group_out(["s1", "s2"], ["a", "a"])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(0, 999))
def test_fractions_are_nested_and_stratified(zeros: int, ones: int, seed: int) -> None:
    ids, labels = people({0: zeros, 1: ones})
    label = dict(zip(ids, labels.tolist(), strict=True))
    smaller: set[str] = set()
    for fraction in (0.01, 0.05, 0.1, 0.25, 0.5, 1.0):
        chosen = splits.label_fraction(ids, labels, fraction, seed)
        assert smaller <= set(chosen)
        count = Counter(label[s] for s in chosen)
        assert count[0] == max(1, int(fraction * zeros + 0.5)) and count[1] == max(
            1, int(fraction * ones + 0.5)
        )
        smaller = set(chosen)
    assert sorted(ids) == chosen


def test_shots_are_a_prefix_of_the_fractions() -> None:
    ids, labels = people({0: 40, 1: 20})
    shots = splits.k_shot(ids, labels, 2, seed=5)
    assert len(shots) == 4 and set(shots) <= set(splits.label_fraction(ids, labels, 0.1, seed=5))
    with pytest.raises(ValueError, match=r"\{1: 20\}"):
        splits.k_shot(ids, labels, 21, seed=5)


def test_leakage_lists_ids_and_the_name_that_accepts_it() -> None:
    units = {
        "subject": {"train": {"a", "b"}, "test": {"c"}, "ssl": {"a"}},
        "head": {"train": {"h1"}, "test": {"h1"}, "ssl": {"h1", "h2"}, "external": {"h2"}},
    }
    with pytest.raises(splits.Leakage) as caught:
        splits.check_leakage(units)
    assert [overlap.name for overlap in caught.value.overlaps] == [
        "head:external+ssl",
        "head:ssl+test",
        "head:test+train",
    ]
    assert "h2" in str(caught.value) and "head:test+train" in str(caught.value)
    accepted = ["head:ssl+test", "head:train+test", "head:external+ssl"]
    assert len(splits.check_leakage(units, accepted)) == 3
    with pytest.raises(splits.Leakage, match="head:external"):
        splits.check_leakage(units, accepted[:2])


def test_ssl_on_training_subjects_is_no_leakage_and_acceptances_are_spelt() -> None:
    assert splits.check_leakage({"subject": {"train": {"a"}, "ssl": {"a"}, "test": {"b"}}}) == []
    with pytest.raises(ValueError, match="cannot accept 'everything'"):
        splits.check_leakage({}, ["everything"])


def test_same_content_in_train_and_external_is_leakage() -> None:
    with pytest.raises(splits.Leakage, match=r"1 content\(s\) in both external and train: 9f2c"):
        splits.check_leakage({"content": {"train": {"9f2c"}, "external": {"9f2c", "77"}}})
