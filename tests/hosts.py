"""Hosts on this machine: namespaces of network and processes, joined by a switch, with Ray; a tunnel to the head.

Needs root, iproute2 and util-linux. Each host sees its own loopback, the others' addresses and its own processes, and
nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
ADDRESSES = {"head": "10.77.0.1", "node": "10.77.0.2", "other": "10.77.0.3"}
GCS = f"{ADDRESSES['head']}:6379"
START = ("ray", "start", "--block", "--disable-usage-stats", "--object-store-memory=150000000")
# Runs on the head: what comes in by a socket file goes to its dashboard, as with `ssh -L` or `kubectl port-forward`.
FAR_END = """
import asyncio, sys
async def pump(a, b):
    try:
        while data := await a.read(65536):
            b.write(data); await b.drain()
    except ConnectionError: pass
    finally: b.close()
async def serve(reader, writer):
    try: there = await asyncio.open_connection("127.0.0.1", 8265)
    except OSError: writer.close(); return
    await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))
async def main():
    async with await asyncio.start_unix_server(serve, sys.argv[1]) as server: await server.serve_forever()
asyncio.run(main())
"""


def missing() -> str:
    """What keeps this machine from being several hosts; empty when nothing does."""
    if os.getuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return "needs root, iproute2 and util-linux for namespaces"
    name = f"cr-{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode != 0:
        return "no network namespace can be made here"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@dataclass
class Hosts:
    folder: Path
    names: Sequence[str] = ("head", "node")
    cpus: int = 4  # that a node offers; the head has none, as in the deployments
    settings: dict[str, str] = field(default_factory=dict)  # variables of all nodes
    tag: str = field(default_factory=lambda: secrets.token_hex(3))
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    started: dict[str, list[psutil.Process]] = field(default_factory=dict)  # host -> what runs there

    def namespace(self, host: str) -> str:
        return f"cr-{self.tag}-{host}"

    def environment(self) -> dict[str, str]:
        """What a node is started with: its own Python on the PATH, a token, and nothing of this process's Ray."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CRANIUM_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return {
            **kept,
            "PATH": path,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9",
            "RAY_TMPDIR": str(self.folder),
            **self.settings,
        }

    def run(self, host: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A command on a host, to its end."""
        command = ["ip", "netns", "exec", self.namespace(host), *words]
        return subprocess.run(
            command, env=self.environment() | more, capture_output=True, text=True, timeout=120
        )

    def inside(self, host: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A command beside a host's Ray, as in its container: it sees the processes of that host alone."""
        (ray,) = self.started[host][0].children()
        command = ["nsenter", f"--target={ray.pid}", "--net", "--pid", "--mount", *words]
        return subprocess.run(
            command, env=self.environment() | more, capture_output=True, text=True, timeout=120
        )

    def begin(self, host: str, *words: str) -> None:
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["ip", "netns", "exec", self.namespace(host), *alone, *words]
        with (self.folder / f"{host}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment(), stdout=log, stderr=log, start_new_session=True
            )
        self.started.setdefault(host, []).append(psutil.Process(process.pid))

    def cable(self) -> None:
        switch = self.namespace("switch")
        subprocess.run(["ip", "netns", "add", switch], check=True)
        subprocess.run(["ip", "-n", switch, "link", "add", "switch", "type", "bridge"], check=True)
        subprocess.run(["ip", "-n", switch, "link", "set", "switch", "up"], check=True)
        for host in self.names:
            end, name = f"cr{self.tag}{host[0]}", self.namespace(host)
            subprocess.run(["ip", "netns", "add", name], check=True)
            link = ["link", "add", host, "type", "veth", "peer", "name", end, "netns", name]
            for at, words in (
                (switch, link),
                (switch, ["link", "set", host, "master", "switch", "up"]),
                (name, ["addr", "add", f"{ADDRESSES[host]}/24", "dev", end]),
                (name, ["link", "set", end, "up"]),
                (name, ["link", "set", "lo", "up"]),
                (name, ["route", "add", "default", "dev", end]),  # Ray learns its own address by the way out
            ):
                subprocess.run(["ip", "-n", at, *words], check=True)

    def ray(self) -> None:
        """A head without CPUs, and the nodes, as the deployments start them."""
        head = [
            f"--node-ip-address={ADDRESSES['head']}",
            "--port=6379",
            "--num-cpus=0",
            "--dashboard-host=127.0.0.1",
        ]
        self.begin("head", *START, "--head", *head, f"--temp-dir={self.folder}")
        deadline = time.monotonic() + 120
        while self.run("head", "ray", "health-check", "--address", GCS).returncode:
            assert time.monotonic() < deadline, (self.folder / "head.log").read_text()
        for host in self.names[1:]:
            self.join(host)
        self.begin("head", sys.executable, "-c", FAR_END, str(self.folder / "tunnel"))

    def join(self, host: str) -> None:
        """Start a host's node, or one in place of that which was there."""
        node = [f"--node-ip-address={ADDRESSES[host]}", f"--address={GCS}", f"--num-cpus={self.cpus}"]
        node += [
            f"--temp-dir={self.folder / host}"
        ]  # two that start at once in one would take the same socket
        self.begin(host, *START, *node)

    def kill(self, *hosts: str) -> None:
        """Everything on these hosts (or all) at once, as when the power goes."""
        everyone = []
        for host in hosts or tuple(self.started):
            for process in self.started.pop(host, []):
                with contextlib.suppress(psutil.Error):
                    everyone += [process, *process.children(recursive=True)]
        for process in everyone:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(everyone, timeout=10)


@contextlib.contextmanager
def tunnel(folder: Path) -> Iterator[str]:
    """The near end: an address of this machine that leads to the head's dashboard."""
    loop, ready, port = asyncio.new_event_loop(), threading.Event(), [0]

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_unix_connection(str(folder / "tunnel"))
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port[0] = server.sockets[0].getsockname()[1]
        ready.set()

    def forever() -> None:
        loop.create_task(main())
        loop.run_forever()

    threading.Thread(target=forever, daemon=True).start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)


@contextlib.contextmanager
def hosts(*names: str, cpus: int = 4, **settings: str) -> Iterator[Hosts]:
    """A head and nodes (`ADDRESSES` has their names) with Ray on them; they, and all they run, are gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="cr-", dir="/tmp"))  # short: sockets' paths may have 107 bytes
    made = Hosts(folder, ("head", *names), cpus, settings)
    try:
        made.cable()
        made.ray()
        yield made
    finally:
        made.kill()
        for host in (*made.names, "switch"):
            subprocess.run(["ip", "netns", "del", made.namespace(host)], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Laptop:
    """Somebody who sends jobs: has a tunnel's end, the token, and a Python of its own."""

    to: Hosts
    folder: Path  # where its experiments are
    address: str

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """`cranium <words>` on the cluster at the address; what it prints, both streams, is for who waits."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CRANIUM_"))}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.to.token}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")]
        )
        return subprocess.Popen(
            [sys.executable, "-m", "cranium.cli", *words, f"address={self.address}"],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def asked(self, path: str, token: str = "") -> bytes:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with urllib.request.urlopen(
            urllib.request.Request(self.address + path, headers=headers), timeout=20
        ) as answer:
            return bytes(answer.read())

    def alive(self) -> set[str]:
        """Addresses of the nodes that are there; none while the dashboard does not answer."""
        with contextlib.suppress(OSError):
            told = json.loads(self.asked("/api/v0/nodes", self.to.token))
            nodes = told["data"]["result"]["result"]
            return {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}
        return set()

    def wait(self, *hosts: str) -> None:
        """Until the dashboard answers, and the nodes are those of these hosts (or of all)."""
        wanted, deadline = {ADDRESSES[host] for host in hosts or self.to.names}, time.monotonic() + 120
        while self.alive() != wanted:
            logs = "".join(log.read_text()[-2000:] for log in self.to.folder.glob("*.log"))
            assert time.monotonic() < deadline, f"{self.alive()} for {wanted}\n{logs}"
            time.sleep(0.5)
