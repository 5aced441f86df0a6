"""HTML from a template and plain values: everything escaped, nothing fetched, every table downloadable."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Link:
    """A cell of a table that leads somewhere; only http(s) addresses become links."""

    text: str
    address: str | None = None

    @property
    def safe(self) -> str | None:
        """The address, or None when a click on it could run something."""
        return self.address if self.address and self.address.startswith(("http://", "https://")) else None


@dataclass(frozen=True)
class Dot:
    """A cell of a table that says whether something is seen: a disc on the page, yes or no in a CSV."""

    seen: bool


@dataclass(frozen=True)
class Table:
    """Columns and rows of text, numbers, None (nothing there), `Link` and `Dot`."""

    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    name: str = "table"

    @property
    def text(self) -> str:
        """The table as CSV; text that a spreadsheet would run as a formula is quoted with `'`."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(self.columns)
        writer.writerows([[_literal(cell) for cell in row] for row in self.rows])
        return text.getvalue()

    @property
    def csv(self) -> str:
        """`text` as a data URI."""
        return "data:text/csv;base64," + base64.b64encode(self.text.encode()).decode()


def _literal(cell: object) -> object:
    if isinstance(cell, Link):
        cell = cell.text
    if isinstance(cell, Dot):
        return "yes" if cell.seen else "no"
    if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + cell
    return "" if cell is None else cell


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet: a PNG as a data URI, or None where the scan is missing."""

    label: str
    image: str | None


@dataclass(frozen=True)
class Sheet:
    """Rows of pictures: row title -> tiles."""

    rows: Mapping[str, Sequence[Tile]]


@dataclass(frozen=True)
class Plate:
    """A numbered figure: its picture (SVG or sheet), what is to be seen, how to read it, the table behind it."""

    title: str
    caption: str
    picture: str | Sheet
    tables: tuple[Table, ...] = ()
    wide: bool = False

    @property
    def svg(self) -> Markup | None:
        """SVG made by `figures.plots`, where every text is escaped already."""
        return Markup(self.picture) if isinstance(self.picture, str) else None

    @property
    def sheet(self) -> Sheet | None:
        return self.picture if isinstance(self.picture, Sheet) else None


@dataclass(frozen=True)
class Section:
    """A heading, some sentences, open tables, folded tables, figures."""

    key: str
    title: str
    text: tuple[str, ...] = ()
    plates: tuple[Plate, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple[Table, ...] = ()


def png(pixels: NDArray[np.uint8]) -> str:
    """A picture [H, W] or [H, W, 3] uint8 as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _number(value: object) -> str:
    if value is None:
        return "\u2013"
    if isinstance(value, float):
        if 0 < abs(value) < 0.001:
            return f"{value:.1e}"
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def render(template: Path, values: Mapping[str, Any]) -> str:
    """The page. Autoescape is always on; a name the template uses and `values` lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = _number
    environment.tests["number"] = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    environment.tests["dot"] = lambda value: isinstance(value, Dot)
    environment.tests["link"] = lambda value: isinstance(value, Link)
    return environment.get_template(template.name).render(**values)
