"""Charts: inline, themed, escaped, free of global state; and the pieces of a page."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import pytest

from cranium.figures import page, plots, style, training

MARKS = [
    plots.Mark("random", 0.6, 0.5, 0.7, (0.55, 0.6, 0.65)),
    plots.Mark("scratch", 0.8, 0.7, 0.9, (0.7, 0.8, 0.9)),
    plots.Mark("run:<b>&$x$", None, note="no subject of class 1"),
]


def every_chart() -> list[str]:
    curve = plots.Curve("scratch", (0.1, 1.0), (MARKS[0], MARKS[1]))
    return [
        plots.bars(MARKS, "bars"),
        plots.curves(
            [curve, plots.Curve("lonely <i>", (0.1,), (MARKS[2],))], {0.1: "n 4", 1.0: "n 40"}, "curves"
        ),
        plots.pairs([(MARKS[0], MARKS[1]), (MARKS[2], MARKS[2])], ("inside", "a<b"), "pairs"),
        plots.presence([(True, False)], ("T1w", "<T2w>"), {"demo": [3], "<x>": [0]}, "presence"),
        plots.histories({"loss": {"a<b": ([0, 1], [2.0, 1.0])}}, {"a<b": "#112233"}, "histories"),
        plots.durations({"ingest": 61.0, "<none>": 0.0}, 'time "quoted" <b>'),
    ]


def test_charts_are_well_formed_themed_and_named() -> None:
    for svg in every_chart():
        root = ET.fromstring(svg.replace("xlink:href", "href"))
        assert root.get("role") == "img" and root.get("aria-label")
        assert "width" not in root.attrib  # the page decides
        ids = re.findall(r' id="([^"]+)"', svg)
        assert len(ids) == len(set(ids)) and set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(ids)
        assert "currentColor" in svg and style.INK not in svg and "<metadata" not in svg
        assert "DejaVu Sans" not in svg and "var(--sans)" in svg


def test_text_is_text_and_a_dollar_is_a_dollar() -> None:
    words = "".join(ET.fromstring(plots.bars(MARKS, "t").replace("xlink:href", "href")).itertext())
    assert "run:<b>&$x$" in words and "0.60  (0.50 to 0.70)" in words and "undefined" in words


def test_the_same_chart_twice_is_the_same_and_leaves_no_state() -> None:
    before = dict(matplotlib.rcParams)
    assert every_chart() == every_chart()
    assert dict(matplotlib.rcParams) == before


def test_an_initialisation_keeps_its_colour_and_no_two_share_one() -> None:
    known = [style.colour(name) for name in style.COLOURS]
    assert len(set(known)) == len(known) and style.colour("run:abc") == style.colour("run:abc")
    assert style.colour("run:abc") not in known


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.23, "4.2 s"), (59.4, "59 s"), (187, "3 min 07 s"), (7500, "2 h 05 min")]
)
def test_clock(seconds: float, said: str) -> None:
    assert plots.clock(seconds) == said


def test_a_link_only_leads_to_the_web() -> None:
    assert page.Link("x", "https://a/b").safe == "https://a/b"
    assert page.Link("x", "javascript:alert(1)").safe is None and page.Link("x").safe is None


def test_a_journal_is_cut_where_a_later_attempt_resumed(tmp_path: Path) -> None:
    def lines(*entries: dict[str, object]) -> str:
        return "".join(json.dumps(entry) + "\n" for entry in entries)

    first = [{"resume": 0}, *({"step": k, "metrics": {"train/loss": 1.0}} for k in range(6))]
    second = [{"resume": 3}, {"step": 3, "metrics": {"train/loss": 2.0}}]
    (tmp_path / "1-a.jsonl").write_text(lines(*first))
    (tmp_path / "2-b.jsonl").write_text(lines(*second) + '{"step": 4, "met')
    read = training.read(tmp_path)
    assert list(read) == [0, 1, 2, 3] and read[3]["train/loss"] == 2.0
    assert training.plate({"scratch": tmp_path / "none"}) is None
