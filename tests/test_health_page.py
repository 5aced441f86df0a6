"""The health page: it says what the journal says, rings when it should, and never costs a run."""

from __future__ import annotations

import csv
import html
import io
import math
import re
import time
from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import pytest

import courses
from cranium import health_page, journals, store
from cranium.config import UserError
from cranium.course import Course, by_metric, limits

EVIL = "<script>alert(1)</script>"


def visible(page: Path) -> str:
    body = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def table(page: Path, name: str) -> list[dict[str, str]]:
    found = re.search(rf'download="{name}\.csv" href="data:text/csv;base64,([^"]+)"', page.read_text())
    assert found, name
    return list(csv.DictReader(io.StringIO(b64decode(found[1]).decode())))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Course:
    found = courses.course(tmp_path_factory.mktemp("healthy"), asks="why?")
    health_page.write(found)
    return found


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without figures, for what is not about them."""
    monkeypatch.setattr(health_page, "_drawn", lambda found: [])


def test_a_healthy_run_is_called_so_and_its_tables_are_the_journal(healthy: Course) -> None:
    found, page = healthy, healthy.made.path / health_page.PAGE
    words = visible(page)
    assert "Healthy so far: 399 of 400 steps" in words and "No alarm" in words and "tiny: why?" in words
    assert (
        "height of the slice 0.67 (un-adapted 0.42)" in words
        and "linear site 0.81 (un-adapted 0.61)" in words
    )
    assert "Taken up again at step 160" in words
    rows = table(page, "loss")
    entries = {entry.step: entry.metrics for entry in found.entries}
    assert [int(row["step"]) for row in rows] == list(entries) and len(rows) == 200
    assert all(float(row["loss"]) == entries[int(row["step"])]["train/loss"] for row in rows)
    starts = table(page, "starts of this run")
    assert [(row["first step"], row["last logged step"], row["entries"]) for row in starts] == [
        ("0", "198", "100"),
        ("160", "398", "120"),
    ]
    norms = table(page, "gradient norms by module")
    assert set(norms[0]) == {"step", "backbone", "DINO head"}
    assert len(re.findall(r"<figure", page.read_text())) == 11
    probes = table(page, "labels of the monitoring cohort")
    assert [row["step"] for row in probes] == ["0", "100", "200", "400"]
    before = page.read_text()
    assert health_page.write(found).read_text() == before


def test_a_skipped_step_at_the_end_has_no_loss_to_show(tmp_path: Path) -> None:
    found = courses.course(tmp_path)
    last = found.entries[-1]
    found.entries.append(replace(last, step=last.step + 1, metrics={"train/skipped": 1.0}))
    assert dict(health_page._facts(found))["loss"] == f"{last.metrics['train/loss']:.2f}"


def test_only_settings_that_differ_are_listed(healthy: Course) -> None:
    rows = table(healthy.made.path / health_page.PAGE, "settings")
    assert {row["setting"]: (row["this run"], row["default"]) for row in rows} == {
        "pretrain.arch": ("vit_tiny_patch14", "vit_large_patch14_dinov2"),
        "pretrain.steps": ("400", "10000"),
        "pretrain.batch_size": ("32", "256"),
        "pretrain.loss.prototypes": ("512", "65536"),
        "pretrain.optimiser.lr": ("0.004", "0.001"),
        "pretrain.optimiser.momentum": ("0.95,1.0", "0.992,1.0"),
    }


def test_levels_in_closed_form(tmp_path: Path) -> None:
    found = limits(courses.experiment().pretrain)  # type: ignore[arg-type]
    assert found.entropy == math.log(512) and found.spread == 1 / math.sqrt(192)
    assert found.prototypes == 64 / 512  # two global views of 32 stacks have as many targets
    assert found.rank == 64  # rows of the batch; the width is 192


def test_alarms_say_what_is_wrong_and_what_to_change(tmp_path: Path) -> None:
    sick = {"train/target_entropy": 0.05, "train/effective_rank": 1.1}
    page = health_page.write(courses.course(tmp_path, sick))
    words = visible(page)
    assert "Not healthy so far: 399 of 400 steps" in words and "No alarm" not in words
    assert re.search(
        r"COLLAPSED from step \d+ on The teacher gives nearly all images one prototype\. To change:", words
    )
    assert "RANK from step" in words and "FEATURES" not in words
    assert 'class="verdict bad"' in page.read_text()


def test_what_only_slows_a_run_does_not_make_it_ill(tmp_path: Path, undrawn: None) -> None:
    words = visible(health_page.write(courses.course(tmp_path, {"sys/data_wait_share": 0.5})))
    assert "To be looked at so far: 399 of 400 steps" in words and "STARVED" in words


def test_names_that_are_markup_stay_text(tmp_path: Path, undrawn: None) -> None:
    page = health_page.write(courses.course(tmp_path, asks=EVIL, stopped=EVIL)).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 3


def test_a_run_without_a_journal_has_a_page(tmp_path: Path) -> None:
    found = courses.course(tmp_path)
    for folder in ("journal", "monitor"):
        for path in found.made.path.joinpath(folder).rglob("*.jsonl"):
            path.unlink()
    words = visible(health_page.write(Course(found.made, found.exp, found.init, found.shard_sets)))
    assert "No step is logged yet" in words and "No probe has looked at this teacher" in words


def test_a_look_that_failed_is_told(tmp_path: Path) -> None:
    found = courses.course(tmp_path)
    folder = found.made.path / "monitor" / "00000300"
    folder.mkdir()
    (folder / "measured.json").write_text('{"failed": "out of memory"}')
    assert found.lost_looks == {300: "out of memory"}
    assert "The look at step 300 failed: out of memory" in sections_text(found)


def sections_text(found: Course) -> str:
    return " ".join(paragraph for section in health_page._drawn(found) for paragraph in section.text)


def test_a_page_knows_when_it_is_out_of_date(tmp_path: Path, undrawn: None) -> None:
    found = courses.course(tmp_path)
    assert not health_page.current(found.made)
    health_page.write(found)
    assert health_page.current(found.made)
    store.commit(found.made.path, {"weights_sha256": "0" * 64})
    assert not health_page.current(found.made)
    page = health_page.write(found)
    assert health_page.current(found.made) and "Healthy: 399 of 400 steps" in visible(page)


def test_the_page_is_kept_while_a_run_goes_on_within_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    found = courses.course(tmp_path)
    page, written = found.made.path / health_page.PAGE, []
    plain = health_page.write

    def counted(given: Course) -> Path:
        written.append(given)
        time.sleep(0.1)
        return plain(given)

    monkeypatch.setattr(health_page, "write", counted)
    monkeypatch.setattr(health_page, "EVERY", 0.02)
    with health_page.kept(found.made, found.exp, "scratch", found.shard_sets):
        time.sleep(0.2)
        assert not page.exists()  # there is nothing new yet
        (found.made.path / "ray" / "checkpoint_1").mkdir(parents=True)
        deadline = time.monotonic() + 20
        while not page.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        first = page.read_text()
        for number in range(2, 6):
            (found.made.path / "ray" / f"checkpoint_{number}").mkdir()
            time.sleep(0.1)
        assert (
            len(written) == 1
        )  # that page took a tenth of a second: the next may come after fifty times that
    assert len(written) == 2 and "Healthy so far" in first


def test_a_run_that_fails_leaves_a_page_that_says_why(tmp_path: Path, undrawn: None) -> None:
    found = courses.course(tmp_path)
    page = found.made.path / health_page.PAGE
    with (
        pytest.raises(UserError, match="is nan"),
        health_page.kept(found.made, found.exp, "scratch", found.shard_sets),
    ):
        raise UserError("NOT_FINITE", "the loss is nan at step 398")
    assert "Stopped after 399 of 400 steps" in visible(page) and "NOT_FINITE: the loss is nan" in visible(
        page
    )
    with (
        pytest.raises(KeyboardInterrupt),
        health_page.kept(found.made, found.exp, "scratch", found.shard_sets),
    ):
        raise KeyboardInterrupt
    assert "It was asked to stop" in visible(page) and 'class="verdict good"' in page.read_text()


def test_a_page_that_cannot_be_made_hides_no_error(tmp_path: Path) -> None:
    found = courses.course(tmp_path)
    segment = next(found.made.path.glob("journal/*.jsonl"))
    segment.write_text("{}\n" + segment.read_text())  # damaged
    with (
        pytest.raises(UserError, match="why"),
        health_page.kept(found.made, found.exp, "scratch", found.shard_sets),
    ):
        raise UserError("CODE", "why")


def test_values_that_are_not_finite_are_left_out() -> None:
    entries = [
        journals.Entry(step, {"train/loss": loss}, 0.0, "a")
        for step, loss in enumerate([1.0, math.nan, math.inf, 2.0])
    ]
    assert by_metric(entries) == {"train/loss": {0: 1.0, 3: 2.0}}
