"""The health page of a pretraining, made from its folder: while it goes on, when it stops, and at its end.

What is known of the run is `course`'s; what is an alarm, `dinov2.health`'s; how it looks, `figures.health`'s. The page
holds no pictures and no names of subjects.
"""

from __future__ import annotations

import hashlib
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import cranium
from cranium import monitor, store, track
from cranium.config import Experiment, Pretrain, Stream, UserError, to_yaml
from cranium.course import Course, limits, plan
from cranium.dinov2 import health
from cranium.figures import page
from cranium.figures.health import Vitals, sections, with_tables
from cranium.figures.page import Section, Table
from cranium.reading import share
from cranium.store import Artefact
from cranium.watch import repeatedly

PAGE = "health.html"
SHARE = 0.02  # of the time of a running pretraining that pages of it may take
EVERY = 2.0  # seconds between two looks for something new
SICK = ("COLLAPSED", "UNIFORM", "FEATURES", "RANK")  # alarms of the method itself
NONE = "\u2013"

WORDS = {"monitor/knn_position": "height of the slice", "monitor/knn_contrast": "contrast"}


# ---- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def kept(made: Artefact, exp: Experiment, init: str, shard_sets: Sequence[Artefact]) -> Iterator[None]:
    """Keep the page of a run that the body makes: with every checkpoint and look, in a share of the time; at its end.

    However the body ends, a last page is written, which says why if it ended early.
    """
    seen: set[Path] = set()
    due = 0.0

    def refresh() -> None:
        nonlocal seen, due
        now = {*made.path.glob("ray/checkpoint_*"), *made.path.glob(f"{monitor.FOLDER}/*/{monitor.MEASURED}")}
        if now != seen and time.monotonic() >= due:
            started, seen = time.monotonic(), now
            write(Course(made, exp, init, tuple(shard_sets)))
            due = time.monotonic() + (time.monotonic() - started) / SHARE

    try:
        with repeatedly(refresh, EVERY):
            yield
    except BaseException as error:
        try:
            write(Course(made, exp, init, tuple(shard_sets), _why(error), isinstance(error, Exception)))
        except Exception:
            traceback.print_exc()  # into the log: the error that ended the run must not hide behind this one
        raise
    write(Course(made, exp, init, tuple(shard_sets)))


def _why(error: BaseException) -> str:
    if isinstance(error, UserError):
        return f"{error.code}: {error}"
    if isinstance(error, Exception):
        return f"it failed with {type(error).__name__}; the log has the whole of it"
    return "it was asked to stop; the same command goes on from the last checkpoint"


def stamp(made: Artefact) -> str:
    """What identifies the state of a finished run; a page that bears another one is out of date."""
    if not made.done:
        return "in progress"
    return hashlib.sha256((made.path / store.MANIFEST).read_bytes()).hexdigest()[:16]


def current(made: Artefact) -> bool:
    """Whether the page is there and shows the run as it is now."""
    try:
        with (made.path / PAGE).open(encoding="utf-8") as file:
            return f'name="pretraining" content="{stamp(made)}"' in file.read(2000)
    except OSError:
        return False


def write(found: Course) -> Path:
    """Write the page, whole or not at all; returns its path."""
    tone, verdict = _verdict(found)
    values = {
        "stamp": stamp(found.made),
        "name": found.made.path.name,
        "title": f"{found.init}, {found.spec.arch}",
        "source": f"{found.exp.name}: {found.exp.asks}" if found.exp.asks else found.exp.name,
        "tone": tone,
        "verdict": verdict,
        "answer": _answer(found),
        "alarms": [
            {"code": alarm.code, "when": _when(found, alarm), "seen": alarm.seen, "mend": alarm.mend}
            for alarm in found.alarms
        ],
        "facts": _facts(found),
        "sections": [*_drawn(found), _settings(found), _provenance(found)],
        "documents": [("The resolved config", to_yaml(found.exp))],
    }
    html = page.render(share() / "dashboards" / "health.html.j2", values)
    out = found.made.path / PAGE
    part = out.with_name(f".{out.name}.{os.getpid()}")
    part.write_text(html, encoding="utf-8")
    os.replace(part, out)
    return out


# ---- words ----------------------------------------------------------------------------------------------------------


def _verdict(found: Course) -> tuple[str, str]:
    """(good | warn | bad, the line at the top)."""
    state = f"{found.done:,} of {found.spec.steps:,} steps"
    if not found.entries:
        return "warn", "Stopped before a step was logged" if found.stopped else "No step is logged yet"
    sick = [alarm for alarm in found.alarms if alarm.code in SICK and alarm.last == found.entries[-1].step]
    tone = "bad" if sick or found.failed else "warn" if found.alarms else "good"
    if found.stopped:
        return tone, f"Stopped after {state}" + (
            "" if tone == "good" else ", and not healthy" if sick else ""
        )
    words = {"bad": "Not healthy", "warn": "To be looked at", "good": "Healthy"}[tone]
    return tone, f"{words}{'' if found.made.done else ' so far'}: {state}"


def _answer(found: Course) -> list[str]:
    said = []
    if found.stopped:
        said.append(found.stopped[0].upper() + found.stopped[1:] + ".")
    if found.entries and not found.alarms:
        said.append("No alarm: targets, features, gradients and the wait for data are as they should be.")
    changes = [
        f"{WORDS.get(key, key.removeprefix('monitor/').replace('_', ' '))} {series[max(series)]:.2f} "
        f"(un-adapted {series[0]:.2f})"
        for key, series in found.looks.items()
        if 0 in series and max(series) > 0
    ]
    if changes:
        said.append(f"What a frozen probe reads, at the last look: {', '.join(changes)}.")
    if resumes := [f"{step:,}" for step in found.resumes]:
        said.append(
            f"Taken up again at step {', '.join(resumes)}, which every figure marks (\u25b2); what had been logged "
            "beyond is void."
        )
    return said


def _when(found: Course, alarm: health.Alarm) -> str:
    if alarm.code == "SPIKE":
        return (
            f"step {alarm.step:,}" if alarm.step == alarm.last else f"steps {alarm.step:,} to {alarm.last:,}"
        )
    if alarm.last == found.entries[-1].step:
        return f"from step {alarm.step:,} on"
    return f"steps {alarm.step:,} to {alarm.last:,}, over since"


def _facts(found: Course) -> list[tuple[str, str]]:
    rate, wait = found.median("sys/stacks_per_second"), found.median("sys/data_wait_share")
    rows = sum(int(shards.manifest()["counts"]["stacks"]) for shards in found.shard_sets)
    seen = found.done * found.spec.batch_size
    losses = [entry.metrics["train/loss"] for entry in found.entries if "train/loss" in entry.metrics]
    facts = [
        ("stacks seen", f"{seen:,}"),
        ("passes", f"{seen / rows:.1f}"),
        ("loss", f"{losses[-1]:.2f}" if losses else NONE),  # a step that was skipped has none
        ("stacks a second", (f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}") if rate else NONE),
        ("waiting for data", f"{wait:.1%}" if wait is not None else NONE),
        ("restarts", f"{len(found.resumes)}"),
    ]
    if rate and not found.made.done and not found.stopped:
        hours = (found.spec.steps - found.done) * found.spec.batch_size / rate / 3600
        facts.append(("still to go, about", f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"))
    return facts


# ---- what is drawn --------------------------------------------------------------------------------------------------


def _drawn(found: Course) -> list[Section]:
    channels = len(found.shard_sets[0].manifest()["channels"])
    chance = {"position": 1 / monitor.BINS, "contrast": 1 / channels}
    drawn = sections(
        Vitals(
            init=found.init,
            steps=found.spec.steps,
            history=found.history,
            looks=found.looks,
            lost_looks=found.lost_looks,
            chance=defaultdict(lambda: 0.5, chance),
            plan=plan(found.spec),
            alarms={alarm.code: (alarm.step, alarm.last) for alarm in found.alarms},
            resumes=found.resumes,
            limits=limits(found.spec),
        )
    )
    return [*drawn[:-1], with_tables(drawn[-1], _attempts(found))]


def _attempts(found: Course) -> Table:
    rows = tuple((a.name, a.resume, a.last, a.entries, _utc(a.began), _utc(a.ended)) for a in found.attempts)
    return Table(
        ("attempt", "first step", "last logged step", "entries", "from", "to"), rows, "starts of this run"
    )


def _utc(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d\u00a0%H:%M\u00a0UTC")


def _settings(found: Course) -> Section:
    """What of `pretrain` and `stream` is not the default."""
    ours = {
        "pretrain": found.spec.model_dump(mode="json"),
        "stream": found.exp.stream.model_dump(mode="json"),
    }
    defaults = {
        "pretrain": Pretrain(cohorts=found.spec.cohorts).model_dump(mode="json"),
        "stream": Stream().model_dump(mode="json"),
    }
    usual = track.flatten(defaults)
    rows = tuple(
        (name, value, usual.get(name, ""))
        for name, value in track.flatten(ours).items()
        if value != usual.get(name) and name != "pretrain.inits"
    )
    text = "Those that are not the defaults. What lies under compute shapes no result."
    table = Table(("setting", "this run", "default"), rows, "settings")
    return Section("settings", "Settings", (text,), (), (table,))


def _provenance(found: Course) -> Section:
    facts: list[tuple[object, ...]] = [
        ("folder", found.made.id),
        ("state", "finished" if found.made.done else "not finished"),
        ("as of", _utc(found.entries[-1].time) if found.entries else "nothing logged"),
        *(
            (f"first weights: {key}", track.plain(value))
            for key, value in found.start.items()
            if value not in (None, "", [])
        ),
        ("continues", found.spec.continue_from or "no other run"),
        ("Cranium that drew this", cranium.__version__),
    ]
    for shards in found.shard_sets:
        manifest = shards.manifest()
        facts.append(
            (f"shards of {manifest['cohort']}", f"{shards.id}, {manifest['counts']['stacks']:,} stacks")
        )
    manifest = found.shard_sets[0].manifest()
    facts += [
        ("channels", ", ".join(manifest["channels"])),
        ("preprocessing", manifest["preprocessing_hash"]),
    ]
    if found.made.done:
        facts.append(("weights of the teacher, SHA-256", found.made.manifest()["weights_sha256"]))
    table = Table(("what", "value"), tuple(facts), "provenance")
    return Section("provenance", "Provenance", (), (), (table,))
