"""The part of a report that says what was searched for, what it cost, and what won in every cell."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cranium.figures.page import Section, Table
from cranium.tasks.comparison import rank

TEXT = (
    "Settings were searched for in every cell by itself, inside its own labelled subjects: Optuna proposes (the "
    "declared recipe first), ASHA ends what falls behind, validation subjects taken from the labelled ones choose. The "
    "cell was then fitted with the winner and judged once. Every initialisation had the same number of trials a cell, "
    "and winners of its own.",
    "An AUROC here is of validation subjects and the best of many, so it is too high, and no result. The same subjects "
    "choose the settings and the epoch.",
)
SPENT = ("trials", "ended_early", "diverged", "epochs")


def section(folders: Sequence[Path]) -> list[Section]:
    """None where no cell was searched for. What was spent by initialisation, and the winner of each cell, folded."""
    found = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    found = [manifest for manifest in found if manifest.get("search")]
    if not found:
        return []
    found.sort(key=lambda m: _place(m["cell"]))
    return [Section("search", "Search for settings", TEXT, (), (_spent(found),), (_winners(found),))]


def _place(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    order = (
        cell[key] for key in ("adaptation", "stack", "contrasts", "label_fraction", "scheme", "fold", "seed")
    )
    return (cell["task"], rank(cell["init"]), *order)


def _spent(found: Sequence[Mapping[str, Any]]) -> Table:
    groups: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for manifest in found:
        cell = manifest["cell"]
        groups[cell["task"], cell["init"], cell["adaptation"], cell["stack"]].append(manifest["search"])
    rows: list[tuple[object, ...]] = []
    for group, searches in groups.items():
        each = sorted({search["trials"] for search in searches})
        sums = (sum(search.get(key, 0) for search in searches) for key in SPENT)
        rows.append((*group, len(searches), " or ".join(map(str, each)), *sums))
    columns = (
        "task",
        "init",
        "adaptation",
        "stack",
        "cells",
        "trials of a cell",
        "trials",
        "ended early",
        "diverged",
        "epochs",
    )
    return Table(columns, tuple(rows), "what was spent")


def _winners(found: Sequence[Mapping[str, Any]]) -> Table:
    names = sorted({name for manifest in found for name in manifest["search"].get("settings", {})})
    rows: list[tuple[object, ...]] = []
    for manifest in found:
        cell, search = manifest["cell"], manifest["search"]
        where = (
            cell["task"],
            cell["init"],
            cell["adaptation"],
            cell["stack"],
            " + ".join(cell["contrasts"]),
            f"{100 * cell['label_fraction']:g} %",
            cell["scheme"],
        )
        settings = search.get("settings", {})
        won = "as declared: nobody to spare" if not search["trials"] else f"trial {search['winner']}"
        scores = (search.get("declared_validation_auroc"), search.get("validation_auroc"))
        shown = (settings.get(name, "") for name in names)
        rows.append(
            (*where, cell["fold"], cell["seed"], manifest["counts"]["n_validation"], won, *scores, *shown)
        )
    columns = ("task", "init", "adaptation", "stack", "learnt from", "labels", "grouped by", "fold", "seed",
               "n select", "won", "declared, AUROC", "winner, AUROC", *names)  # fmt: skip
    return Table(columns, tuple(rows), "winners")
