"""Lines over steps: nothing is lost when a long run is drawn in bins, and the table is what is drawn."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from cranium.figures import style, traces
from cranium.figures.traces import Bound, Panel


def test_bins_hold_every_entry_once_and_keep_the_spike() -> None:
    rng = np.random.default_rng(0)
    series = {10 * step: float(value) for step, value in enumerate(rng.normal(size=1003))}
    series[5000] = 1e6
    found = traces.binned(series, 100)
    assert len(found.first) == 100 and found.greatest.max() == 1e6 and found.middle.max() < 10
    counted = 0
    for first, last, middle, least, greatest in zip(
        found.first, found.last, found.middle, found.least, found.greatest, strict=True
    ):
        here = [value for step, value in series.items() if first <= step <= last]
        counted += len(here)
        assert (middle, least, greatest) == (np.median(here), min(here), max(here))
    assert counted == len(series)


def test_a_short_run_is_drawn_and_told_entry_by_entry() -> None:
    series, other = {0: 3.0, 5: 1.0, 7: 2.0}, {5: 9.0}
    found = traces.binned(series)
    assert found.first.tolist() == found.last.tolist() == [0, 5, 7] and found.middle.tolist() == [3, 1, 2]
    table = traces.table({"a": series, "b": other}, "t")
    assert table.columns == ("step", "a", "b")
    assert table.rows == ((0, 3.0, None), (5, 1.0, 9.0), (7, 2.0, None))


def test_the_table_of_a_long_run_has_bins_with_their_extremes() -> None:
    series = {step: float(step % 7) for step in range(1000)}
    late = {step: 1.0 for step in range(900, 1000)}
    table = traces.table({"a": series, "late": late}, "t")
    assert len(table.rows) == traces.BINS
    assert table.columns == ("from step", "to step", "a", "a, least", "a, greatest", "late", "late, least",
                             "late, greatest")  # fmt: skip
    assert table.rows[0] == (0, 4, 2.0, 0.0, 4.0, None, None, None)
    assert table.rows[-1][:2] == (995, 999) and table.rows[-1][5:] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_drawing_names_its_bounds_and_marks_alarms_and_restarts(count: int) -> None:
    panel = Panel(
        "entropy <b>", {"a<b": {0: 1.0, 50: 2.0}, "c": {0: 2.0}}, (Bound(3.0, "log K"), Bound(0.1, alarm=True)),
        ((40, 50),), plan={0: 1.0, 100: 0.0},
    )  # fmt: skip
    logged = Panel("norm", {"norm": {0: 0.3, 50: 4.0}}, log=True)
    looks = Panel("probe", {"k-NN": {0: 0.4, 50: 0.6}}, looks=True)
    svg = traces.draw([panel, logged, looks][:count], 100, [20], "title <i>", ("#112233", "#445566"))
    words = [text for text in ET.fromstring(svg.replace("xlink:href", "href")).itertext() if text.strip()]
    assert "log K" in words and "entropy <b>" in words and "a<b" in words
    assert svg.count(traces.ALARM) >= 2  # the shaded steps, and the level
    ids = re.findall(r' id="([^"]+)"', svg)
    assert len(ids) == len(set(ids)) and style.INK not in svg and "mathdefault" not in svg
    plain = traces.draw([panel, logged, looks][:count], 100, [], "title <i>", ("#112233", "#445566"))
    assert len(svg) > len(plain)
