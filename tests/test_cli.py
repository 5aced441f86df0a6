"""The door: exit codes as a contract, one line per error, no heavy import before it is needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import phantoms
from cranium import cli, config, errors, flow, reading
from cranium.config import UserError
from cranium.study import Study
from cranium.target import read_target

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "experiments" / "demo.yaml")


def _run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").touch()
    phantoms.write_card(tmp_path / "datasets", "phantom")
    (tmp_path / "tiny.yaml").write_text(
        "name: tiny\ningest: {cohorts: [phantom]}\npretrain: {cohorts: [phantom]}\n"
    )
    return tmp_path / "tiny.yaml"


def test_help_and_check_import_nothing_heavy() -> None:
    code = (
        "import sys; from cranium import cli\n"
        "for words in (['--help'], ['check'], ['show', sys.argv[1]]):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit as end: assert end.code == 0, words\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'pandas', 'pyarrow', 'nibabel'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    run = subprocess.run(
        [sys.executable, "-c", code, DEMO], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_verbs_stand_in_the_order_data_flows(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run() == 0
    printed = capsys.readouterr().out
    order = [
        "demo",
        "ingest",
        "pretrain",
        "embed",
        "sweep",
        "report",
        "run",
        "submit",
        "status",
        "logs",
        "stop",
        "resume",
    ]
    places = [printed.index(f"\n  {verb} ") for verb in [*order, "check", "show", "verify"]]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["shw"], "USAGE", "show"),
        (["show"], "USAGE", "FILE.yaml"),
        (["show", "nowhere.yaml"], "NO_FILE", "does not exist"),
        (["show", DEMO, "pretrain.stepz=3"], "CONFIG", "did you mean `pretrain.steps`"),
        (["show", DEMO, "pretrain.steps=many"], "CONFIG", "pretrain.steps"),
        (["show", DEMO, "nonsense"], "USAGE", "key=value"),
        (["show", DEMO, "stored=/tmp"], "CONFIG", "stored"),
        (["submit", "check", DEMO], "USAGE", "can't be submitted"),
        (["submit", "run", DEMO], "NO_ADDRESS", "address=http"),
        (["stop", "some-job"], "NO_ADDRESS", "address=http"),
    ],
)
def test_what_a_newcomer_gets_wrong_is_one_line(
    words: list[str], code: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(*words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error {code}: ") and says in printed.err
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err


def _subprocess(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-m", "cranium.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_cohort_that_is_nowhere_or_not_ingested(project: Path, tmp_path: Path) -> None:
    store = f"store={tmp_path / 'store'}"
    nowhere = _subprocess("pretrain", project, store)
    assert (
        nowhere.returncode == 2 and "error NO_RAW: " in nowhere.stderr and "raw.phantom=DIR" in nowhere.stderr
    )
    raw = phantoms.bids_tree(tmp_path / "raw", num_subjects=1)
    early = _subprocess("pretrain", project, store, f"raw.phantom={raw}", "--json")
    assert (
        early.returncode == 2 and "error NOT_INGESTED: " in early.stderr and "cranium ingest" in early.stderr
    )
    assert early.stderr.count("\n") == 1
    again = _subprocess("pretrain", project, store, f"raw.phantom={raw}", "replay=00000001.json")
    assert again.returncode == 2 and "error NOT_INGESTED: " in again.stderr, "replay is no key of the config"
    last = json.loads(early.stdout.splitlines()[-1])
    assert last["exit_code"] == 2 and last["error"] == "NOT_INGESTED"


def _ends(monkeypatch: pytest.MonkeyPatch, verb: object) -> None:
    monkeypatch.setattr(flow, "ingest", verb)
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("NO_WEIGHTS", "give weights=PATH"), 2, "error NO_WEIGHTS: give weights=PATH"),
        (UserError("LOST", "gone", 1), 1, "error LOST: gone"),
        (ValueError("bad\nworse"), 1, "error FAILED: ValueError: bad ("),
        (OSError(28, "No space left", "/x"), 1, "error NO_SPACE: "),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    line: str,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(study: Study) -> None:
        print("Ray's own noise")
        raise error

    _ends(monkeypatch, fail)
    assert _run("ingest", project, f"store={tmp_path / 'store'}") == code
    printed = capfd.readouterr()
    assert printed.err.startswith(line) and printed.err.count("\n") == 1
    assert "noise" not in printed.out and "log: " in printed.out
    log = next((tmp_path / "store" / "logs").glob("*.log")).read_text()
    assert "Ray's own noise" in log and "Traceback" in log


def test_a_wrapped_user_error_is_found(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(study: Study) -> None:
        try:
            raise UserError("LABEL", "no such label")
        except UserError as error:
            raise RuntimeError("ray: task failed") from error

    _ends(monkeypatch, fail)
    assert _run("ingest", project, f"store={tmp_path / 'store'}") == 2


def test_what_ray_wraps_is_said_without_its_traceback() -> None:
    """Ray raises an error that is both its own and of the kind it wraps, with the traceback for its message."""
    inner = UserError("LABEL", "no such label", 3)
    both = UserError("LABEL", "ray::task() Traceback ...", 3)
    both.cause = inner  # type: ignore[attr-defined]
    outer = RuntimeError("the job failed")
    outer.__cause__ = both
    assert errors.mendable(outer) is inner


def test_rejected_inputs_end_in_three(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def some(study: Study) -> None:
        study.rejected = True
        study.note("phantom: 1 of 9 scans rejected")

    _ends(monkeypatch, some)
    assert _run("ingest", project, f"store={tmp_path / 'store'}", "--json") == 3
    lines = capfd.readouterr().out.splitlines()
    assert "note: phantom: 1 of 9 scans rejected" in lines and json.loads(lines[-1])["exit_code"] == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(project: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    script = (
        "import signal, sys, time; from cranium import cli, flow\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(study):\n"
        "    study.console.print('working')\n"
        "    if sys.argv[3] == 'swallowed': signal.signal(signal.SIGINT, lambda *_: sys.exit(0))  # as Ray Train does\n"
        "    time.sleep(60)\n"
        "flow.ingest = wait\n"
        "cli.main(['ingest', sys.argv[1], f'store={sys.argv[2]}'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    for how in ("raised", "swallowed"):
        command = [sys.executable, "-c", script, str(project), str(tmp_path / "store"), how]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "working\n"
        time.sleep(0.2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code, errors
        said = ["stopped; the same command goes on from here"]
        if how == "raised" or number == signal.SIGTERM:
            said.insert(0, "stopping, with what can be kept; a second signal waits no longer")
        assert errors.splitlines() == said


@pytest.mark.parametrize("again", [0, 1, 3])
def test_a_signal_is_answered_at_once_and_more_of_them_lose_no_word(tmp_path: Path, again: int) -> None:
    """Stopping takes a while, as a worker group that restarts does; output goes to a log meanwhile."""
    script = (
        "import sys, time; from pathlib import Path; from cranium import cluster, ending\n"
        "def work():\n"
        "    with cluster.quiet(Path(sys.argv[1])) as terminal:\n"
        "        try:\n"
        "            print('working', file=terminal.out); time.sleep(60)\n"
        "        finally:\n"
        "            time.sleep(0.5)\n"
        "    return ending.Outcome(0, {})\n"
        "ending.finish('ingest', work, True, False)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "log")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "working\n"
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("stopping") and time.monotonic() - sent < 0.4
    for _ in range(again):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (143, "stopped; the same command goes on from here\n")
    assert json.loads(out)["exit_code"] == 143


def test_show_prints_what_it_will_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("show", DEMO, "pretrain.steps=100", "sweep.folds=3", "--json") == 0
    printed = capsys.readouterr().out
    shown = yaml.safe_load(printed[: printed.rindex("# hash")].split("\n# ")[0])
    assert shown["pretrain"]["steps"] == 100
    facts = json.loads(printed.splitlines()[-1])
    exp = reading.load_experiment(Path(DEMO), ["pretrain.steps=100", "sweep.folds=3"])
    assert facts["hash"] == config.fingerprint(exp) and exp.pretrain and exp.sweep and exp.adapt
    assert facts["steps"] == 100 * len(exp.pretrain.inits)
    each = len(exp.adapt.tasks) * len(exp.sweep.init) * len(exp.sweep.label_fractions) * len(exp.sweep.seeds)
    assert facts["cells"].startswith(str(3 * each))


def test_a_card_is_a_small_experiment(project: Path) -> None:
    card = project.parent / "datasets" / "phantom.yaml"
    target = read_target(card, ["raw=/data", "ingest.size=56", "store=/s"])
    assert target.exp.ingest.cohorts == ("phantom",) and target.exp.ingest.size == 56
    assert target.machine.raw == {"phantom": Path("/data")} and target.machine.store == Path("/s")


def test_a_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    """What `submit` ships and artefacts keep is the very experiment."""
    exp = reading.load_experiment(Path(DEMO), ["pretrain.optimiser.lr=3e-4"])
    (tmp_path / "experiment.yaml").write_text(config.to_yaml(exp))
    assert reading.load_experiment(tmp_path / "experiment.yaml") == exp


def test_check_names_each_bad_file(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.parent / "experiments").mkdir()
    (project.parent / "experiments" / "bad.yaml").write_text(
        "name: bad\ningest: {cohorts: [phantom], sise: 3}\n"
    )
    monkeypatch.chdir(project.parent)
    assert _run("check") == 2
    printed = capsys.readouterr()
    assert "bad.yaml" in printed.err and "did you mean `ingest.size`" in printed.err
    assert "2 files checked, 1 with errors" in printed.out
