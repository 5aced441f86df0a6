"""The compose file of MLflow, Postgres and an object store: its form, and who can get in."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from cranium import __version__

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "tracking"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Check(Closed):
    test: list[str]
    interval: str
    timeout: str
    retries: int
    start_period: str = "0s"


class Build(Closed):
    context: str
    dockerfile: str
    target: str


class Needed(Closed):
    condition: Literal["service_healthy"]


class Service(Closed):
    image: Annotated[str, Field(pattern=r"^[a-z0-9./-]+:\d[\w.-]*$")]  # a version, never `latest`
    build: Build | None = None
    command: list[str] = []
    environment: dict[str, str] = {}
    secrets: list[str]
    volumes: list[str] = []
    ports: list[str] = []
    networks: list[str]
    depends_on: dict[str, Needed] = {}
    healthcheck: Check
    read_only: bool = False
    tmpfs: list[str] = []
    cap_drop: list[str] = []
    security_opt: list[str]
    restart: Literal["unless-stopped"]


class Network(Closed):
    internal: bool = False


class Secret(Closed):
    file: str


class Compose(Closed):
    name: str
    services: dict[str, Service]
    networks: dict[str, Network]
    volumes: dict[str, Closed]
    secrets: dict[str, Secret]


def test_only_known_fields_that_name_each_other() -> None:
    compose = Compose.model_validate(COMPOSE)
    for service in compose.services.values():
        assert set(service.secrets) <= set(compose.secrets)
        assert set(service.networks) <= set(compose.networks)
        assert {one.split(":")[0] for one in service.volumes} <= set(compose.volumes)
        assert set(service.depends_on) <= set(compose.services)
    assert compose.services["mlflow"].image.endswith(f":{__version__}")
    build = compose.services["mlflow"].build
    assert build and (FOLDER / build.context).resolve() == ROOT
    assert f" AS {build.target}\n" in (ROOT / build.dockerfile).read_text()


def test_the_compose_specification_takes_it() -> None:
    """With compose-spec.json of the Compose Specification in $CRANIUM_TEST_DATA/compose."""
    path = Path(os.environ.get("CRANIUM_TEST_DATA", "-")) / "compose" / "compose-spec.json"
    if not path.is_file():
        pytest.skip(f"needs {path.name} in $CRANIUM_TEST_DATA/compose")
    validator = jsonschema.Draft7Validator(json.loads(path.read_text()))
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(COMPOSE)] == []
    assert not validator.is_valid({**COMPOSE, "service": {}})


def test_it_listens_on_loopback_and_its_database_on_nothing() -> None:
    published = {name: service.get("ports", []) for name, service in COMPOSE["services"].items()}
    assert published == {"postgres": [], "objects": [], "mlflow": ["127.0.0.1:${PORT:-5000}:5000"]}
    assert COMPOSE["networks"]["inside"]["internal"] is True
    assert all(COMPOSE["services"][name]["networks"] == ["inside"] for name in ("postgres", "objects"))
    assert COMPOSE["services"]["mlflow"]["environment"]["HOSTS"] == "${HOSTS:-localhost:5000,127.0.0.1:5000}"


def test_no_secret_stands_in_it() -> None:
    given = {
        k: v for service in COMPOSE["services"].values() for k, v in service.get("environment", {}).items()
    }
    assert [k for k in given if re.search("PASSWORD|SECRET|KEY|TOKEN", k)] == ["POSTGRES_PASSWORD_FILE"]
    assert given["POSTGRES_PASSWORD_FILE"] == "/run/secrets/postgres_password"
    assert all(one["file"].startswith("secrets/") for one in COMPOSE["secrets"].values())
    ignored = subprocess.run(["git", "check-ignore", "-q", "deploy/tracking/secrets/x"], cwd=ROOT)
    assert ignored.returncode == 0, "nor is one committed by accident"


def test_secrets_are_made_once_and_lie_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    made = []
    for _ in range(2):
        done = subprocess.run([FOLDER / "secrets.sh", folder], check=True, capture_output=True, text=True)
        made.append({path.name: path.read_text() for path in folder.iterdir()})
    assert made[0] == made[1] and set(made[0]) == set(COMPOSE["secrets"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    plain = {name: text for name, text in made[0].items() if name != "s3_identities"}
    assert len(set(plain.values())) == 5 and all(
        re.fullmatch("[0-9a-f]{48}", text) for text in plain.values()
    )
    assert not any(text in done.stdout for text in plain.values())
    keys: Any = json.loads(made[0]["s3_identities"])["identities"][0]["credentials"]
    assert keys == [{"accessKey": plain["s3_access_key"], "secretKey": plain["s3_secret_key"]}]
