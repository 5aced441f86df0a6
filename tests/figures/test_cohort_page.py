"""The quality page: counts that add up, outliers found, everything escaped, nothing fetched, the same twice."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ingests
from cranium import shardset, store
from cranium.figures import cohort, distributions, mosaic, outliers, remedies
from cranium.volume import measure, shard
from cranium.volume.quality import REJECTIONS

EVIL = "<script>alert(1)</script>"
TEMPLATE = Path(__file__).parents[2] / "dashboards" / "quality.html.j2"
SUBJECTS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ingests.faulty(tmp_path_factory.mktemp("faulty"), SUBJECTS, f"Phantoms {EVIL}").path


@pytest.fixture(scope="module")
def page(made: Path) -> str:
    return cohort.write(made, TEMPLATE).read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Tags, attributes and text as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def table(text: str, name: str) -> list[dict[str, str]]:
    """The rows of a table of the page, from its CSV."""
    found = re.search(
        rf'download="{re.escape(html.escape(name))}\.csv" href="data:text/csv;base64,([^"]+)"', text
    )
    assert found, name
    return list(csv.DictReader(io.StringIO(b64decode(found[1]).decode())))


def test_counts_are_those_of_the_files(made: Path, page: str) -> None:
    scans = SUBJECTS * 3 - SUBJECTS // 3  # every third one lacks its FLAIR
    counts = json.loads((made / "manifest.json").read_text())["counts"]
    words = " ".join(" ".join(Reader(page).words).split())
    rejected = 1 + 3
    assert counts["scans"] == scans and counts["rejected"] == rejected
    assert counts["accepted"] + counts["warned"] + counts["rejected"] == scans
    said = f"{scans} scans found: {counts['accepted']} accepted as they are, {counts['warned']} accepted with a note, "
    assert said + f"{rejected} rejected." in words
    assert f"{counts['stacks']} slice stacks of {SUBJECTS - 1} sessions of {SUBJECTS - 1} subjects" in words
    assert f"{SUBJECTS - 1} subjects of the {SUBJECTS} that the card expects" in words
    codes = {row["code"]: int(row["scans"]) for row in table(page, "rejections")}
    assert codes == {"GZ_TRUNCATED": 1, "NOT_NIFTI": 3}
    assert "Download the file again" in words
    sessions = table(page, "sessions")
    assert len(sessions) == SUBJECTS - 1
    assert sum(len(row["contrasts"].split()) for row in sessions) == scans - rejected
    presence = table(page, "contrasts")
    assert sum(int(row["phantom"]) for row in presence) == SUBJECTS - 1


def test_the_wrong_scan_is_flagged_and_the_page_says_why(page: str) -> None:
    rows = table(page, "sessions")
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    wrong = next(row for row in rows if row["session"] == "007")
    assert float(wrong["score"]) > 10
    assert wrong["why"].startswith("correlation of T1w and T2w 1.00 (median \u22120.9")
    flagged = re.findall(r'<article class="loud">\s*<h3><span>([^<]+)', page)
    assert "007" in flagged and flagged == [row["session"] for row in rows if float(row["score"]) >= 5]


def test_nothing_runs_and_nothing_is_fetched(page: str) -> None:
    assert EVIL not in page and html.escape(EVIL) in page
    read = Reader(page)
    assert not {"script", "link", "iframe", "object", "embed", "form"} & {tag for tag, _ in read.tags}
    for tag, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or ""
            assert value.startswith(
                ("data:image/png;base64,", "data:text/csv;base64,", "#", "")[: 3 if value else 4]
            ), tag
    assert "default-src 'none'" in page and "url(http" not in page
    assert all(attributes.get("alt") for tag, attributes in read.tags if tag == "img")
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_it_is_the_same_twice_and_knows_when_it_is_out_of_date(made: Path, page: str) -> None:
    assert cohort.current(made)
    assert cohort.write(made, TEMPLATE).read_text(encoding="utf-8") == page
    manifest = made / "manifest.json"
    before = manifest.read_bytes()
    try:
        manifest.write_bytes(before.replace(b'"notes"', b' "notes"'))
        assert not cohort.current(made)
    finally:
        manifest.write_bytes(before)
    assert not cohort.current(made.parent)


def test_names_that_are_markup_stay_text(made: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "quarantine.parquet"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    (tmp_path / "shards").symlink_to(made / "shards")
    sessions = pq.read_table(made / "sessions.parquet").to_pandas()
    sessions["site"] = EVIL
    first = sessions["subject"].iloc[0]
    sessions.loc[sessions["subject"] == first, "subject"] = EVIL
    sessions["warnings"] = json.dumps([{"contrast": EVIL, "code": "CROPPED", "reason": EVIL}])
    sessions.to_parquet(tmp_path / "sessions.parquet")
    manifest = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest.replace(f'"subject": "{first}"', f'"subject": "{EVIL}"'))
    text = cohort.write(tmp_path, TEMPLATE).read_text(encoding="utf-8")
    assert EVIL not in text and text.count("&lt;script&gt;") > 5
    assert "script" not in {tag for tag, _ in Reader(text).tags}


def test_pictures_show_the_outline_and_the_labels(tmp_path: Path) -> None:
    """A square brain of 20 pixels with a label on its left half, on the second of two slices."""
    pixels = np.zeros((2, 1, 1, 40, 40), np.uint8)
    pixels[:, 0, 0, 10:30, 10:30] = 100
    masks = np.zeros((2, 1, 40, 40), np.uint8)
    masks[1, 0, 10:30, 10:20] = 1
    names = {"cohort": "c", "subject": "s", "session": ""}
    rows = shard.encode(
        pixels, channels=("T1w",), slices=range(2), num_slices=2, present=1, masks=masks, **names
    )
    shard.write(tmp_path / "a.parquet", [rows])
    (picture,) = mosaic.pictures([(tmp_path / "a.parquet", 0, 2)], ("T1w",), (True,))
    assert picture.image and "slice 2" in picture.alt and "labels" in picture.alt
    content = b64decode(picture.image.removeprefix("data:image/png;base64,"))
    shown = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    side = mosaic.SIDE
    red, blue = shown[..., 0] - shown[..., 2], shown[..., 2] - shown[..., 0]
    assert blue[side // 2, side // 4] > 40 and abs(blue[side // 2, 3 * side // 4]) < 10
    assert (red > 150).sum() > side and np.abs(red[side // 2, 5 * side // 8 : 7 * side // 8]).max() < 10
    (gap,) = mosaic.pictures([(tmp_path / "a.parquet", 0, 2)], ("T1w",), (False,))
    assert gap.image is None
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    damaged[damaged.index(masks[1].tobytes()) + 500] ^= 2
    (tmp_path / "a.parquet").write_bytes(damaged)
    with pytest.raises(shard.ShardError, match="label map of row 1"):
        mosaic.pictures([(tmp_path / "a.parquet", 0, 2)], ("T1w",), (True,))


def test_the_score_is_the_greatest_robust_deviation() -> None:
    values = np.concatenate([np.arange(20.0), [100.0, np.nan]])
    (one,) = outliers.score([outliers.Measure("x", values, 0.1, "mm")]).measures
    known = values[:-1]
    spread = max(
        1.4826 * np.median(np.abs(known - np.median(known))),
        (np.quantile(known, 0.9) - np.quantile(known, 0.1)) / 2.563,
    )
    found = outliers.score([one, outliers.Measure("flat", np.ones(22), 0.1)])
    assert found.score[20] == pytest.approx((100 - 10) / spread, abs=0.01) and found.score[21] == 0
    assert found.order[0] == 20 and found.reasons[20][0].startswith("x 100\u00a0mm (median 10.0, +")
    assert found.reasons[21] == ()


def test_two_groups_are_no_outliers() -> None:
    values = np.r_[np.random.default_rng(0).normal(0, 1, 30), np.random.default_rng(1).normal(40, 1, 20)]
    assert outliers.score([outliers.Measure("x", values, 0.1)]).score.max() < outliers.FLAGGED


def test_measures_of_a_box_in_closed_form() -> None:
    brain = np.zeros((12, 20, 20), bool)
    brain[2:10, 4:16, 6:14] = True  # 8 slices, 12 rows, 8 columns
    affine = np.array([[0, 2.0, 0, -20], [-3.0, 0, 0, 30], [0, 0, 4.0, -24], [0, 0, 0, 1]])
    ramp = np.broadcast_to(np.arange(20, dtype=np.uint8)[None, :, None] + 100, brain.shape)
    volumes = np.stack([np.where(brain, ramp, 0), np.where(brain, 255 - ramp, 0)])
    native = np.transpose(ramp, (2, 1, 0))  # x, y, z
    to_world = affine[:, [1, 0, 2, 3]]
    scans = {"a": (native * 10.0, to_world), "b": (native, to_world)}
    found = measure.measures(scans, ("a", "b"), volumes, brain, affine)
    assert found["brain_ml"] == pytest.approx(8 * 12 * 8 * 24 / 1000, rel=1e-3)
    assert found["extent_mm"] == [16.0, 36.0, 32.0]
    assert found["fill"] == pytest.approx(6 / np.pi, rel=1e-3)
    assert found["correlation"] == {"a+b": -1.0}
    one = found["channels"]["a"]
    assert one["quantiles"][0] == 1040 and one["quantiles"][-1] == 1150 and one["cover"] == 1
    assert one["symmetry"] == 1.0
    rows, columns = 11 * 8, 12 * 7  # neighbours that differ by one, and that do not
    steps = rows / (rows + columns)
    assert one["sharpness"] == pytest.approx(steps / np.arange(12).std(), rel=1e-3)


def test_remedies_are_for_codes_that_exist() -> None:
    assert set(remedies.REMEDIES) <= set(REJECTIONS)
    assert remedies.remedy("NEW") == "See its reason." and remedies.meaning("NEW") == "see its reason"


def test_a_histogram_made_elsewhere_keeps_its_mass() -> None:
    edges = np.linspace(0, 10, 11)
    moved = distributions._rebinned(edges, np.arange(10.0), np.linspace(-1, 11, 49))
    assert moved.sum() == pytest.approx(45) and (moved >= 0).all()


def test_sessions_carry_what_the_page_needs(made: Path) -> None:
    rows: list[dict[str, Any]] = pq.read_table(made / "sessions.parquet").to_pylist()
    assert set(shardset.RECORD) <= set(rows[0])
    for row in rows:
        found = json.loads(row["measures"])
        channels = json.loads(row["native_shape"])
        assert set(found["channels"]) == set(channels)
        assert all(0 < found["channels"][c]["cover"] <= 1 for c in channels)
    assert len({row["fingerprint"] for row in rows}) == len(rows)
    assert store.read_manifest(made)["overlap_ids"] == {}
