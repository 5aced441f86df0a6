"""Where a step stops being finite: the first module of its forward pass, the first operation of its backward pass.

torch's own anomaly mode raises in the midst of a backward pass, where other workers then wait for this one, and knows
NaN alone. Here nothing is raised, infinities count, and modules have names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MOST = 5  # names listed of a kind
# A frame of this package in a traceback, wherever it lies: a clone's own folder may be called cranium, too.
SHELF = Path(__file__).parents[2]
OURS = re.compile(rf'"{re.escape(str(SHELF))}/(cranium/[^"]+\.py)", line (\d+), in (\S+)')

Look = Callable[[Tensor], None]


def trace(modules: Mapping[str, nn.Module], work: Callable[[Look], Mapping[str, Tensor]]) -> dict[str, Any]:
    """Do `work` and say where it stops being finite; empty when it does not.

    `work` is a forward and a backward pass of these modules, by name. It calls what it is given on the loss before it
    differentiates it, and returns scalar terms by name. What may be found:

    weights: names of tensors that were not finite beforehand; input: the first module that was given something
    not finite; module: the first that made something not finite of what was; terms: their names; operation: of the
    backward pass, as module, with the line of the forward pass that it belongs to; gradients: names of parameters.
    """
    found: dict[str, Any] = {}
    _list(found, "weights", _tensors(modules))
    with ExitStack() as stack:
        for name, module in modules.items():
            for inner, part in module.named_modules(prefix=name):
                stack.enter_context(
                    part.register_forward_hook(_after_forward(found, inner), with_kwargs=True)
                )
        stack.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))  # keeps the lines
        terms = work(lambda loss: _watch_backward(found, loss))
    _list(found, "terms", ((name, term) for name, term in terms.items()))
    _list(found, "gradients", _gradients(modules))
    return found


def _tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for name, module in modules.items():
        yield from module.named_parameters(prefix=name)
        yield from module.named_buffers(prefix=name)


def _gradients(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in _tensors(modules):
        if parameter.grad is not None:
            yield name, parameter.grad


def _list(found: dict[str, Any], kind: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    if bad := [name for name, tensor in tensors if not _finite(tensor)]:
        found[kind] = bad[:MOST] + ([f"and {len(bad) - MOST} more"] if len(bad) > MOST else [])


def _after_forward(found: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if "module" in found or "input" in found:
            return
        if not _finite(args, kwargs):
            found["input"] = name
        elif not _finite(output):
            found["module"] = f"{name} ({type(module).__name__})"

    return hook


def _watch_backward(found: dict[str, Any], loss: Tensor) -> None:
    """Hook every operation that leads to `loss`."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        metadata: Any = node.metadata
        node.register_hook(_after_backward(found, node.name(), metadata.get("traceback_", ())))


def _after_backward(found: dict[str, Any], name: str, lines: Iterable[str]) -> Callable[..., None]:
    def hook(made: Any, given: Any) -> None:
        if "operation" not in found and _finite(given) and not _finite(made):
            ours = [frame for line in lines if (frame := OURS.search(line))]
            where = f" of {ours[-1][1]}, line {ours[-1][2]}, {ours[-1][3]}" if ours else ""
            found["operation"] = f"{name}{where}"

    return hook


def _finite(*values: Any) -> bool:
    """Whether every floating-point tensor in these values, tuples, lists and mappings is finite throughout."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point() and not bool(value.isfinite().all()):
                return False
        elif isinstance(value, Mapping):
            if not _finite(*value.values()):
                return False
        elif isinstance(value, tuple | list) and not _finite(*value):
            return False
    return True
