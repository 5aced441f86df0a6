"""MLflow on a real Postgres, for development: one command, on loopback, everything in one folder.

    python deploy/tracking/local.py FOLDER          the database, artefacts and secrets are made there at the first call

PORT (5000) and ARTEFACTS (FOLDER/artefacts) may be set; with ARTEFACTS=s3://bucket also AWS_ENDPOINT_URL. Ctrl-C ends
it. Needs Postgres's own programs (Debian: postgresql) and `pip install 'cranium[tracking]'`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def program(name: str) -> str:
    places = [str(folder) for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    found = shutil.which(name, path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if not found:
        sys.exit(f"error NO_POSTGRES: {name} is not installed; on Debian: apt-get install postgresql")
    return found


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def main(home: Path) -> int:
    home.mkdir(parents=True, exist_ok=True)
    secrets, data, port = home / "secrets", home / "postgres", free_port()
    subprocess.run([HERE / "secrets.sh", secrets], check=True)
    # Postgres will not run as root: then as the user that its package made.
    owner = pwd.getpwnam("postgres") if os.getuid() == 0 else None
    run_as = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner else {}
    sockets = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # short: a socket's path may have 107 bytes
    password = sockets / "password"
    shutil.copy(secrets / "postgres_password", password)
    if owner:
        data.mkdir(mode=0o700, exist_ok=True)
        for path in (data, sockets, password):
            os.chown(path, owner.pw_uid, owner.pw_gid)
    if not (data / "PG_VERSION").is_file():
        words = [program("initdb"), "--auth=scram-sha-256", "--username=mlflow", f"--pwfile={password}"]
        words += ["--encoding=UTF8", "--no-locale", str(data)]
        if subprocess.run(words, stdout=subprocess.DEVNULL, cwd=sockets, **run_as).returncode:  # type: ignore[call-overload]
            user = owner.pw_name if owner else "this user"
            sys.exit(
                f"error POSTGRES: initdb failed; look above, and whether {user} can enter every folder of {data}"
            )
    words = [program("postgres"), "-D", str(data), "-p", str(port), "-k", str(sockets)]
    words += ["-c", "listen_addresses=127.0.0.1"]
    postgres = subprocess.Popen(words, cwd=sockets, **run_as)  # type: ignore[call-overload]
    serve: subprocess.Popen[bytes] | None = None

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        ready = [program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port), "-d", "postgres"]
        while subprocess.run(ready).returncode != 0:
            if postgres.poll() is not None:
                sys.exit("error POSTGRES: it did not start; look above for what it said")
        address = f"127.0.0.1:{os.environ.get('PORT', '5000')}"
        environment = {
            "ARTEFACTS": str(home / "artefacts"),
            **os.environ,
            "DATABASE": f"postgresql+pg8000://mlflow@127.0.0.1:{port}/postgres",
            "SECRETS": str(secrets),
            "HOSTS": f"{address},{address.replace('127.0.0.1', 'localhost')}",
            "BIND": "127.0.0.1",
            "TMPDIR": str(
                sockets
            ),  # what it writes there holds the password of the database, and goes at the end
        }
        print(f"http://{address}   MLFLOW_TRACKING_USERNAME=admin", flush=True)
        print(f"MLFLOW_TRACKING_PASSWORD=$(cat {secrets / 'admin_password'})", flush=True)
        serve = subprocess.Popen([sys.executable, HERE / "serve.py"], env=environment, cwd=home)
        return serve.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        if serve and serve.poll() is None:
            serve.terminate()
            serve.wait()
        postgres.send_signal(signal.SIGINT)  # its fast shutdown
        postgres.wait()
        shutil.rmtree(sockets)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python deploy/tracking/local.py FOLDER")
    sys.exit(main(Path(sys.argv[1]).absolute()))
