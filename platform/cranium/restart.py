"""How far a run is, and its training state: handed to Ray Train while the steps go on, taken up when it starts again.

Every worker of a pretraining calls `save` at the same steps, and the first writes. A start takes up the newest whole
checkpoint in the run's folder, so a cut or changed one costs the steps since the one before, and Ray's own list of
checkpoints, which a kill may cut too, is not needed.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cranium import checkpoint
from cranium.config import UserError
from cranium.dinov2.method import DINOv2

RAY = "ray"  # below a run's folder: what Ray Train keeps there
LIST = "checkpoint_manager_snapshot.json"  # in it


@dataclass
class Position:
    """How far a run is; a part of every checkpoint."""

    step: int = 0  # steps that are done
    skipped: int = 0  # of them, those whose update was left out because it was not finite
    in_a_row: int = 0  # of those, the last ones


def save(
    method: DINOv2, optimiser: torch.optim.Optimizer, position: Position, writes: bool, awaited: bool
) -> None:
    """Write a checkpoint aside and hand it to Ray, which copies it while the steps go on, unless it is `awaited`."""
    import ray.train
    from ray.train import Checkpoint, CheckpointUploadMode

    if not writes:
        ray.train.report({"step": position.step})
        return
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    try:
        state = {**asdict(position), "method": method.state_dict(), "optimiser": optimiser.state_dict()}
        checkpoint.save_training(folder, state)
        ray.train.report(
            {"step": position.step},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if awaited else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def restore(
    method: DINOv2, optimiser: torch.optim.Optimizer, run: Path, continued: Path | None, at_most: int | None
) -> Position:
    """Take up the newest whole checkpoint of this run, else of the one it continues; of `at_most` so many steps.

    The first worker chooses, so that all take the same.
    """
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    state: dict[str, Any] | None = None
    chosen: str | None = None
    if ray.train.get_context().get_world_rank() == 0:
        chosen, state = _newest(kept(run, at_most) or (kept(continued, at_most) if continued else []))
    chosen = broadcast_from_rank_zero(chosen)
    if chosen is None:
        return Position()
    state = state or checkpoint.load_training(Path(chosen))
    try:
        method.load_state_dict(state["method"])
        optimiser.load_state_dict(state["optimiser"])
        return Position(state["step"], state["skipped"], state["in_a_row"])
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError("CHECKPOINT", f"{chosen} holds another network or other heads: {reason}") from None


def _newest(folders: list[Path]) -> tuple[str | None, dict[str, Any] | None]:
    for folder in reversed(folders):
        try:
            return str(folder), checkpoint.load_training(folder)
        except checkpoint.Damaged as damage:
            print(f"checkpoint left out: {damage}", flush=True)
    if folders:
        raise UserError("CHECKPOINT", f"none of {len(folders)} checkpoints of this run is whole", 1)
    return None, None


def kept(run: Path, at_most: int | None = None) -> list[Path]:
    """The folders of a run's checkpoints, oldest first; those of `at_most` so many steps."""
    folders = sorted((run / RAY).glob("checkpoint_*/"))
    return [folder for folder in folders if at_most is None or _step(folder) <= at_most]


def _step(folder: Path) -> float:
    """The steps of a checkpoint; infinity where it does not say."""
    try:
        return int(json.loads((folder / checkpoint.COMPLETE).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def tidy(run: Path) -> None:
    """Before a start: remove what a kill has left of a checkpoint, and Ray's list of them where it was cut.

    Ray writes that list in place, and refuses for ever a run whose list it cannot read or that names what is gone.
    """
    path, folders = run / RAY / LIST, {folder.name: folder for folder in kept(run)}
    listed: set[str] = set()
    if path.is_file():
        try:
            listed = {
                one["checkpoint_dir_name"] for one in json.loads(path.read_text())["checkpoint_results"]
            }
        except (ValueError, KeyError, TypeError):
            path.unlink()
        if not listed <= folders.keys():
            path.unlink()
            listed = set()
    newest = True
    for name, folder in reversed(folders.items()):
        if name in listed or (newest and _whole(folder)):
            newest = False
        else:  # of what Ray does not know, one is enough to go on from
            shutil.rmtree(folder)


def _whole(folder: Path) -> bool:
    try:
        checkpoint.require_whole(folder)
    except checkpoint.Damaged:
        return False
    return True
