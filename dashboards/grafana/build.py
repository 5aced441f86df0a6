"""Makes Grafana's JSON from the short YAML beside it: `python dashboards/grafana/build.py`.

A panel is what a person has to think about: a title, what a bad value means, queries, a unit, thresholds. The rest is
the same for all of them and stands here once. A test fails where JSON and YAML differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24  # columns of Grafana's grid
HEIGHTS = {"stat": 4, "gauge": 4}
# What a query writes as <run>, <node>: the variables that choose.
SELECTORS = {
    "<experiment>": 'experiment=~"$experiment"',
    "<run>": 'experiment=~"$experiment",run=~"$run"',
    "<node>": 'instance=~"$node"',
}
ALL = {"includeAll": True, "multi": True, "current": {"text": "All", "value": "$__all"}}


def variable(name: str, query: str) -> dict[str, Any]:
    common = {"name": name, "label": name.capitalize(), "hide": 0}
    if name == "datasource":
        return {**common, "type": "datasource", "query": "prometheus", "regex": "", "refresh": 1}
    asked = {"query": query, "refId": name}
    return {
        **common,
        **ALL,
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": asked,
        "refresh": 2,  # with the time range
        "sort": 1,
    }


def selected(query: str) -> str:
    for short, long in SELECTORS.items():
        query = query.replace(short, long)
    return " ".join(query.split())


def targets(panel: dict[str, Any]) -> list[dict[str, Any]]:
    at_once = panel["kind"] in ("stat", "gauge")
    return [
        {
            "refId": chr(ord("A") + number),
            "datasource": SOURCE,
            "editorMode": "code",
            "expr": selected(query),
            "legendFormat": legend,
            "instant": at_once,
            "range": not at_once,
        }
        for number, (legend, query) in enumerate(panel["queries"].items())
    ]


def thresholds(panel: dict[str, Any]) -> dict[str, Any]:
    """`thresholds: {red: 0.1}`: from there on red; what is below the first is green unless `base` says otherwise."""
    found = dict(panel.get("thresholds", {}))
    steps = [{"color": found.pop("base", "green"), "value": None}]
    steps += [{"color": color, "value": value} for value, color in sorted((v, c) for c, v in found.items())]
    return {"mode": "absolute", "steps": steps}


def drawn(panel: dict[str, Any]) -> dict[str, Any]:
    """How a kind of panel looks: `fieldConfig` and `options`."""
    has_limits = "thresholds" in panel
    defaults: dict[str, Any] = {"unit": panel["unit"], "thresholds": thresholds(panel)}
    defaults |= {name: panel[name] for name in ("min", "max", "decimals") if name in panel}
    options: dict[str, Any]
    match panel["kind"]:
        case "stat" | "gauge":
            defaults["color"] = {"mode": "thresholds" if has_limits else "fixed", "fixedColor": "blue"}
            defaults["noValue"] = panel.get("none", "none")
            options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
            if panel["kind"] == "stat":
                options |= {"colorMode": "value", "graphMode": "none", "textMode": "auto"}
        case "timeline":
            defaults["color"] = {"mode": "thresholds"}
            defaults["mappings"] = [
                {"type": "value", "options": {str(k): {"text": v} for k, v in panel["values"].items()}}
            ]
            options = {"mergeValues": True, "showValue": "never", "rowHeight": 0.8, "legend": LEGEND}
        case _:
            stacked = panel.get("stack", False)
            defaults["color"] = {"mode": "palette-classic"}
            defaults["custom"] = {
                "drawStyle": "line",
                "lineWidth": 2,
                "fillOpacity": 30 if stacked else 0,
                "showPoints": "never",
                "spanNulls": 60_000,  # a scrape missed is no gap
                "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
                "scaleDistribution": {"type": "log", "log": 10} if panel.get("log") else {"type": "linear"},
                "thresholdsStyle": {"mode": "dashed" if has_limits else "off"},
            }
            options = {"legend": LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}}
    return {"fieldConfig": {"defaults": defaults, "overrides": []}, "options": options}


LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True}
TYPES = {"stat": "stat", "gauge": "gauge", "timeline": "state-timeline", "lines": "timeseries"}


def panels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        made.append({"type": "row", "title": row["row"], "collapsed": False, "gridPos": place, "panels": []})
        x, y, height = 0, y + 1, 0
        for panel in ({"kind": "lines", **found} for found in row["panels"]):
            wide = panel.get("width", 8)
            if x + wide > WIDTH:
                x, y, height = 0, y + height, 0
            tall = HEIGHTS.get(panel["kind"], 8)
            made.append(
                {
                    "type": TYPES[panel["kind"]],
                    "title": panel["title"],
                    "description": " ".join(panel["about"].split()),
                    "datasource": SOURCE,
                    "gridPos": {"x": x, "y": y, "w": wide, "h": tall},
                    "targets": targets(panel),
                    **drawn(panel),
                }
            )
            x, height = x + wide, max(height, tall)
        y += height
    return [{"id": number, **panel} for number, panel in enumerate(made, 1)]


def dashboard(name: str, told: dict[str, Any]) -> dict[str, Any]:
    return {
        "uid": f"cranium-{name}",
        "title": f"Cranium: {told['title']}",
        "description": " ".join(told["about"].split()),
        "tags": ["cranium"],
        "schemaVersion": 39,  # Grafana 10.2 and later
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "type": "dashboards",
                "title": "Cranium",
                "tags": ["cranium"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "annotations": {"list": []},
        "templating": {"list": [variable(v, q) for v, q in {"datasource": "", **told["variables"]}.items()]},
        "panels": panels(told["rows"]),
    }


def built(path: Path) -> str:
    """The JSON of a dashboard's YAML."""
    made = dashboard(path.stem, yaml.safe_load(path.read_text()))
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.yaml")):
        path.with_suffix(".json").write_text(built(path))
