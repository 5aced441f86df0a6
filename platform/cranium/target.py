"""What a command is about: the file it is given, with its cards and its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cranium import config, reading
from cranium.cards import Card, load_card
from cranium.config import Experiment, Machine, UserError


@dataclass(frozen=True)
class Target:
    """What a command is about: an experiment with its cards, and where it happens."""

    path: Path
    exp: Experiment
    cards: dict[str, Card]
    machine: Machine


def read_target(path: Path, settings: Sequence[str] | None) -> Target:
    """Read an experiment, or make a small one of a cohort's card: `ingest datasets/adni.yaml raw=DIR`."""
    settings, path = list(settings or ()), _shipped(path)
    content = reading.read_yaml(path)
    if "layouts" in content or "access" in content:
        card = load_card(path)
        settings = [
            f"raw.{card.name}={s.removeprefix('raw=')}" if s.startswith("raw=") else s for s in settings
        ]
        facts, keys = parted(settings)
        return Target(
            path, reading.experiment_of(card.name, keys), {card.name: card}, reading.load_machine(facts)
        )
    facts, keys = parted(settings)
    exp = reading.load_experiment(path, keys)
    folder = reading.share(path) / "datasets"
    cards = {name: load_card(name, folder) for name in exp.ingest.cohorts}
    return Target(path, exp, cards, reading.load_machine(facts))


def parted(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings that are machine facts, and the others."""
    facts = [s for s in settings if reading.is_machine_key(s)]
    return facts, [s for s in settings if not reading.is_machine_key(s)]


def _shipped(path: Path) -> Path:
    """The given file, or the one of that name that came with the package."""
    return shipped if not path.exists() and (shipped := reading.share() / path).is_file() else path


def labels_exist(target: Target) -> None:
    """Raises `UserError(CONFIG)` when a task asks for what a cohort's card does not declare."""
    for task in target.exp.adapt.tasks if target.exp.adapt else ():
        for cohort in (task.cohort, *task.external):
            if unknown := _undeclared(task, target.cards[cohort]):
                raise UserError(
                    "CONFIG", f"{target.path}: task {task.name}: the card of {cohort} declares no {unknown}"
                )


def _undeclared(task: config.Task, card: Card) -> str:
    """What a task needs and a card does not declare, in words; empty when all is there."""
    match task:
        case config.Classification():
            if task.label not in card.labels:
                return f"label {task.label}"
            unknown = set(task.classes) - set(card.labels[task.label].classes)
            return f"classes {sorted(unknown)} of {task.label}" if unknown else ""
        case config.Segmentation():
            unknown = {name for parts in task.classes.values() for name in parts} - set(card.segmentation)
            return f"classes {sorted(unknown)} under segmentation" if unknown else ""
