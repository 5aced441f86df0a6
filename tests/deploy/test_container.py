"""The container file, read as a builder reads it. No builder is needed, and none has been asked: docs/cluster.md."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "Containerfile"


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in FILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Name -> (what it stands on, its instructions)."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            found[name] = (source, [])
        elif found:
            found[list(found)[-1]][1].append((word, rest))
    return found


def copies(stage: str) -> list[tuple[list[str], str]]:
    """(sources in the repository, destination) of a stage and those below it."""
    source, lines = stages()[stage]
    below = copies(source) if source in stages() else []
    words = [shlex.split(rest) for word, rest in lines if word == "COPY" and "--from=" not in rest]
    return below + [(parts[:-1], parts[-1]) for parts in words]


def test_only_known_instructions_and_nothing_from_the_net_but_packages() -> None:
    assert {word for word, _ in instructions()} <= {
        "ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "EXPOSE", "CMD",
    }, "no ADD: it fetches URLs and unpacks archives"  # fmt: skip
    runs = " ".join(rest for word, rest in instructions() if word == "RUN")
    assert not re.search(r"curl|wget|apt|git ", runs)


@pytest.mark.parametrize("stage", list(stages()))
def test_what_it_copies_is_there(stage: str) -> None:
    assert [
        source for sources, _ in copies(stage) for source in sources if not (ROOT / source).exists()
    ] == []
    others = [
        rest.split()[0].removeprefix("--from=") for word, rest in stages()[stage][1] if "--from=" in rest
    ]
    assert set(others) <= set(stages()), "stages of this file, no foreign images"


@pytest.mark.parametrize("stage", ["tracking", "cranium"])
def test_an_image_runs_as_nobody_and_brings_no_tools(stage: str) -> None:
    source, lines = stages()[stage]
    assert source == "${PYTHON}", "on the slim base itself, not on the stage that installed things"
    users = [rest for word, rest in lines if word == "USER"]
    assert users == ["10001:10001"], "by number: Kubernetes' runAsNonRoot can't read names"
    assert not [rest for word, rest in lines if word == "RUN" and "pip" in rest]
    environment = " ".join(rest for word, rest in lines if word == "ENV")
    assert "MLFLOW_DISABLE_TELEMETRY=true" in environment
    assert stage == "tracking" or "RAY_USAGE_STATS_ENABLED=0" in environment


def test_the_user_is_that_of_the_manifests() -> None:
    for name in ("cluster", "job"):
        assert "runAsUser: 10001" in (ROOT / "deploy" / "kubernetes" / f"{name}.yaml").read_text()


def test_versions_are_the_locked_ones() -> None:
    source, lines = stages()["locked"]
    assert ("COPY", "constraints.txt pyproject.toml ./") in lines and source == "${PYTHON}"
    assert "PIP_CONSTRAINT=/src/constraints.txt" in " ".join(rest for _, rest in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    command = [sys.executable, ROOT / "deploy" / "requirements.py", "cranium", "s3"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed == [*project["dependencies"], *project["optional-dependencies"]["s3"]]
    asked = re.findall(r"requirements\.py ([a-z0-9 ]+)>", FILE.read_text())
    assert [one.split() for one in asked] == [["tracking"], ["cranium", "s3"]]


def test_what_is_copied_is_enough_to_build_the_wheel(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="needs hatchling, which pip fetches when it builds")
    for sources, destination in copies("build"):
        for source in sources:
            target = (
                tmp_path / destination / Path(source).name if destination == "./" else tmp_path / destination
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, target)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "cranium/cli.py",
        "cranium/share/experiments/demo.yaml",
        "cranium/share/datasets/adni.yaml",
    } <= set(names)
