"""Sections of the quality page that show how a cohort is spread: contrasts, grids, intensities, brains; by site."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cranium.volume.measure import PERCENT

from . import corpus
from .distributions import BINS, MOST_ROWS, Rows, ridges
from .page import Plate, Section, Table

Values = NDArray[np.float64]
Measures = Sequence[Mapping[str, Any]]
NATIVE = 15  # grids listed
BY_SITE = "A row is a site (n sessions), its height scaled to itself, so that small sites show as well as large ones."


def sections(cohort: corpus.Cohort, measures: Measures) -> list[Section]:
    """Contrasts, acquisition, intensities and brains of a cohort."""
    sites = _sites(cohort)
    return [
        Section("contrasts", "Contrasts", (), (_presence(cohort),)),
        _acquisition(cohort, sites),
        _intensities(cohort, measures, sites),
        _brains(cohort, measures, sites),
    ]


def _sites(cohort: corpus.Cohort) -> list[str]:
    """The site of every session; rare ones together, and all one where the cohort names none."""
    table = cohort.sessions
    if "site" not in table or table["site"].isna().all():
        return ["all sessions"] * len(table)
    names = ["no site given" if value is None or value != value else str(value) for value in table["site"]]
    common = Counter(names).most_common()
    if len(common) <= MOST_ROWS:
        return names
    kept = {name for name, _ in common[: MOST_ROWS - 1]}
    rest = f"{len(common) - len(kept)} other sites"
    return [name if name in kept else rest for name in names]


def _rows(sites: Sequence[str], series: Mapping[str, Values]) -> Rows:
    """Values of every series by site, sites in order of name."""
    of = np.array(sites)
    order = sorted(set(sites), key=lambda s: (s.endswith(" other sites"), s))
    values = {}
    for site in order:
        here = {name: v[(of == site) & np.isfinite(v)] for name, v in series.items()}
        values[site] = {name: v for name, v in here.items() if len(v)}
    return Rows(values, {site: int((of == site).sum()) for site in order})


def _plate(title: str, what: str, label: str, sites: Sequence[str], series: Mapping[str, Values]) -> Plate:
    rows = _rows(sites, series)
    return Plate(title, f"{what} {BY_SITE}", ridges(rows, label, title), (_quartiles(rows, title),))


def _quartiles(rows: Rows, title: str) -> Table:
    found: list[tuple[object, ...]] = [
        (site, name, len(v), *(round(float(q), 3) for q in np.percentile(v, (0, 25, 50, 75, 100))))
        for site, row in rows.values.items()
        for name, v in row.items()
    ]
    return Table(("site", "of", "n", "least", "25 %", "median", "75 %", "greatest"), tuple(found), title)


def _presence(cohort: corpus.Cohort) -> Plate:
    plate = corpus.presence([cohort])
    caption = plate.caption.replace(" in the cohort above it", "")
    return Plate(plate.title, caption, plate.picture, plate.tables)


def _by_channel(cohort: corpus.Cohort, column: str, get: Callable[[Any], float]) -> dict[str, Values]:
    found = [json.loads(text) for text in cohort.sessions[column]]
    return {
        c: np.array([get(f[c]) if c in f else np.nan for f in found], float)
        for c in cohort.channels
        if any(c in f for f in found)
    }


def _steps(affine: Any) -> Values:
    """Voxel spacings, rising, in mm."""
    return np.asarray(np.sort(np.linalg.norm(np.array(affine, float)[:3, :3], axis=0)))


def _acquisition(cohort: corpus.Cohort, sites: Sequence[str]) -> Section:
    fine = _by_channel(cohort, "native_affine", lambda a: float(_steps(a)[:2].mean()))
    thick = _by_channel(cohort, "native_affine", lambda a: float(_steps(a)[2]))
    matrix = _by_channel(cohort, "native_shape", lambda s: float(max(s[:3])))
    depth = _by_channel(cohort, "native_shape", lambda s: float(min(s[:3])))
    plates = (
        _plate("Finest voxel spacing", "The mean of the two finest spacings of a scan.", "mm", sites, fine),
        _plate("Coarsest voxel spacing", "Usually the distance between slices.", "mm", sites, thick),
        _plate("Longest axis", "Voxels along the longest axis of a scan.", "voxels", sites, matrix),
        _plate("Shortest axis", "Voxels along the shortest axis; often the slices.", "voxels", sites, depth),
    )
    shapes = [json.loads(text) for text in cohort.sessions["native_shape"]]
    affines = [json.loads(text) for text in cohort.sessions["native_affine"]]
    grids = Counter(
        (
            channel,
            " x ".join(map(str, shape[channel])),
            " x ".join(f"{mm:.3g}" for mm in np.linalg.norm(np.array(affine[channel])[:3, :3], axis=0)),
        )
        for shape, affine in zip(shapes, affines, strict=True)
        for channel in shape
    )
    listed = sorted(grids.items(), key=lambda item: (-item[1], item[0]))
    rows = tuple((*grid, number) for grid, number in listed[:NATIVE])
    rest = len(listed) - len(rows)
    name = "native grids" + (f", the {NATIVE} most frequent; {rest} more" if rest > 0 else "")
    table = Table(("contrast", "voxels", "spacing, mm", "scans"), rows, name)
    text = "The grids of the scans as they were stored, before anything was resampled."
    return Section("acquisition", "Acquisition", (text,), plates, (table,))


def _intensities(cohort: corpus.Cohort, measures: Measures, sites: Sequence[str]) -> Section:
    plates = []
    order = sorted(set(sites), key=lambda s: (s.endswith(" other sites"), s))
    of = np.array(sites)
    for channel in cohort.channels:
        tables = [(m["channels"].get(channel) or {}).get("quantiles") for m in measures]
        known = [np.array(t, float) for t in tables if t is not None]
        if not known:
            continue
        first, last = PERCENT.index(5), PERCENT.index(95)
        low, high = min(q[first] for q in known), max(q[last] for q in known)
        edges = np.linspace(low, high if high > low else low + 1, 2 * BINS + 1)
        values, weights, counts = {}, {}, {}
        for site in order:
            here = [
                np.array(t, float) for t, s in zip(tables, of, strict=True) if t is not None and s == site
            ]
            values[site] = {channel: edges} if here else {}
            weights[site] = {channel: np.mean([_density(q, edges) for q in here], axis=0)} if here else {}
            counts[site] = len(here)
        picture = ridges(Rows(values, counts), "raw intensity", f"Raw intensities of {channel}", weights)
        medians = _quartiles(_rows(sites, {channel: _medians(tables)}), f"medians of {channel}")
        caption = (
            f"Intensities inside the brain as stored, the mean of the sessions' own histograms. {BY_SITE} Shown from "
            "the lowest 5 % to the highest 95 % quantile; rows that lie apart are why every volume is scaled by itself."
        )
        plates.append(Plate(f"Raw intensities, {channel}", caption, picture, (medians,)))
    return Section("intensities", "Intensities", (), tuple(plates))


def _medians(tables: Sequence[Sequence[float] | None]) -> Values:
    return np.array([np.nan if t is None else t[PERCENT.index(50)] for t in tables], float)


def _density(quantiles: Values, edges: Values) -> Values:
    """Share of voxels in each bin, spread evenly between two quantiles."""
    rising = np.maximum.accumulate(quantiles)
    rising = rising + np.arange(len(rising)) * 1e-9 * max(1.0, float(np.ptp(rising)))
    return np.diff(np.interp(edges, rising, np.array(PERCENT) / 100, left=0.0, right=1.0))


def _brains(cohort: corpus.Cohort, measures: Measures, sites: Sequence[str]) -> Section:
    def of(get: Callable[[Mapping[str, Any]], float]) -> Values:
        return np.array([get(m) for m in measures], float)

    axes = ("left-right", "front-back", "up-down")
    extents = {axis: of(lambda m, k=k: m["extent_mm"][k]) for k, axis in enumerate(axes)}  # type: ignore[misc]
    plates = (
        _plate(
            "Brain volume", "Millilitres inside the brain mask.", "ml", sites,
            {"brain": of(lambda m: m["brain_ml"])},
        ),
        _plate("Extent of the brain", "Of the mask, along the axes of the head.", "mm", sites, extents),
        _plate(
            "Slices kept", "Slices of a session in the shards.", "slices", sites,
            {"slices": cohort.sessions["num_slices"].to_numpy(float)},
        ),
    )  # fmt: skip
    return Section("brains", "Brains", (), plates)
