"""The health page of a pretraining: its figures, from plain values. What is an alarm is decided elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import style, traces
from .page import Plate, Section, Table
from .traces import Bound, Panel, Series

NAMES = {
    "train/loss": "loss",
    "train/dino_global": "DINO, global crops",
    "train/dino_local": "DINO, local crops",
    "train/ibot": "iBOT, masked patches",
    "train/koleo": "KoLeo",
    "train/target_entropy": "entropy, nats",
    "train/prototypes_used": "share of the prototypes",
    "train/feature_std": "standard deviation",
    "train/effective_rank": "effective rank",
    "train/lr": "learning rate",
    "train/weight_decay": "weight decay",
    "train/momentum": "teacher momentum",
    "train/teacher_temperature": "teacher temperature",
    "train/grad_norm_backbone": "backbone",
    "train/grad_norm_dino_head": "DINO head",
    "train/grad_norm_ibot_head": "iBOT head",
}
TERMS = ("train/dino_global", "train/dino_local", "train/ibot", "train/koleo")
RATES = ("train/lr", "train/weight_decay", "train/momentum", "train/teacher_temperature")
CONTROLS = {"position": "height of the slice", "contrast": "contrast"}
MODULES = ("train/grad_norm_backbone", "train/grad_norm_dino_head", "train/grad_norm_ibot_head")


@dataclass(frozen=True)
class Limits:
    """What the signs of collapse can reach, and where they alarm; `None` where there is no such level."""

    entropy: float  # log of the prototypes
    collapsed: float
    uniform: float
    prototypes: float  # largest share of them that one batch can use
    spread: float  # standard deviation of unit features that use every direction
    flat: float
    rank: float
    line: float
    clip: float
    starved: float


@dataclass(frozen=True)
class Vitals:
    """Metrics by step, and what they are read against.

    history: of the training, metric -> step -> value. looks: the same of the looks at the teacher, step 0 being the
    backbone it started from. lost_looks: step -> why a look failed. chance: what a look asks for -> what guessing
    gives. plan: metric -> what the settings say of every step. alarms: code -> steps between which it held. resumes:
    steps at which an attempt took up the run.
    """

    init: str
    steps: int
    history: Mapping[str, Series]
    looks: Mapping[str, Series]
    lost_looks: Mapping[int, str]
    chance: Mapping[str, float]
    plan: Mapping[str, Series]
    alarms: Mapping[str, tuple[int, int]]
    resumes: Sequence[int]
    limits: Limits


def sections(vitals: Vitals) -> list[Section]:
    """Probes, signs of collapse, losses, gradients and schedules, speed: what there is of each."""
    return [_looks(vitals), _collapse(vitals), _losses(vitals), _optimiser(vitals), _speed(vitals)]


def _plate(
    vitals: Vitals, title: str, caption: str, panels: Sequence[Panel], tints: Sequence[str] = ()
) -> Plate | None:
    panels = [panel for panel in panels if any(panel.lines.values())]
    if not panels:
        return None
    several = len(panels) > 1
    named = {
        (f"{panel.title}, {name}" if several and name != panel.title and len(panel.lines) > 1 else panel.title)
        if several else name: series
        for panel in panels
        for name, series in panel.lines.items()
    }  # fmt: skip
    picture = traces.draw(
        panels, vitals.steps, vitals.resumes, title, tints or (style.colour(vitals.init), *style.SPARE)
    )
    return Plate(title, caption, picture, (traces.table(named, title.lower()),))


def _one(vitals: Vitals, key: str, **more: object) -> Panel:
    name = NAMES.get(key, key)
    return Panel(name, {name: vitals.history.get(key, {})}, **more)  # type: ignore[arg-type]


def _held(vitals: Vitals, *codes: str) -> tuple[tuple[int, int], ...]:
    return tuple(vitals.alarms[code] for code in codes if code in vitals.alarms)


def _kept(*plates: Plate | None) -> tuple[Plate, ...]:
    return tuple(plate for plate in plates if plate)


def _looks(vitals: Vitals) -> Section:
    title = "What the teacher knows"
    lost = tuple(f"The look at step {step:,} failed: {why}" for step, why in vitals.lost_looks.items())
    if not vitals.looks:
        text = (
            "No probe has looked at this teacher: pretrain.compute.monitor names a cohort to look at. Without one, no "
            "sign of collapse is all that this page can say."
        )
        return Section("probes", title, lost or (text,))
    groups: dict[str, dict[str, Series]] = {}
    for key, series in vitals.looks.items():
        how, _, what = key.removeprefix("monitor/").partition("_")
        groups.setdefault(what, {})[{"knn": "k-NN", "linear": "linear probe"}.get(how, how)] = series
    panels = {
        what: Panel(CONTROLS.get(what, what), lines, (Bound(vitals.chance[what], "chance"),), looks=True)
        for what, lines in groups.items()
    }
    dashed = "Dashed: the backbone before its first step" if any(0 in s for s in vitals.looks.values()) else (
        "No look was taken before the first step"
    )  # fmt: skip
    controls = _plate(
        vitals,
        "Positive control",
        "Balanced accuracy of k-NN, subjects held out: in which fifth of the head a slice lies, and which contrast it "
        f"is. {dashed}. A backbone that learns anatomy reads both; one that reads less than before loses what it had.",
        [panel for what, panel in panels.items() if what in CONTROLS],
    )
    labels = _plate(
        vitals,
        "Labels of the monitoring cohort",
        f"AUROC by subject, features averaged over slices. {dashed}.",
        [panel for what, panel in panels.items() if what not in CONTROLS],
    )
    text = "Frozen CLS features of the teacher on a cohort that no task tests on, while training goes on."
    return Section("probes", title, (text, *lost), _kept(controls, labels))


def _collapse(vitals: Vitals) -> Section:
    limits = vitals.limits
    entropy = _plate(
        vitals,
        "Entropy of the teacher's targets",
        "Nats. Near 0 all images get one prototype; near log K no target says anything, which is right only at "
        "the start. What lies between is learned from.",
        [
            _one(
                vitals,
                "train/target_entropy",
                bounds=(
                    Bound(limits.entropy, "log K"),
                    Bound(limits.uniform, "", alarm=True),
                    Bound(limits.collapsed, "", alarm=True),
                    Bound(0.0),
                ),
                alarms=_held(vitals, "COLLAPSED", "UNIFORM"),
            )
        ],
    )
    used = _plate(
        vitals,
        "Prototypes in use",
        f"Share of the prototypes that are some target's largest. A batch can use {limits.prototypes:.2%} of them at "
        "most (dotted). A share that sinks while the entropy sinks is a collapse under way.",
        [_one(vitals, "train/prototypes_used", bounds=(Bound(limits.prototypes, "most"), Bound(0.0)),
              alarms=_held(vitals, "COLLAPSED"))],
    )  # fmt: skip
    spread = _plate(
        vitals,
        "Spread of the features",
        "Standard deviation over images of unit CLS features, mean over dimensions. Dotted: features that use every "
        "direction alike, 1 / sqrt(dim). 0 is one point for all images.",
        [_one(vitals, "train/feature_std", alarms=_held(vitals, "FEATURES"),
              bounds=(Bound(limits.spread, "1 / sqrt(dim)"), Bound(limits.flat, "", alarm=True), Bound(0.0)))],
    )  # fmt: skip
    rank = _plate(
        vitals,
        "Effective rank",
        "Of the teacher's CLS features of a batch (exp of the entropy of the singular values' shares). 1 is a line; "
        f"the most that batch and width allow is {limits.rank:.0f}.",
        [_one(vitals, "train/effective_rank", alarms=_held(vitals, "RANK"),
              bounds=(Bound(limits.rank, "most"), Bound(limits.line, "", alarm=True)))],
    )  # fmt: skip
    text = "Shaded: an alarm held. Red dots: the level it is raised at, when ten logged steps in a row are beyond."
    return Section("collapse", "Signs of collapse", (text,), _kept(entropy, used, spread, rank))


def _losses(vitals: Vitals) -> Section:
    whole = _plate(
        vitals,
        "Loss",
        "Sum of the weighted terms. It compares no runs of other crops, heads or temperatures, and it may rise while "
        "the features get better: the teacher moves.",
        [_one(vitals, "train/loss", alarms=_held(vitals, "SPIKE"))],
    )
    terms = _plate(
        vitals,
        "Terms of the loss",
        "Each on its own scale, before its weight.",
        [_one(vitals, key) for key in TERMS],
    )
    return Section("losses", "Losses", (), _kept(whole, terms))


def _optimiser(vitals: Vitals) -> Section:
    lines = {NAMES[key]: vitals.history[key] for key in MODULES if vitals.history.get(key)}
    gradients = _plate(
        vitals,
        "Gradient norms by module",
        "Before clipping, each module by itself, log scale. Dotted: the norm they are clipped to. Always above it, the "
        "rate is set by clipping; far below, clipping does nothing.",
        [
            Panel(
                "gradient norm",
                lines,
                (Bound(vitals.limits.clip, "clipped to"),),
                _held(vitals, "SPIKE"),
                log=True,
            )
        ],
    )
    rates = _plate(
        vitals,
        "Schedules",
        "What each step used; dotted, what the settings say of all steps.",
        [_one(vitals, key, plan=vitals.plan.get(key)) for key in RATES],
    )
    return Section("optimiser", "Gradients and schedules", (), _kept(gradients, rates))


def _speed(vitals: Vitals) -> Section:
    stacks, wait = (
        vitals.history.get("sys/stacks_per_second", {}),
        vitals.history.get("sys/data_wait_share", {}),
    )
    plate = _plate(
        vitals,
        "Speed",
        "Of the logged steps, all workers. The share of a step that is spent waiting for data should stay under "
        f"{vitals.limits.starved:.0%} (red dots).",
        [
            Panel("stacks per second", {"stacks per second": stacks}, (Bound(0.0),)),
            Panel(
                "share waiting for data",
                {"share waiting for data": wait},
                (Bound(vitals.limits.starved, "", alarm=True), Bound(0.0)),
                _held(vitals, "STARVED"),
            ),
        ],
    )
    return Section("speed", "Speed and restarts", (), _kept(plate))


def with_tables(section: Section, *tables: Table) -> Section:
    return Section(section.key, section.title, section.text, section.plates, tables, section.folded)
