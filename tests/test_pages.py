"""The three pages as a person meets them: on a phone and a desk, light and dark, by keyboard, on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import browser
import courses
import ingests
import reports
from cranium import health_page, report
from cranium.figures import cohort

SHEET = Path(__file__).parents[1] / "dashboards" / "quality.html.j2"
WIDTHS = (390, 1280)
OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"

# Every text that is seen, with the WCAG 2 contrast between it and the nearest background behind it.
FAINT = """
(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => {
    const v = c[i] / 255;
    return sum + w * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = {};
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement, words = texts.currentNode.data.trim();
    if (!words || !e.getClientRects().length || e.closest('style, .hidden')) continue;
    const style = getComputedStyle(e);
    const ink = parse(e.closest('svg') ? style.fill : style.color), paper = behind(e);
    const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found[words.slice(0, 40)] = ratio.toFixed(2);
  }
  return found;
})()
"""

# What reaches past the right edge of the window and lies in no box of its own that scrolls.
WIDE = """
[...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('svg') && e.tagName !== 'svg' || e.closest('.hidden')) return false;
  for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX) && p !== document.body) return false;
  return e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5;
}).map(e => e.outerHTML.slice(0, 80))
"""

FOCUSED = """
(() => {
  const e = document.activeElement;
  if (!e || e === document.body) return null;
  const style = getComputedStyle(e), box = e.getBoundingClientRect();
  return {
    name: e.tagName + ' ' + (e.getAttribute('aria-label') || e.textContent).trim().slice(0, 40),
    ring: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2,
    seen: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
    order: [...document.querySelectorAll('a[href], summary, [tabindex]')].indexOf(e),
  };
})()
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium is installed")
    with browser.browser(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    sick = {"train/target_entropy": 0.05, "train/effective_rank": 1.1, "sys/data_wait_share": 0.3}
    strength = {"random": 0.7, "scratch": 2.4, "covariates": 0.0}
    cells = reports.cells(root / "r", strength, subsets=[("T1w", "T2w"), ("T1w",)])
    return {
        "quality": cohort.write(ingests.faulty(root / "q", 9, "Phantoms").path, SHEET),
        "report": report.write("demo", reports.inputs(root / "r", cells=cells), root / "r" / "report.html"),
        "healthy": health_page.write(courses.course(root / "h", asks="What does a backbone learn?")),
        "collapsed": health_page.write(
            courses.course(root / "c", sick, stopped="it was stopped", failed=True)
        ),
    }


NAMES = ("quality", "report", "healthy", "collapsed")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_asks_for_nothing_and_can_be_read(
    tab: browser.Browser, pages: dict[str, Path], width: int, dark: bool, name: str
) -> None:
    tab.show(pages[name], width, dark=dark)
    for _ in range(2):  # as it opens, and with every table unfolded
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(WIDE) == []
        assert tab.evaluate(FAINT) == {}
        tab.evaluate(OPEN)
    assert tab.complaints == []


@pytest.mark.parametrize("name", NAMES)
def test_the_keyboard_reaches_everything_in_order_and_shows_where_it_is(
    tab: browser.Browser, pages: dict[str, Path], name: str
) -> None:
    tab.show(pages[name], 390)
    wanted = tab.evaluate(
        "[...document.querySelectorAll('a[href], summary, [tabindex]')]"
        ".filter(e => e.getClientRects().length && e.checkVisibility()).length"
    )
    reached = []
    for _ in range(wanted):
        tab.press("Tab", 9)
        at = tab.evaluate(FOCUSED)
        assert at and at["ring"] and at["seen"], at
        reached.append(at["order"])
    assert reached == sorted(set(reached))


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_printed(tab: browser.Browser, pages: dict[str, Path], name: str) -> None:
    tab.show(pages[name], 794, media="print", dark=True)
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert tab.evaluate(FAINT) == {}
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.pdf().startswith(b"%PDF")
