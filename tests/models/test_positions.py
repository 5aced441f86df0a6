"""Position tables: the official code's numbers, timm's function, axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed

from cranium.models import positions, vit

OFFICIAL = np.load(Path(__file__).parents[1] / "reference" / "dinov2_models_b8931f7.npz")


@pytest.mark.parametrize("size", [98, 224, 518])
@pytest.mark.parametrize("rule", ["dinov2", "timm"])
def test_tables_are_those_of_the_official_code(rule: positions.PositionRule, size: int) -> None:
    table = torch.from_numpy(OFFICIAL["table"])
    got = positions.resample(table, 1, (size // 14, size // 14), rule)
    np.testing.assert_allclose(got, OFFICIAL[f"table.{rule}.{size}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [98, 224, 602])
def test_tables_are_those_of_timm(size: int) -> None:
    table = torch.from_numpy(OFFICIAL["table"])
    grid = [size // 14, size // 14]
    expected = resample_abs_pos_embed(table, new_size=grid, old_size=[37, 37], num_prefix_tokens=1)
    torch.testing.assert_close(positions.resample(table, 1, (grid[0], grid[1]), "timm"), expected)


def test_the_rules_differ_where_it_matters() -> None:
    table = torch.from_numpy(OFFICIAL["table"])
    new = {rule: positions.resample(table, 1, (16, 16), rule) for rule in ("dinov2", "timm", "transformers")}  # type: ignore[arg-type]
    spread = table.std()
    assert (new["dinov2"] - new["timm"]).abs().max() > 0.05 * spread
    assert (new["dinov2"] - new["transformers"]).abs().max() > 0.01 * spread


@pytest.mark.parametrize("rule", ["dinov2", "timm", "transformers"])
def test_axes_prefix_gradient_and_constants(rule: positions.PositionRule) -> None:
    ramp = torch.arange(8.0)[:, None, None].expand(8, 8, 2).reshape(1, 64, 2)
    table = torch.cat([torch.full((1, 1, 2), -7.0), ramp], dim=1).requires_grad_()
    new = positions.resample(table, 1, (4, 6), rule)
    assert (new[:, :1] == -7.0).all()
    rows = new[:, 1:].reshape(4, 6, 2)
    assert (rows[1:] > rows[:-1]).all()
    torch.testing.assert_close(rows[:, 0], rows[:, 5])
    new.sum().backward()
    assert table.grad is not None and table.grad.any()
    constant = positions.resample(torch.full((1, 64, 2), 3.0, dtype=torch.float64), 0, (3, 3), rule)
    torch.testing.assert_close(constant, torch.full((1, 9, 2), 3.0, dtype=torch.float64))
    assert positions.resample(table, 1, (8, 8), rule) is table
    with pytest.raises(ValueError, match="square grid"):
        positions.resample(torch.zeros(1, 8, 4), 1, (4, 4), rule)


def test_released_models_get_the_rule_they_were_made_with() -> None:
    for name, spec in vit.ARCHITECTURES.items():
        official = "dinov2" if name.endswith("_patch14_dinov2") else "timm"
        assert spec.position == official, name
