"""The house stays as declared: layout, names, YAML, README."""

from __future__ import annotations

import ast
import importlib
import platform
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cranium import cli, reading

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "cranium"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_platform_is_a_shelf_and_the_standard_library_keeps_its_name() -> None:
    assert [p.name for p in (ROOT / "platform").iterdir() if p.name != "__pycache__"] == ["cranium"]
    assert Path(platform.__file__).parent == Path(sysconfig.get_paths()["stdlib"])
    run = subprocess.run(
        [sys.executable, "-c", "import uuid, platform; print(platform.__file__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(run.stdout.strip()).parent == Path(sysconfig.get_paths()["stdlib"])


@pytest.mark.parametrize("folder", ["platform", "datasets", "experiments", "dashboards"])
def test_data_folders_hold_no_python(folder: str) -> None:
    assert list((ROOT / folder).glob("*.py")) == []


def test_every_yaml_validates(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        cli.main(["check"])
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    count = int(re.search(r"(\d+) files checked, 0 with errors", printed.out)[1])  # type: ignore[index]
    every = [
        p for f in ("datasets", "experiments") for p in (ROOT / f).rglob("*.yaml") if p.parent.name != "base"
    ]
    assert count == len(every) >= 14
    assert (
        "  nacc: layout 1\n" in printed.out
    )  # what nobody could verify is listed, as finely as it is declared


def test_every_base_is_used() -> None:
    bases = set((ROOT / "experiments").rglob("base/*.yaml"))
    used = set()
    for path in (ROOT / "experiments").rglob("*.yaml"):
        if base := reading.read_yaml(path).get("base"):
            used.add((path.parent / base).resolve())
    assert bases <= used


def test_only_cluster_starts_ray_and_only_track_imports_mlflow() -> None:
    starts, speaks = set(), set()
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init":
                starts.add(path.name)
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "mlflow" for name in names):
                speaks.add(path.name)
    assert starts == {"cluster.py"}
    assert speaks == {"track.py"}


def test_names_say_what_things_are() -> None:
    vague = re.compile(r"utils?|helpers?|common|base|manager|misc")
    assert [p for p in _sources() if vague.fullmatch(p.stem)] == []
    shadows = [p.relative_to(PACKAGE).as_posix() for p in _sources() if p.stem in sys.stdlib_module_names]
    assert shadows == ["tasks/statistics.py"], "only ever imported as cranium.tasks.statistics"


def test_the_console_script_resolves() -> None:
    module, _, function = PROJECT["project"]["scripts"]["cranium"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_wheel_brings_the_data_folders() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {f: f"cranium/share/{f}" for f in ("datasets", "experiments", "dashboards")}
    for folder in included:
        assert (ROOT / folder).is_dir()


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins), (
        "no local versions or URLs"
    )
    names = {_canonical(pin.partition("==")[0]) for pin in pins}
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    asked = {_canonical(re.match(r"[A-Za-z0-9_.-]+", want)[0]) for want in wanted}  # type: ignore[index]
    assert asked <= names, asked - names


def test_pins_keep_to_the_floors() -> None:
    """A floor is where a hole was mended (or a feature came); the lock file must not be below one."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    locked = {_canonical(name): version for name, version in pins.items()}
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [PROJECT["project"]["dependencies"], *extras.values()]
    wanted = [Requirement(one) for several in asked for one in several]
    unpinned = {"pip"}  # fetches the demo's packages, and is what reads the lock file
    below = [
        str(w) for w in wanted if w.name not in unpinned and locked[_canonical(w.name)] not in w.specifier
    ]
    assert below == []
    floors = {w.name: w.specifier for w in wanted}
    for name, holed in (("ray", "2.59.0"), ("mlflow", "3.7.0"), ("torch", "2.9.1")):
        assert holed not in floors[name], f"{name} {holed} is known to be unsafe"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _listed(page: str) -> list[str]:
    """Paths of the lines `path  description` in the blocks ```text of a page."""
    blocks = re.findall(r"```text\n(.*?)```", (ROOT / page).read_text(), re.S)
    return [
        line.split()[0] for block in blocks for line in block.splitlines() if re.match(r"\S+ {2,}\S", line)
    ]


def test_the_trees_of_the_pages_are_the_tree() -> None:
    """Every path they show exists, and every module has its line in CONTRIBUTING."""
    listed = _listed("CONTRIBUTING.md")
    assert [path for path in [*_listed("README.md"), *listed] if not (ROOT / path).exists()] == []
    folders = {
        f"{p.relative_to(ROOT)}" for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()
    }
    modules = {f"{p.relative_to(ROOT)}" for p in PACKAGE.glob("*.py") if p.name != "__init__.py"}
    assert {path.rstrip("/") for path in listed} >= folders | modules


def test_the_layers_of_the_page_are_those_that_are_checked() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    assert "\n".join(f"    {layer}" for layer in layers) in (ROOT / "CONTRIBUTING.md").read_text()


def test_every_test_that_the_security_page_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text()))
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert {name for name in named if f"def {name}(" not in sources} == set()
    assert len(named) > 25


def test_every_test_that_the_page_of_faults_names_is_there() -> None:
    """And every row of the fault matrix has its line, with a test or a word on what is not shown."""
    page = (ROOT / "docs" / "faults.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    absent = {
        f"{file}::{name}"
        for file, name in named
        if not (path := ROOT / "tests" / file).is_file() or f"def {name}(" not in path.read_text()
    }
    assert absent == set() and len(named) > 60
    rows = {
        cells[1]: cells
        for line in page.splitlines()
        if len(cells := [c.strip() for c in line.split("|")]) > 5
    }
    wanted = [f"{kind}{n}" for kind, count in (("P", 9), ("R", 15), ("T", 5)) for n in range(1, count + 1)]
    assert [row for row in rows if re.fullmatch(r"[PRT]\d+", row)] == wanted
    assert [row for row in wanted if "::" not in rows[row][4] and not rows[row][5]] == []
