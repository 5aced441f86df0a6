"""The cluster files of `ray up` against Ray's own schema, its own command line and AWS's own model of an instance."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli

from cranium import __version__, cluster

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy" / "vm").glob("*.yaml"))
EVERY = [pytest.param(yaml.safe_load(path.read_text()), id=path.stem) for path in FILES]


@pytest.mark.parametrize("config", EVERY)
def test_ray_takes_it(config: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(prepare_config({**copy.deepcopy(config), "idle_timeout_minute": 5}))


def test_aws_takes_its_instances() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "vm" / "aws.yaml").read_text())
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    for name, kind in config["available_node_types"].items():
        asked = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not (report := ParamValidator().validate(asked, model.input_shape)).has_errors(), (
            f"{name}: {report.generate_report()}"
        )
        assert asked["MetadataOptions"] == {"HttpTokens": "required"}
    unknown = ParamValidator().validate({"InstanceTyp": "x", "MinCount": 1, "MaxCount": 1}, model.input_shape)
    assert unknown.has_errors(), "or the check above says nothing"


def _ray_calls() -> list[tuple[str, str, tuple[str, ...]]]:
    """(file, subcommand, options) of every call of Ray's command line that the deployments make."""
    found = []
    for path in sorted((ROOT / "deploy").rglob("*")):
        if path.suffix in (".yaml", ".sbatch"):
            text = re.sub(r"\\\n|\n(?= *--)", " ", path.read_text())
            for verb, rest in re.findall(r"(?<!`)\bray (start|stop|drain-node)\b([^\n]*)", text):
                found.append((path.name, verb, tuple(re.findall(r"--[a-z-]+", rest.split("&&")[0]))))
    return found


def test_ray_knows_every_option_it_is_given() -> None:
    calls = _ray_calls()
    assert {name for name, verb, _ in calls if verb != "stop"} == {
        "aws.yaml", "cluster.yaml", "cranium.sbatch", "job.yaml", "onprem.yaml",
    }  # fmt: skip
    for name, verb, options in calls:
        known = {option for parameter in cli.commands[verb].params for option in parameter.opts}
        assert set(options) <= known, f"{name}: ray {verb}"
        assert options or verb == "stop"


@pytest.mark.parametrize("config", EVERY)
def test_nobody_is_let_in_without_a_token(config: dict[str, Any]) -> None:
    start = [line for line in config["head_start_ray_commands"] if "--head" in line]
    assert len(start) == 1 and "--dashboard-host=127.0.0.1" in start[0]
    every = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all(line.startswith(". ~/cranium.env && ") for line in every)
    environment = (ROOT / "deploy" / "vm" / "cranium.env").read_text()
    assert re.search(r"^export .*RAY_AUTH_MODE=token", environment, re.M)
    assert "RAY_USAGE_STATS_ENABLED=0" in environment
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert (ROOT / config["file_mounts"]["~/cranium.env"]).is_file()


@pytest.mark.parametrize("config", EVERY)
def test_nodes_get_this_version_and_its_locked_dependencies(config: dict[str, Any]) -> None:
    wheel = f"cranium-{__version__}-py3-none-any.whl"
    assert config["file_mounts"][f"~/{wheel}"] == f"dist/{wheel}"
    assert config["file_mounts"]["~/constraints.txt"] == "constraints.txt"
    assert f'~/constraints.txt "$HOME/{wheel}[s3]"' in config["setup_commands"][-1]


@pytest.mark.parametrize(
    "name", ["Containerfile", "slurm/cranium.sbatch", "kubernetes/setup.yaml", "vm/cranium.env"]
)
def test_a_started_cluster_reports_to_nobody(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With reports switched off `ray start` still sends one, to say so; only its address can be changed."""
    from ray._common.usage import usage_lib

    text = (ROOT / "deploy" / name).read_text()
    given = re.search(r"RAY_USAGE_STATS_REPORT_URL(?:=|: )(\S+)", text)
    assert given and re.search(r"RAY_USAGE_STATS_ENABLED(?:=0|: \"0\")", text)
    monkeypatch.setenv("RAY_USAGE_STATS_REPORT_URL", given[1])
    assert (
        usage_lib._usage_stats_report_url()
        == "http://127.0.0.1:9"
        == cluster.ENVIRONMENT["RAY_USAGE_STATS_REPORT_URL"]
    )


def test_preemptible_nodes_carry_no_driver() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "vm" / "aws.yaml").read_text())
    kinds = config["available_node_types"]
    assert (
        kinds["head"]["resources"] == {"CPU": 0}
        and "InstanceMarketOptions" not in kinds["head"]["node_config"]
    )
    assert {kinds[name]["min_workers"] for name in ("gpu", "data")} == {0}
