"""One look for every figure: colours, type, and SVG that takes the page's own ink, light or dark."""

from __future__ import annotations

import hashlib
import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colour-blind safe set; an initialisation has the same colour in every chart.
COLOURS = {
    "random": "#8a929e",
    "imagenet": "#cc79a7",
    "dinov2": "#e08a00",
    "scratch": "#0a7cc4",
    "brainfound": "#009e73",
    "cnn": "#7a5fc0",
    "volumes": "#c04f7c",
    "covariates": "#b07a45",
}
SPARE = ("#d55e00", "#56b4e9", "#8c6bb1", "#5b8c2a", "#a33b20")
MARKERS = {
    "random": "o",
    "imagenet": "P",
    "dinov2": "s",
    "scratch": "D",
    "brainfound": "^",
    "cnn": "p",
    "volumes": "h",
    "covariates": "X",
}

# Stand-ins that matplotlib can draw with and `to_svg` exchanges for what CSS decides.
INK, FAINT, PAPER = "#010203", "#030405", "#fdfefd"
_CSS = {INK: "currentColor", FAINT: "var(--rule)", PAPER: "var(--paper)"}

STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "text.parse_math": False,  # a `$` in an id is a dollar
    "figure.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and takes the page's font
    "svg.hashsalt": "cranium",
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}
WIDTH = 4.6  # inches: two figures to a row on a desk, one on a phone, where this leaves letters of 10 pixels


def colour(init: str) -> str:
    """The colour of an initialisation; `run:<id>` gets one of five by its name."""
    if init in COLOURS:
        return COLOURS[init]
    return SPARE[hashlib.sha256(init.encode()).digest()[0] % len(SPARE)]


def marker(init: str) -> str:
    """The marker of an initialisation, so that colour is never the only difference."""
    return MARKERS.get(init, "v")


def figure(height: float, columns: int = 1, rows: int = 1, **layout: Any) -> tuple[Figure, list[Axes]]:
    """A figure `WIDTH` inches wide and its axes; belongs to no global state. Call inside `drawing()`."""
    made = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False, **layout)
    return made, list(axes.flat)


def drawing() -> Any:
    """The style as a context, so that nothing of it remains."""
    return matplotlib.rc_context(STYLE)


def to_svg(made: Figure, title: str) -> str:
    """Inline `<svg>`: no size of its own, the page's font and ink, `title` for those who listen."""
    buffer = io.StringIO()
    metadata: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    made.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{_quoted(title)}">', text
    )
    text = text.replace("'DejaVu Sans'", "var(--sans)")
    for stand_in, value in _CSS.items():
        text = text.replace(stand_in, value)
    return _own_ids(text, hashlib.sha256(title.encode()).hexdigest()[:8])


def _own_ids(text: str, prefix: str) -> str:
    """Ids numbered in order and unique on the page; matplotlib hashes the last bit of floats into its own."""
    used = dict.fromkeys(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    new = {old: f"f{prefix}-{number}" for number, old in enumerate(used)}
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{new[found[1]]}"' if found[1] in new else "", text)
    return re.sub(r'(url\(|href=")#([^)"]+)', lambda found: f"{found[1]}#{new[found[2]]}", text)


def _quoted(text: str) -> str:
    return (
        text.replace("&", "&amp;")
        .replace('"', "&quot;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("\\", "/")
    )
