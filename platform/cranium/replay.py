"""A captured step done again, from the checkpoint it follows: which module or operation stops being finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cranium import capture, place, pretrain, restart
from cranium.config import Experiment, Machine, UserError
from cranium.store import Artefact

KINDS = {  # what `anomaly.trace` may find, in the order of a step
    "weights": "weights not finite before the step",
    "input": "first module that was given something not finite",
    "module": "first module to make something not finite",
    "terms": "terms not finite",
    "operation": "first operation of the backward pass to make something not finite",
    "gradients": "gradients not finite",
}


def replay(exp: Experiment, machine: Machine, init: str, shard_sets: list[Artefact], path: Path) -> list[str]:
    """Do the step of the capture at `path` again, and say in lines what is found. The run stays as it is.

    The steps between its checkpoint and it are done first. Raises `UserError(CAPTURE)` for another run's capture, or
    when no checkpoint from before the step is kept.
    """
    assert exp.pretrain
    found = capture.read(path)
    made = pretrain.artefact(exp, machine, init, shard_sets)
    if path.resolve().parents[1] != made.path.resolve():
        reason = f"{path} is of another run than {made.path.name}, which these settings make"
        raise UserError("CAPTURE", f"{reason}; see resolved.yaml beside it for those it was made with")
    told = pretrain.payload(exp, machine, init, shard_sets, replay=found.step)
    if found.checkpoint and not told["continued"] and not restart.kept(made.path, found.step):
        raise UserError("CAPTURE", f"{made.path} keeps no checkpoint from before step {found.step}")
    compute = exp.pretrain.compute.model_copy(update={"max_failures": 0})
    again = path.with_name(f"{path.stem}-again")  # of Ray; nothing in it is kept
    try:
        each = pretrain.fit(exp.pretrain.model_copy(update={"compute": compute}), told, again)["replayed"]
    finally:
        place.remove_folder(again)
    return [line for rank, finding in enumerate(each) for line in _told(found, rank, finding)]


def _told(found: capture.Capture, rank: int, finding: dict[str, Any]) -> list[str]:
    who = f"step {found.step}" + (f", worker {rank}" if found.workers > 1 else "")
    if not finding:
        return [
            f"{who}: all is finite this time (was {', '.join(found.wrong)}): another device, or other workers?"
        ]
    return [
        f"{who}: {text}: {', '.join(finding[kind]) if isinstance(finding[kind], list) else finding[kind]}"
        for kind, text in KINDS.items()
        if kind in finding
    ]
