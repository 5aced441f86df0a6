"""Where Ray starts: a private local cluster, a running one, or a job sent to one. The sole caller of `ray.init`.

Ray, Train, Tune and Data print a lot. `quiet` sends everything that is not ours into one log file.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlparse

from cranium.config import Machine, UserError
from cranium.reading import share

ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9",  # where `ray start` would report that reports are switched off
    "DO_NOT_TRACK": "1",  # MLflow, the hub of weights
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train tab
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_task_oom_retries": "5",  # a minute; Ray's default is to try for ever, without a word
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's would end a sweep early and call it a success
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # results are kept by track and the cells themselves
}
LOCAL_ENVIRONMENT: Mapping[str, str] = {
    "RAY_AUTH_MODE": "token",  # Ray's own servers listen on every interface, whatever address they are given
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # of this process and its cluster alone
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Two processes less around every fit: nobody takes the node away, and the dashboard goes with the command.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # a head that died does not come back; not 60 s of waiting
    "RAY_worker_niceness": "0",  # on a private cluster the workers are the work; Ray would give them the last turn
}
JOB_ENVIRONMENT: Mapping[str, str] = {
    "CRANIUM_ADDRESS": "auto",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",  # from SIGTERM to SIGKILL: time to checkpoint
}
GIB = 1 << 30
OURS = "cranium-"  # submission ids and temporary folders start with it
OWNER = "owner"  # the lock in a private cluster's folder
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Connection:
    """A cluster this process is connected to."""

    address: str
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class Terminal:
    """The user's own stdout and stderr, while file descriptors 1 and 2 point at a log file."""

    out: TextIO
    err: TextIO


@dataclass(frozen=True)
class Job:
    id: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED
    exit_code: int | None  # of its command, once it has ended
    message: str = ""
    started: float = 0.0  # seconds since the epoch


# ---- connecting -----------------------------------------------------------------------------------------------------

_held: contextlib.ExitStack | None = None


@contextlib.contextmanager
def hold() -> Iterator[None]:
    """Within, the first `connect` starts the cluster and it stays up until the end: one start for several stages."""
    global _held
    with contextlib.ExitStack() as stack:
        _held = stack
        try:
            yield
        finally:
            _held = None


@contextlib.contextmanager
def connect(machine: Machine, *, num_cpus: int | None = None) -> Iterator[Connection]:
    """Be connected to Ray: a private local cluster, or the running one at `machine.address`.

    Inside another `connect` (or a Ray worker) the same cluster is used and left running. `num_cpus` are logical CPUs of
    the local cluster; by default a small machine offers more than it has, because Train reserves its workers' share and
    Data works with what is left. Raises `UserError(NO_CLUSTER)` when nothing answers at the address.
    """
    _set_environment({**ENVIRONMENT, **({} if machine.address else LOCAL_ENVIRONMENT)})
    import ray

    with _own_signals():
        if ray.is_initialized():
            yield _connection()
        elif _held is not None:
            yield _held.enter_context(_started(machine, num_cpus))
        else:
            with _started(machine, num_cpus) as connection:
                yield connection


@contextlib.contextmanager
def _started(machine: Machine, num_cpus: int | None) -> Iterator[Connection]:
    import ray

    with _attached(machine.address) if machine.address else _private(num_cpus or logical_cpus()):
        try:
            yield _connection()
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Give the caller's handlers back at the end: `ray.init` and Train replace them (Train's ends with exit code 0)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _private(num_cpus: int) -> Iterator[None]:
    """A local cluster of our own. A bare `ray.init()` would join any cluster that runs on the machine."""
    import psutil

    import ray

    # socket paths may have 107 bytes, so not below a long TMPDIR
    below = Path("/tmp") if os.access("/tmp", os.W_OK) else Path(tempfile.gettempdir())
    _sweep_up(below)
    folder = tempfile.mkdtemp(prefix=OURS, dir=below)
    total = psutil.virtual_memory().total
    with (
        _owned(Path(folder)),
        _variable("RAY_TMPDIR", folder),
        _variable("RAY_ADDRESS", None),
        _variable("PYTHONPATH", _python_path()),
    ):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=min(GIB, total // 8) if total < 32 * GIB else None,
                include_dashboard=True,  # without it a stopped trial keeps its resources for ever
                dashboard_host="127.0.0.1",
                log_to_driver=True,
                _temp_dir=folder,
            )
            # so that the State API, here and in Train's own actors, finds this cluster and no other on the machine
            address = ray.get_runtime_context().gcs_address
            (Path(folder) / "ray").mkdir(exist_ok=True)
            (Path(folder) / "ray" / "ray_current_cluster").write_text(address)
            with _variable("RAY_ADDRESS", address):
                yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which the kernel frees when this process dies."""
    with (folder / f".{OWNER}").open("x") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / f".{OWNER}").rename(folder / OWNER)
        yield


def _sweep_up(below: Path) -> None:
    """End and remove what is left of private clusters whose process was killed: nobody holds their lock any more."""
    for lock in below.glob(f"{OURS}*/{OWNER}"):
        with contextlib.suppress(OSError):  # held, or gone meanwhile
            file = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file).st_uid == lock.parent.stat().st_uid == os.getuid():
                    _end_orphans(lock.parent)
                    shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(file)


def _end_orphans(folder: Path) -> None:
    """Ray's agents now and then outlive their node by minutes; all that a private cluster starts names its folder."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("RAY_TMPDIR") == str(folder):
                process.kill()


@contextlib.contextmanager
def _attached(address: str) -> Iterator[None]:
    """A cluster that runs already; our code travels with us, unless a job has brought it."""
    import ray

    if address.startswith("http"):
        raise UserError(
            "ADDRESS", f"{address} takes jobs: use `cranium submit`; to connect, give host:6379 or auto"
        )
    _set_auth(address)
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    runtime_env = {} if in_job else {"py_modules": [str(Path(__file__).parent)], "excludes": ["__pycache__"]}
    try:
        ray.init(address=address, runtime_env=runtime_env, log_to_driver=True)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError("NO_CLUSTER", f"no Ray cluster answers at {address} ({reason[0]})", 1) from error
    yield


def _connection() -> Connection:
    import ray

    resources = ray.cluster_resources()
    address = ray.get_runtime_context().gcs_address
    return Connection(address, resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def logical_cpus() -> int:
    """CPUs a private cluster offers: those of the machine, but at least 4, and up to 8 by counting each twice."""
    cores = os.cpu_count() or 1
    return max(4, cores, min(2 * cores, 8))


def _python_path() -> str:
    package = str(Path(__file__).parents[1])
    return os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])


def _set_environment(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _set_auth(address: str) -> None:
    """Ray's authentication is always explicit: what the user set, else a token when there is one.

    Raises `UserError(NO_TOKEN)` where neither is said and the cluster is on another machine: whoever reaches a cluster
    that asks for no token can run code on it, so nobody should use one without having said so.
    """
    token = Path("~/.ray/auth_token").expanduser().is_file()
    given = token or "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if not given and "RAY_AUTH_MODE" not in os.environ and not _is_here(address):
        raise UserError(
            "NO_TOKEN",
            f"no token for the cluster at {address}: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or "
            "RAY_AUTH_MODE=disabled if it asks for none (then whoever reaches it can run code there)",
        )
    os.environ.setdefault("RAY_AUTH_MODE", "token" if given else "disabled")


def _is_here(address: str) -> bool:
    """Whether an address is on this machine (or is a tunnel's end here)."""
    host = urlparse(address if "://" in address else f"ray://{address}").hostname
    return address in ("auto", "local") or host in ("127.0.0.1", "localhost", "::1")


@contextlib.contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    try:
        yield
    finally:
        os.environ.pop(name, None) if before is None else os.environ.__setitem__(name, before)


# ---- quiet ----------------------------------------------------------------------------------------------------------


def new_log(store: Path) -> Path:
    """`<store>/logs/<utc time>-<pid>.log`, where this command's noise goes."""
    return store / "logs" / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}.log"


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[Terminal]:
    """Point file descriptors 1 and 2 (so also those of Ray's processes) at `log`; yield the real terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    _flush(sys.stdout, sys.stderr)
    with (
        os.fdopen(os.dup(1), "w", buffering=1) as out,
        os.fdopen(os.dup(2), "w", buffering=1) as err,
        log.open("a", buffering=1) as file,
    ):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            # Where they are not 1 and 2.
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield Terminal(out, err)
        finally:
            _flush(sys.stdout, sys.stderr, out, err)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)


def _flush(*files: TextIO) -> None:
    for file in files:
        file.flush()


# ---- jobs -----------------------------------------------------------------------------------------------------------


def submit(
    address: str, name: str, verb: str, key: str, arguments: Sequence[str], files: Mapping[str, str]
) -> tuple[Job, bool]:
    """Send `cranium <verb> <arguments>` as a Ray Job with this package and `files` (path -> text); never data.

    `key` identifies the work: while a job of the same name, verb and key is under way it is returned instead
    (second value False), and a new one is the next attempt. `resume` is the work of `run`.
    """
    client = _client(address)
    work = "run" if verb == "resume" else verb
    prefix = f"{OURS}{name}-{work}-{hashlib.sha256(key.encode()).hexdigest()[:8]}-"
    before = jobs(address, prefix)
    if before and before[-1].status not in ENDED:
        return before[-1], False
    attempt = int(before[-1].id.removeprefix(prefix)) + 1 if before else 1
    python = python_here(address) or "python"  # elsewhere: whatever its image calls python
    with tempfile.TemporaryDirectory(prefix="cranium-job-") as folder:
        _pack(Path(folder), files)
        try:
            client.submit_job(
                entrypoint=shlex.join([python, "-m", "cranium.cli", verb, *arguments]),
                submission_id=f"{prefix}{attempt}",
                runtime_env={"working_dir": folder, "env_vars": {**ENVIRONMENT, **JOB_ENVIRONMENT}},
                metadata={"name": name, "verb": verb},
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise UserError("SUBMIT", f"{address} refused the job: {_first_line(error)}", 1) from error
            return job(address, f"{prefix}{attempt}"), False  # someone submitted the same a moment ago
    return job(address, f"{prefix}{attempt}"), True


def python_here(address: str) -> str | None:
    """The interpreter of the cluster whose dashboard is at `address`, where that runs on this machine.

    None where it runs elsewhere: the end of a tunnel has a loopback address, too.
    """
    import psutil

    if not _is_here(address):
        return None
    for one in psutil.net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN and one.laddr.port == urlparse(address).port and one.pid:
            with contextlib.suppress(psutil.Error):
                words: list[str] = psutil.Process(one.pid).cmdline()
                if any(word.endswith("ray/dashboard/dashboard.py") for word in words):
                    return words[0]
    return None


def _pack(folder: Path, files: Mapping[str, str]) -> None:
    package = folder / "cranium"
    shutil.copytree(Path(__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "share"))
    shutil.copytree(share() / "dashboards", package / "share" / "dashboards", dirs_exist_ok=True)
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def job(address: str, job_id: str) -> Job:
    try:
        info = _client(address).get_job_info(job_id)
    except RuntimeError as error:
        raise UserError("NO_JOB", f"{address} knows no job {job_id}") from error
    return _job(job_id, info)


def jobs(address: str, prefix: str = OURS) -> list[Job]:
    """Our jobs on the cluster whose id starts so, in order of their attempts."""
    found = [
        _job(info.submission_id, info)
        for info in _client(address).list_jobs()
        if info.submission_id and info.submission_id.startswith(prefix)
    ]
    return sorted(found, key=lambda j: (j.id.rpartition("-")[0], int(j.id.rpartition("-")[2])))


def _job(job_id: str, info: Any) -> Job:
    return Job(
        job_id, str(info.status), info.driver_exit_code, info.message or "", (info.start_time or 0) / 1000
    )


def follow(address: str, job_id: str, echo: Callable[[str], None]) -> Job:
    """Pass the job's log on as it grows, until the job has ended; survives a lost connection."""
    shown = 0

    async def tail() -> None:
        nonlocal shown
        seen = 0
        async for chunk in _client(address).tail_job_logs(job_id):
            new = chunk[max(0, shown - seen) :]  # a new connection starts again from the top
            seen += len(chunk)
            if new:
                echo(new)
                shown = seen

    misses = 0
    while True:
        try:
            if job(address, job_id).status != "PENDING":
                asyncio.run(tail())
            state = job(address, job_id)
            if state.status in ENDED:
                return state
            misses = 0
        except (OSError, RuntimeError) as error:
            misses += 1
            if misses > 10:
                hint = f"cranium logs {job_id} address={address}"
                reason = f"lost {address}: {_first_line(error)}; the job may go on: `{hint}`"
                raise UserError("LOST", reason, 1) from error
        time.sleep(1.0)


def stop(address: str, job_id: str, patience_s: float = 60.0) -> Job:
    """Ask the job to end (SIGTERM, so it checkpoints) and wait until it has."""
    if job(address, job_id).status not in ENDED:
        _client(address).stop_job(job_id)
    deadline = time.monotonic() + patience_s
    while (state := job(address, job_id)).status not in ENDED and time.monotonic() < deadline:
        time.sleep(0.5)
    return state


def _client(address: str) -> Any:
    _set_auth(address)
    from ray.job_submission import JobSubmissionClient

    if not address.startswith("http"):
        raise UserError("ADDRESS", f"{address}: jobs go to a dashboard, e.g. address=http://127.0.0.1:8265")
    # They would win over `address`
    with _variable("RAY_ADDRESS", None), _variable("RAY_API_SERVER_ADDRESS", None):
        try:
            return JobSubmissionClient(address)
        except (ConnectionError, RuntimeError) as error:
            raise UserError(
                "NO_CLUSTER", f"no Ray dashboard answers at {address} ({_first_line(error)})", 1
            ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
