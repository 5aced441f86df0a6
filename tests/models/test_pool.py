"""Pooling over the rows of a subject."""

from __future__ import annotations

import pytest
import torch

from cranium.models.pool import AttentionPool, max_pool, mean_pool


def test_mean_of_each_subjects_rows() -> None:
    features = torch.tensor([[1.0, 0.0], [10.0, 4.0], [3.0, 2.0]])
    assert mean_pool(features, torch.tensor([1, 0, 1])).tolist() == [[10.0, 4.0], [2.0, 1.0]]


def test_attention_equals_a_loop_over_subjects() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(4, hidden=5).double()
    features, index = torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1])
    got = pool(features, index)
    for subject in range(3):
        rows = features[index == subject]
        score = pool.score(torch.tanh(pool.value(rows)) * torch.sigmoid(pool.gate(rows)))
        weight = torch.softmax(score, dim=0)
        # Scores and weights are fp32 on purpose.
        torch.testing.assert_close(got.features[subject], (weight * rows).sum(dim=0), rtol=0, atol=1e-6)
        torch.testing.assert_close(got.weights[index == subject], weight[:, 0], rtol=0, atol=1e-6)


def test_equal_rows_share_equally_and_huge_scores_do_not_overflow() -> None:
    pool = AttentionPool(2, hidden=3)
    with torch.no_grad():
        pool.score.weight.fill_(1e4)
    pooled = pool(torch.ones(4, 2), torch.tensor([0, 0, 0, 0]))
    assert pooled.weights.tolist() == [0.25] * 4 and pooled.features.tolist() == [[1.0, 1.0]]


def test_a_subject_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="subject 1 has no row"):
        mean_pool(torch.zeros(2, 3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="reaches 2"):
        mean_pool(torch.zeros(3, 3), torch.tensor([0, 1, 2]), num_subjects=2)


def test_max_pool_is_the_largest_of_each_feature() -> None:
    features = torch.tensor([[1.0, -5.0], [0.0, -4.0], [-1.0, 2.0]])
    pooled = max_pool(features, torch.tensor([0, 0, 1]))
    assert pooled.tolist() == [[1.0, -4.0], [-1.0, 2.0]]
    with pytest.raises(ValueError, match="no row"):
        max_pool(features, torch.tensor([0, 0, 2]))
