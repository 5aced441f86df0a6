"""A step whose loss or gradient was not finite, written down: which rows it was made of, and what it found. No pixels.

`<run>/nonfinite/<step>.json`. With it and the checkpoint it follows the step can be done again (`pretrain.replay`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cranium import store
from cranium.config import UserError
from cranium.corpora import Corpus
from cranium.volume import plan, shard, window

FOLDER = "nonfinite"


@dataclass(frozen=True)
class Capture:
    step: int  # of the stream, from 0: so many were done before
    seed: int
    workers: int
    checkpoint: int  # the steps of the last checkpoint before
    skipped: bool  # its update was left out, and the run went on
    terms: Mapping[str, float]  # losses and gradient norms by name
    rows: tuple[Mapping[str, Any], ...]  # of the global batch, in its order: cohort, subject, session, slice

    @property
    def wrong(self) -> list[str]:
        """Names of what is not finite."""
        return [name for name, value in self.terms.items() if not math.isfinite(value)]


def write(run: Path, capture: Capture) -> Path:
    content = asdict(capture)
    # JSON has no NaN and no infinity.
    content["terms"] = {name: v if math.isfinite(v) else str(v) for name, v in capture.terms.items()}
    path = run / FOLDER / f"{capture.step:08}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_atomic(path, json.dumps(content, indent=1) + "\n")
    return path


def read(path: Path) -> Capture:
    """What `write` wrote. Raises `UserError(CAPTURE)`."""
    try:
        content = json.loads(path.read_text())
        terms = {name: float(value) for name, value in content["terms"].items()}
        return Capture(**{**content, "terms": terms, "rows": tuple(content["rows"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{path} is no capture of a step ({error})"
        raise UserError("CAPTURE", f"{reason}; give a file of <run>/{FOLDER}/") from None


def ended(run: str, path: Path) -> UserError:
    """The error of a run that this captured step has ended."""
    found = read(path)
    return UserError(
        "NOT_FINITE",
        f"step {found.step} (seed {found.seed}) made {', '.join(found.wrong)} not finite; nothing of it entered the "
        f"weights. Its rows are in {path}; the same command with replay={path} does the step again and says where it "
        f"begins. To go on from here: pretrain.continue_from={run} with a lower pretrain.optimiser.lr, "
        "pretrain.precision=fp32 or pretrain.nonfinite=skip",
        exit_code=1,
    )


def rows(corpus: Corpus, order: plan.Order, step: int) -> Iterator[dict[str, Any]]:
    """Whose slices the global batch of a step is made of, in its order, from the plan and the shards' columns."""
    number, within = plan.locate(corpus.sessions, order, step)
    epoch = plan.epoch(corpus.sessions, order, number)
    slices: dict[plan.RowGroup, list[int]] = {}
    for index, lane in enumerate(epoch.lanes):
        steps = window.lane_steps(corpus.sessions, lane, order, number, index)
        found = next(islice(steps, within, None))
        for visit, row in zip(found.visits, found.rows, strict=True):
            session = corpus.sessions[int(lane.session[visit])]
            group = session.row_groups[int(lane.group[visit])]
            if group not in slices:
                slices[group] = shard.read_row_group(group.file, group.index, ["slice"])["slice"].to_pylist()
            who = {"cohort": session.cohort, "subject": session.subject, "session": session.session}
            yield {**who, "slice": slices[group][row]}
