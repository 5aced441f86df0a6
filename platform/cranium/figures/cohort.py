"""The quality page of a cohort: what was found, what was turned away and why, and what to look at first.

Made from the shard set alone. Statistics come from `sessions.parquet`; pixels are read for a bounded number of
sessions, so that a page of thousands takes seconds. The same shard set gives the same page.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import corpus, mosaic, outliers, remedies, spread
from .page import Section, Table, render

PAGE = "quality.html"
WORST, RANDOM = 24, 12  # sessions whose pictures are shown
EXAMPLES = 4  # paths named for a code
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Survey:
    """A cohort with its scores: what every section is made from."""

    cohort: corpus.Cohort
    scores: outliers.Scores

    @cached_property
    def counts(self) -> dict[str, int]:
        return {key: int(value) for key, value in self.cohort.manifest["counts"].items()}

    @cached_property
    def names(self) -> list[str]:
        """Subject and session of every row, as shown."""
        table = self.cohort.sessions
        pairs = zip(table["subject"].astype(str), table["session"].astype(str), strict=True)
        return [f"{subject} / {session}" if session else subject for subject, session in pairs]

    @cached_property
    def flagged(self) -> list[bool]:
        """Whether a session is called an outlier; none is in a cohort too small for the score to mean it."""
        enough = len(self.names) >= outliers.ENOUGH
        return [enough and bool(value >= outliers.FLAGGED) for value in self.scores.score]

    @cached_property
    def notes(self) -> list[tuple[str, str, str, str]]:
        """Every note of an accepted scan: code, session, contrast, reason."""
        found = []
        for name, text in zip(self.names, self.cohort.sessions["warnings"], strict=True):
            found += [(n["code"], name, n["contrast"], n["reason"]) for n in json.loads(text)]
        return found


def stamp(folder: Path) -> str:
    """What identifies the state of a shard set; a page that bears another one is out of date."""
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()[:16]


def current(folder: Path) -> bool:
    """Whether the page is there and shows the shard set as it is now."""
    try:
        with (folder / PAGE).open(encoding="utf-8") as file:
            return f'name="shard-set" content="{stamp(folder)}"' in file.read(2000)
    except OSError:
        return False


def write(folder: Path, template: Path, progress: Progress | None = None) -> Path:
    """Make `quality.html` beside the manifest of a finished shard set; returns its path."""
    tell = progress or (lambda done, total, text: None)
    cohort = corpus.read(folder)
    cohort = corpus.Cohort(
        folder,
        cohort.manifest,
        cohort.sessions.sort_values(["subject", "session"], kind="stable").reset_index(drop=True),
        cohort.rejected,
    )
    measures = [json.loads(text) for text in cohort.sessions["measures"]]
    survey = Survey(cohort, outliers.score(outliers.measured(measures, cohort.channels)))
    steps = WORST + RANDOM
    worst, others = _mosaics(survey, lambda done: tell(done, steps, f"{cohort.name}: pictures"))
    values = {
        "stamp": stamp(folder),
        "title": str(cohort.manifest["card"].get("title") or cohort.name),
        "name": cohort.name,
        "source": _source(cohort.manifest),
        "stamps": _stamps(survey),
        "answer": _answer(survey),
        "flow": survey.counts,
        "expected": _expected(survey),
        "worst": worst,
        "others": others,
        "legend": _legend(cohort.manifest),
        "flagged_from": outliers.FLAGGED,
        "sections": [
            _rejected(survey),
            _noted(survey),
            *spread.sections(cohort, measures),
            _sessions(survey),
        ],
        "documents": _documents(cohort.manifest),
    }
    out = folder / PAGE
    part = out.with_name(f".{out.name}.{os.getpid()}")
    part.write_text(render(template, values), encoding="utf-8")
    os.replace(part, out)
    return out


# ---- words ----------------------------------------------------------------------------------------------------------


def _source(manifest: Mapping[str, Any]) -> str:
    card = manifest["card"]
    return " · ".join(str(card[key]) for key in ("citation", "licence") if card.get(key))


def _stamps(survey: Survey) -> list[str]:
    manifest = survey.cohort.manifest
    stamps = []
    if manifest.get("simulated"):
        stamps.append("simulated")
    if survey.counts["rejected"]:
        stamps.append(f"{survey.counts['rejected']} of {survey.counts['scans']} scans rejected")
    if any(survey.flagged):
        stamps.append(
            _many(sum(survey.flagged), "session") + f" with a score of {outliers.FLAGGED:g} or more"
        )
    fallback = sum(code == "MASK_FALLBACK" for code, *_ in survey.notes)
    if fallback:
        stamps.append(_many(fallback, "brain mask") + " by a fallback")
    return stamps


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _answer(survey: Survey) -> list[str]:
    n = survey.counts
    first = (
        f"{_many(n['scans'], 'scan')} found: {n['accepted']:,} accepted as they are, {n['warned']:,} accepted with "
        f"a note, {n['rejected']:,} rejected. They make {_many(n['stacks'], 'slice stack')} of "
        f"{_many(n['sessions'], 'session')} of {_many(n['subjects'], 'subject')}."
    )
    worst = survey.scores.order[0]
    if n["sessions"] < outliers.ENOUGH:
        return [first, f"With fewer than {outliers.ENOUGH} sessions the outlier score only orders them."]
    if not any(survey.flagged):
        return [
            first,
            f"No session has a score of {outliers.FLAGGED:g} or more; all lie close to the median.",
        ]
    why = survey.scores.reasons[worst]
    return [first, f"Furthest from the rest: {survey.names[worst]}: {'; '.join(why)}."]


def _expected(survey: Survey) -> list[tuple[str, int, int]]:
    """(what, found, expected) where the card says how many there are."""
    expected = survey.cohort.manifest["card"].get("expected") or {}
    return [
        (what, survey.counts[what], int(number))
        for what, number in expected.items()
        if what in survey.counts and isinstance(number, int)
    ]


def _documents(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    parts = {"The preprocessing": manifest["preprocessing"], "The card of the cohort": manifest["card"]}
    shown = [(name, json.dumps(part, indent=1, ensure_ascii=False)) for name, part in parts.items()]
    facts = {
        key: manifest.get(key)
        for key in ("preprocessing_hash", "code_version", "recipe", "channels", "shape")
    }
    return [*shown, ("The shard set", json.dumps(facts, indent=1))]


def _legend(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Classes of the label maps and their colours."""
    tints = mosaic.LABELS
    return [
        (name, "#{:02x}{:02x}{:02x}".format(*tints[k % len(tints)]))
        for k, name in enumerate(manifest["card"].get("segmentation") or {})
    ]


# ---- pictures -------------------------------------------------------------------------------------------------------


def _mosaics(survey: Survey, step: Callable[[int], None]) -> tuple[list[mosaic.Card], list[mosaic.Card]]:
    """The worst sessions, worst first; and some of the others, drawn by a hash of their names."""
    order = survey.scores.order
    worst, rest = order[:WORST], order[WORST:]

    def lot(row: int) -> str:
        return hashlib.sha256(survey.names[row].encode()).hexdigest()

    others = sorted(sorted(rest, key=lot)[:RANDOM])
    where = mosaic.groups(survey.cohort.folder, survey.cohort.manifest)
    table, presence = survey.cohort.sessions, survey.cohort.presence
    cards = []
    for done, row in enumerate([*worst, *others], 1):
        key = (str(table["subject"].iloc[row]), str(table["session"].iloc[row]))
        value = float(survey.scores.score[row])
        pictures = mosaic.pictures(where[key], survey.cohort.channels, presence[row])
        why = survey.scores.reasons[row]
        cards.append(mosaic.Card(survey.names[row], f"{value:.1f}", pictures, why, survey.flagged[row]))
        step(done)
    return cards[: len(worst)], cards[len(worst) :]


# ---- tables ---------------------------------------------------------------------------------------------------------


def _rejected(survey: Survey) -> Section:
    table = survey.cohort.rejected
    if not len(table):
        return Section("rejected", "Rejected scans", ("No scan was rejected.",))
    rows: list[tuple[object, ...]] = []
    for code, number in Counter(table["code"].astype(str)).most_common():
        here = table[table["code"] == code]
        paths = ", ".join(here["path"].astype(str)[:EXAMPLES]) + (" …" if number > EXAMPLES else "")
        rows.append((code, number, remedies.meaning(code), remedies.remedy(code), paths))
    every = Table(
        tuple(str(c) for c in table.columns),
        tuple(tuple(str(cell) for cell in row) for row in table.itertuples(index=False)),
        f"every rejected scan ({len(table):,})",
    )
    summary = Table(
        ("code", "scans", "what it means", "what to do", "for example"), tuple(rows), "rejections"
    )
    text = "Every scan that was found and not used, with one code each. The rest of the cohort is not touched by them."
    return Section("rejected", "Rejected scans", (text,), (), (summary,), (every,))


def _noted(survey: Survey) -> Section:
    notes = survey.notes
    general = tuple(str(note) for note in survey.cohort.manifest.get("notes", ()))
    if not notes and not general:
        return Section("notes", "Notes", ("Nothing odd was noted about the accepted scans.",))
    rows: list[tuple[object, ...]] = []
    for code, number in Counter(code for code, *_ in notes).most_common():
        here = [f"{name} {contrast}: {reason}" for c, name, contrast, reason in notes if c == code]
        rows.append(
            (code, number, remedies.meaning(code), "; ".join(here[:2]) + (" …" if number > 2 else ""))
        )
    tables = (Table(("code", "scans", "what it means", "for example"), tuple(rows), "notes"),) if rows else ()
    every = Table(("code", "session", "contrast", "reason"), tuple(notes), f"every note ({len(notes):,})")
    text = "Odd, and accepted all the same. A scan may have several notes."
    return Section("notes", "Notes", (text, *general), (), tables, (every,) if notes else ())


def _sessions(survey: Survey) -> Section:
    table, scores = survey.cohort.sessions, survey.scores
    site = [None if v is None or v != v else str(v) for v in table["site"]] if "site" in table else None
    shown = [m for m in scores.measures if not m.name.endswith(("skew", "tail"))]
    rows, channels, presence = [], survey.cohort.channels, survey.cohort.presence
    for row in scores.order:
        present = " ".join(c for c, there in zip(channels, presence[row], strict=True) if there)
        numbers = (_cell(measure, float(measure.values[row])) for measure in shown)
        place = () if site is None else (site[row],)
        slices = int(table["num_slices"].iloc[row])
        head = (survey.names[row], f"{scores.score[row]:.1f}", "; ".join(scores.reasons[row]))
        rows.append((*head, *place, present, slices, *numbers))
    names = ("session", "score", "why", *(() if site is None else ("site",)), "contrasts", "slices")
    columns = (*names, *(f"{m.name}{f', {m.unit}' if m.unit else ''}" for m in shown))
    text = (
        "Highest score first. The score is the greatest distance from the cohort's median over all measures, each in "
        "robust standard deviations (docs/quality.md); the table as CSV sorts by anything else."
    )
    full = Table(columns, tuple(rows), "sessions")
    return Section("sessions", "All sessions", (text,), (), (full,))


def _cell(measure: outliers.Measure, value: float) -> float | int | None:
    if not np.isfinite(value):
        return None
    return round(value) if measure.unit else round(value, 3)
