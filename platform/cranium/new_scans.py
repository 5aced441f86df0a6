"""Scans that no shard set holds -> the stacks that one would hold of them, made in this process.

They go the way of ingest with the preprocessing that a cell was trained on, so there is no other they could have. What
does not fit is refused: other contrasts than the cell's cohort has together, a scan that ingest would reject.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from cranium import cards, cohort, conform, provisions, sessions
from cranium.config import Fill, Frozen, Machine, UserError
from cranium.finished_cell import Trained
from cranium.volume import shard

# sub-1_ce-gad_T1w.nii.gz or T1w.nii
NAMED = re.compile(r"(?:.*_)?(?P<contrast>T1w|T2w|FLAIR|T1ce|PDw)\.nii(?:\.gz)?")


class Spec(Frozen):
    """What `cranium predict` takes beside the cell and machine facts."""

    scan: dict[str, Path] = Field(default_factory=dict)  # contrast -> file, of one session
    session: Path | None = None  # or a folder of one session: files named as in BIDS, `T1w.nii.gz` at least
    bids: Path | None = None  # or a BIDS tree: every session
    card: str = "bids"  # of datasets/: how the files of `bids` are found, their masks too
    mask: Path | None = None  # of the brain, on one of the scans' voxels; None: as the preprocessing finds it
    out: Path = Path("predictions")


@dataclass(frozen=True)
class Refused:
    """A session that was not predicted, and why."""

    subject: str
    session: str
    code: str
    reason: str


@dataclass(frozen=True)
class Seen:
    """A session as a shard set would hold it: its row groups' stacks uint8 [n, C, S, H, W], its row of the table."""

    groups: tuple[NDArray[Any], ...]
    row: Mapping[str, Any]

    @property
    def stacks(self) -> NDArray[Any]:
        return np.concatenate(self.groups)

    @property
    def name(self) -> str:
        """What files about it are called."""
        subject, session = self.row["subject"], self.row["session"]
        return f"{subject}_ses-{session}" if session else str(subject)

    def filled(self, stacks: NDArray[Any], fill: Fill, shown: int = sessions.EVERY) -> Tensor:
        """Some of its stacks, with absent contrasts, and those not in the bits `shown`, as training saw them."""
        present = np.full(len(stacks), self.row["present"])
        return sessions.seen(torch.from_numpy(stacks.copy()), present, shown, fill)

    def contrasts(self, trained: Trained) -> tuple[str, ...]:
        return _of_bits(trained, int(self.row["present"]))


# ---- what is asked for ----------------------------------------------------------------------------------------------


def asked(trained: Trained, spec: Spec) -> tuple[list[dict[str, Any]], list[Refused]]:
    """What a task of ingest is handed, for each session that fits; and those that do not.

    Raises `UserError`: USAGE, CONTRASTS (nothing fits), AMBIGUOUS (a folder holds a contrast twice).
    """
    if sum(map(bool, (spec.scan, spec.session, spec.bids))) != 1:
        raise UserError("USAGE", "give one of scan.<contrast>=FILE, session=FOLDER and bids=FOLDER")
    if spec.bids:
        return _of_tree(trained, spec.bids, spec.card)
    files = spec.scan or _named(spec.session or Path())
    sources = {channel: conform.source(trained.ingest, channel) for channel in trained.shards["channels"]}
    if spec.session:  # may hold more than is looked at; of files named one by one none may be
        files = {contrast: path for contrast, path in files.items() if contrast in sources.values()}
    used = {channel: k for channel, k in sources.items() if k in files}
    if strange := sorted(files.keys() - sources.values()):
        raise UserError(
            "CONTRASTS", f"{trained.cell.path.name} does not look at {', '.join(strange)}; {_wanted(trained)}"
        )
    if reason := _misfit(trained, used):
        raise UserError("CONTRASTS", reason)
    mask = spec.mask and str(spec.mask.expanduser().absolute())
    scans = {c: (k, str(files[k].expanduser().absolute()), mask, None) for c, k in used.items()}
    name = Path(next(iter(scans.values()))[1]).name.removesuffix(".gz").removesuffix(".nii")
    if spec.session:
        name = name.rpartition("_")[0] or spec.session.absolute().name
    return [_session(name, "", scans)], []


def _session(subject: str, session: str, scans: Mapping[str, Any]) -> dict[str, Any]:
    return {"subject": subject, "session": session, "scans": scans} | {
        "segmentation": None,
        "values": {},
        "sizes": {},
    }


def _named(folder: Path) -> dict[str, Path]:
    """Contrast -> file below `folder`, by the last word of its name."""
    if not folder.is_dir():
        raise UserError("NO_RAW", f"{folder} is no folder; give that of one session, or bids= for a tree")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.nii*")):
        if not (parts := NAMED.fullmatch(path.name)):
            continue
        contrast = "T1ce" if parts["contrast"] == "T1w" and "_ce-" in path.name else parts["contrast"]
        if contrast in found:
            raise UserError(
                "AMBIGUOUS",
                f"{folder} holds {contrast} twice ({found[contrast].name}, {path.name}); name the files with "
                f"scan.{contrast}=FILE",
            )
        found[contrast] = path
    return found


def _of_tree(trained: Trained, folder: Path, card: str) -> tuple[list[dict[str, Any]], list[Refused]]:
    table = cohort.scan(cards.load_card(card), folder)
    fits: list[dict[str, Any]] = []
    refused: list[Refused] = []
    for session in table.sessions:
        found = conform.wanted(session, trained.ingest, {})["scans"]
        if reason := _misfit(trained, found):
            refused.append(Refused(session.subject, session.session, "CONTRASTS", reason))
            continue
        scans = {
            channel: (contrast, str(table.root / path), mask and str(table.root / mask), note)
            for channel, (contrast, path, mask, note) in found.items()
        }
        fits.append(_session(session.subject, session.session, scans))
    if not fits:
        raise UserError("CONTRASTS", f"no session of {folder} fits the cell: {refused[0].reason}")
    return fits, refused


def _misfit(trained: Trained, channels: Mapping[str, Any]) -> str:
    """Why a session with these channels is none that the cell could judge; empty when it is one."""
    every = list(trained.shards["channels"])
    if sessions.bits(list(channels), every) & trained.shown in trained.patterns:
        return ""
    return f"{' and '.join(channels) or 'nothing'} alone is not what the cell has learnt with; {_wanted(trained)}"


def _wanted(trained: Trained) -> str:
    together = sorted(trained.patterns, key=lambda bits: (-bits.bit_count(), bits))
    ways = (", ".join(f"scan.{c}=FILE" for c in _of_bits(trained, bits)) for bits in together)
    return f"give {' or '.join(ways)}"


def _of_bits(trained: Trained, bits: int) -> tuple[str, ...]:
    """The contrasts that fill the channels of these bits."""
    channels = trained.shards["channels"]
    return tuple(conform.source(trained.ingest, c) for i, c in enumerate(channels) if bits >> i & 1)


# ---- how it is read -------------------------------------------------------------------------------------------------


def read(trained: Trained, machine: Machine, session: Mapping[str, Any], work: Path) -> Seen:
    """Ingest one session into `work`. Raises `UserError(REJECTED)`."""
    spec = trained.ingest
    supplied = all(mask for _, _, mask, _ in session["scans"].values())
    ways = provisions.mask_ways(spec.mask, stripped=trained.shards["card"]["stripped"], all_supplied=supplied)
    needs = provisions.provide(spec, ways, machine, work / "provisions")
    job = conform.Job("predict", Path("/"), work, spec, {}, needs)
    Path(str(job.work)).mkdir(parents=True, exist_ok=True)
    conform.session({"index": 0, "session": json.dumps(session)}, job)
    record = json.loads(Path(str(job.record(0))).read_text())
    if record["rejected"] or not record["row_groups"]:
        told = "; ".join(
            f"{contrast}: {code}, {reason}" for *_, contrast, _, code, reason in record["rejected"]
        )
        raise UserError("REJECTED", f"{session['subject']} cannot be used: {told}", 3)
    tables = [shard.read_row_group(Path(str(job.part(0))), i) for i in range(len(record["row_groups"]))]
    return Seen(tuple(shard.pixels(table) for table in tables), record["session"])
