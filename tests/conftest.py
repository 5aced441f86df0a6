"""Fixtures every tier shares. Threads are pinned before torch or NumPy is imported."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
}.items():
    os.environ[_name] = _value
_ASKED = ("CRANIUM_TEST_DATA", "CRANIUM_FUZZ_SECONDS")
for _name in [name for name in os.environ if name.startswith("CRANIUM_") and name not in _ASKED]:
    del os.environ[_name]  # the machine's own settings have no say in a test

from cranium import cluster
from cranium.config import Machine

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Connection]:
    """One private local cluster for the whole session; `cluster.connect` in the code under test joins it."""
    from cranium.cluster import ENVIRONMENT, LOCAL_ENVIRONMENT

    os.environ.update({**ENVIRONMENT, **LOCAL_ENVIRONMENT, "RAY_AUTH_MODE": "disabled"})
    machine = Machine(store=tmp_path_factory.mktemp("cluster"))
    tests = str(ROOT / "tests")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [tests, before])
    )  # workers unpickle from our test modules
    try:
        with cluster.connect(machine, num_cpus=6) as connection:
            yield connection
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT raises `KeyboardInterrupt`, also where whoever started the tests has it ignored (a job of a script)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Machine facts with a store of its own."""
    return Machine(store=tmp_path / "store", cache=tmp_path / "cache")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real scans and weights that `CRANIUM_TEST_DATA` names; skips without it."""
    value = os.environ.get("CRANIUM_TEST_DATA")
    if not value or not Path(value).is_dir():
        pytest.skip("CRANIUM_TEST_DATA names no folder of real scans")
    return Path(value).resolve()


@pytest.fixture(scope="session")
def _empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cranium.track import Tracker

    database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Tracker(f"sqlite:///{database}", "Default")
    return database


@pytest.fixture
def mlflow_db(_empty_mlflow: Path, tmp_path: Path) -> str:
    """The URI of a fresh sqlite tracking store, copied from a template because making its schema takes seconds."""
    database = tmp_path / "mlflow.db"
    shutil.copy(_empty_mlflow, database)
    return f"sqlite:///{database}"
