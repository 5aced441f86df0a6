"""What is shown of running work: Grafana's JSON is its YAML, names exist, alerts fire on what they are for."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from cranium.dinov2 import health
from cranium.meters import METERS

ROOT = Path(__file__).parents[1]
DASHBOARDS = ROOT / "dashboards"
BOARDS = sorted((DASHBOARDS / "grafana").glob("*.yaml"))
ALERTS = yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())
RULES = {rule["alert"]: rule for group in ALERTS["groups"] for rule in group["rules"]}


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", DASHBOARDS / "grafana" / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def board(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.with_suffix(".json").read_text()))


def panels(path: Path) -> Iterator[dict[str, Any]]:
    yield from (panel for panel in board(path)["panels"] if panel["type"] != "row")


def expressions() -> Iterator[tuple[str, str]]:
    """Every query of a panel and of an alert, with where it stands."""
    for path in BOARDS:
        for panel in panels(path):
            yield from ((f"{path.stem}: {panel['title']}", target["expr"]) for target in panel["targets"])
    yield from ((name, rule["expr"]) for name, rule in RULES.items())


def exported(name: str) -> set[str]:
    """How Prometheus knows a meter."""
    ends = ("_bucket", "_count", "_sum") if METERS[name].kind == "histogram" else ("",)
    return {f"ray_{name}{end}" for end in ends}


def test_there_are_four_boards() -> None:
    assert [path.stem for path in BOARDS] == ["cluster", "pretrain", "stream", "sweep"]


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_the_json_is_what_the_yaml_makes(path: Path, build: ModuleType) -> None:
    remedy = "python dashboards/grafana/build.py"
    assert path.with_suffix(".json").read_text() == build.built(path), f"make it again: {remedy}"


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_fill_the_grid_without_overlap(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board(path)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in board(path)["panels"]}) == len(board(path)["panels"])


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_board_names_no_machine_and_asks_for_its_own_variables(path: Path) -> None:
    content = board(path)
    text = json.dumps(content)
    known = {one["name"] for one in content["templating"]["list"]} | {"__rate_interval", "__all"}
    asked = set(re.findall(r"\$\{?(\w+)", text))
    assert asked <= known, f"not declared: {asked - known}"
    assert known - {"__rate_interval", "__all"} <= asked, "declared and not used"
    sources = {json.dumps(one) for one in re.findall(r'"uid": "([^"]+)"', text)}
    assert sources == {'"${datasource}"', f'"cranium-{path.stem}"'}
    assert not re.search(r"\d+\.\d+\.\d+\.\d+|localhost|:\d{4}", text)


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_panel_says_what_a_bad_value_means(path: Path) -> None:
    for panel in panels(path):
        assert len(panel["description"]) > 20 and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_every_meter_is_shown_and_nothing_is_asked_for_that_is_none() -> None:
    asked = {name for _, text in expressions() for name in re.findall(r"ray_cranium_\w+", text)}
    known = {name: exported(name) for name in METERS}
    assert asked <= set().union(*known.values())
    assert [name for name, forms in known.items() if not forms & asked] == []


def test_labels_that_are_asked_for_are_those_of_the_meter() -> None:
    for where, text in expressions():
        for name, selector in re.findall(r"ray_(cranium_\w+)\{([^}]*)\}", text):
            meter = METERS[re.sub(r"_(bucket|count|sum)$", "", name)]
            assert set(re.findall(r"(\w+)[=!]~?", selector)) <= {*meter.labels, "le"}, where


def test_every_alert_says_what_to_do() -> None:
    for name, rule in RULES.items():
        assert set(rule["annotations"]) == {"summary", "description", "action"}, name
        assert rule["labels"]["severity"] in ("page", "warn"), name


@pytest.mark.parametrize(
    ("alert", "limits"),
    [
        ("CraniumTeacherCollapsed", {health.COLLAPSED}),
        ("CraniumTeacherUniform", {health.UNIFORM, health.SETTLED}),
        ("CraniumFeaturesCollapsed", {health.FLAT, health.LINE}),
        ("CraniumStarved", {health.STARVED}),
    ],
)
def test_alerts_and_the_health_page_agree(alert: str, limits: set[float]) -> None:
    found = {float(number) for number in re.findall(r"[<>] ([\d.]+)", RULES[alert]["expr"])}
    assert found == limits


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_configuration() -> None:
    promtool("check", "config", "dashboards/prometheus.yml")


def test_alerts_fire_on_what_they_are_for_and_on_nothing_else() -> None:
    promtool("test", "rules", "tests/alerts_test.yml")


def test_every_alert_is_tried() -> None:
    tried = (ROOT / "tests" / "alerts_test.yml").read_text()
    assert [name for name in RULES if name not in tried] == []
