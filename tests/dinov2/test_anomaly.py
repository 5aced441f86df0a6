"""The place that is named is the place that was spoilt."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from cranium.dinov2 import anomaly, losses


class Root(nn.Module):
    """Finite for 0, its slope is not: sqrt'(0) is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x * x)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def traced(net: nn.Module, x: Tensor) -> dict[str, object]:
    def work(look: anomaly.Look) -> Mapping[str, Tensor]:
        out = net(x)
        loss = out.square().mean()
        look(loss)
        loss.backward()
        return {"loss": loss.detach(), "other": torch.tensor(1.0)}

    return anomaly.trace({"net": net}, work)


def test_nothing_is_said_of_a_sound_step() -> None:
    assert traced(network(), torch.randn(3, 4)) == {}


def test_a_spoilt_weight_is_named_with_the_module_that_met_it() -> None:
    net = network()
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    found = traced(net, torch.randn(3, 4))
    assert found["weights"] == ["net.2.weight"] and found["module"] == "net.2 (Linear)"
    assert found["terms"] == ["loss"] and "input" not in found
    assert "net.0.weight" in found["gradients"]  # type: ignore[operator]


def test_an_overflow_is_named_where_it_happens_and_not_where_it_arrives() -> None:
    net = network()
    with torch.no_grad():
        net[0].weight.fill_(1e38)
    found = traced(net, torch.full((3, 4), 10.0))
    assert found["module"] == "net.0 (Linear)" and "weights" not in found


def test_a_spoilt_input_is_no_modules_fault() -> None:
    found = traced(network(), torch.full((3, 4), float("inf")))
    assert found["input"] == "net.0" and "module" not in found


def test_a_slope_is_named_where_only_the_backward_pass_is_not_finite() -> None:
    net = nn.Sequential(nn.Linear(4, 4), Root())
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    found = traced(net, torch.ones(3, 4))
    assert "module" not in found and "terms" not in found
    assert str(found["operation"]).startswith("SqrtBackward0")
    assert found["gradients"] == ["net.0.weight", "net.0.bias"]


def test_an_operation_is_tied_to_the_line_that_made_it() -> None:
    """An overflow inside a loss: the line of losses.py is named."""
    x = torch.full((2, 3), 1e-30, requires_grad=True)

    def work(look: anomaly.Look) -> Mapping[str, Tensor]:
        loss = losses.soft_cross_entropy(x * 1e38, torch.full((2, 3), 1e38), 1e-38).sum()
        look(loss)
        loss.backward()
        return {"loss": loss.detach()}

    found = anomaly.trace({}, work)
    assert re.search(r"of cranium/dinov2/losses.py, line \d+, soft_cross_entropy$", found["operation"])


def test_frames_are_of_this_package_whatever_the_folder_of_a_clone_is_called() -> None:
    ours = f'  File "{losses.__file__}", line 7, in dino'
    found = anomaly.OURS.search(ours)
    assert found and found.groups() == ("cranium/dinov2/losses.py", "7", "dino")
    library = "/home/me/cranium/.venv/lib/python3.11/site-packages/torch/_tensor.py"
    assert anomaly.OURS.search(f'  File "{library}", line 7, in backward') is None


def test_hooks_are_gone_afterwards() -> None:
    net = network()
    traced(net, torch.randn(3, 4))
    assert not any(module._forward_hooks for module in net.modules())
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(value: float) -> None:
    bad = torch.tensor([1.0, value])
    assert not anomaly._finite({"a": (torch.ones(2), [bad])})
    assert anomaly._finite(torch.ones(2), None, "text", torch.tensor([1, 2]))
