"""Nothing is sent anywhere: every Python process of a command notes whom it wants to reach."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import phantoms

pytestmark = pytest.mark.flow
ROOT = Path(__file__).parents[2]
# Read by every Python that starts, Ray's own processes among them. Datagram sockets are let be: Ray "connects" one to
# learn which address this machine has, which sends nothing.
WATCH = """
import os, socket, psutil
def _note(what):
    with open(os.environ["WATCHED"], "a") as log:
        log.write(f"{what}\\n")
_mine = {a.address for found in psutil.net_if_addrs().values() for a in found}
_mine |= {"localhost", socket.gethostname(), "", None}
_lookup, _connect = socket.getaddrinfo, socket.socket.connect
def getaddrinfo(host, *args, **more):
    name = host.decode() if isinstance(host, bytes) else host
    if name not in _mine and not (name or "").startswith(("127.", "0.0.0.0", "::")):
        _note(f"looked up {name}")
    return _lookup(host, *args, **more)
def connect(self, address):
    if self.family != socket.AF_UNIX and self.type != socket.SOCK_DGRAM:
        if address[0] not in _mine and not str(address[0]).startswith(("127.", "::")):
            _note(f"connected to {address}")
    return _connect(self, address)
socket.getaddrinfo, socket.socket.connect = getaddrinfo, connect
"""

# Ray's dashboard asks the machine's own cloud which one it is, whatever is switched off: an address of the link, and a
# name that only Google's own machines know.
METADATA = {
    "looked up 169.254.169.254",
    "connected to ('169.254.169.254', 80)",
    "looked up metadata.google.internal",
}


def run(folder: Path, *words: object) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A Python command that is watched, in an environment where nobody has said no to anything."""
    (folder / "watch").mkdir(exist_ok=True)
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    noted = folder / "watched"
    noted.touch()
    said = ("TELEMETRY", "USAGE_STATS", "DO_NOT_TRACK", "RAY_", "CRANIUM_")
    environment = {k: v for k, v in os.environ.items() if not any(one in k for one in said) and k != "CI"}
    paths = [str(folder / "watch"), str(ROOT / "platform"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "WATCHED": str(noted), "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    return done, noted.read_text().splitlines()


def test_the_watch_sees_what_is_sent(tmp_path: Path) -> None:
    code = "import socket\ntry: socket.create_connection(('stats.example.org', 443), 1)\nexcept OSError: pass"
    assert "looked up stats.example.org" in run(tmp_path, "-c", code)[1]


def test_a_whole_command_reaches_nobody(tmp_path: Path) -> None:
    """Ray's cluster with its dashboard, MLflow's client and database, and a shard set."""
    (tmp_path / "pyproject.toml").touch()
    phantoms.write_card(tmp_path / "datasets", "quiet")
    phantoms.bids_tree(tmp_path / "raw", "quiet", num_subjects=2)
    (tmp_path / "tiny.yaml").write_text(
        "name: tiny\ningest: {cohorts: [quiet], size: 56, spacing_mm: 4.0, slice_spacing_mm: 8.0, min_brain: 0.02, "
        "align: none}\n"
    )
    words = [
        "-m",
        "cranium.cli",
        "ingest",
        "tiny.yaml",
        "store=store",
        f"raw.quiet={tmp_path / 'raw' / 'quiet'}",
    ]
    done, noted = run(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    code = "from cranium.track import Tracker; t = Tracker('sqlite:///store/x.db', 'x'); t.finish(t.run('a', 'a', {}))"
    done, also = run(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert set(noted) | set(also) <= METADATA
