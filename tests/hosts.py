"""Two hosts on this machine: network namespaces joined by a cable, a Ray node in each, a tunnel to the dashboard.

Needs root and iproute2. Each host sees its own loopback and the other's address, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
ADDRESSES = {"head": "10.77.0.1", "node": "10.77.0.2"}
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
    """What keeps this machine from being two hosts; empty when nothing does."""
    if os.getuid() != 0 or not shutil.which("ip"):
        return "needs root and iproute2 for network namespaces"
    name = f"cr-{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode != 0:
        return "no network namespace can be made here"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@dataclass
class Hosts:
    folder: Path
    tag: str = field(default_factory=lambda: secrets.token_hex(3))
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    started: list[psutil.Process] = field(default_factory=list)

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
        }

    def run(self, host: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A command on a host, to its end."""
        command = ["ip", "netns", "exec", self.namespace(host), *words]
        return subprocess.run(
            command, env=self.environment() | more, capture_output=True, text=True, timeout=120
        )

    def begin(self, host: str, *words: str) -> None:
        command = ["ip", "netns", "exec", self.namespace(host), *words]
        with (self.folder / f"{host}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment(), stdout=log, stderr=log, start_new_session=True
            )
        self.started.append(psutil.Process(process.pid))

    def cable(self) -> None:
        ends = {host: f"cr{self.tag}{host[0]}" for host in ADDRESSES}
        for host in ADDRESSES:
            subprocess.run(["ip", "netns", "add", self.namespace(host)], check=True)
        link = ["ip", "link", "add", ends["head"], "type", "veth", "peer", "name", ends["node"]]
        subprocess.run(link, check=True)
        for host, address in ADDRESSES.items():
            subprocess.run(["ip", "link", "set", ends[host], "netns", self.namespace(host)], check=True)
            for words in (
                ["addr", "add", f"{address}/24", "dev", ends[host]],
                ["link", "set", ends[host], "up"],
                ["link", "set", "lo", "up"],
                ["route", "add", "default", "dev", ends[host]],  # Ray learns its own address by the way out
            ):
                subprocess.run(["ip", "-n", self.namespace(host), *words], check=True)

    def ray(self) -> None:
        """A head without CPUs and a node with four, as the deployments start them."""
        start = ["ray", "start", "--block", "--disable-usage-stats", "--object-store-memory=150000000"]
        head = [
            f"--node-ip-address={ADDRESSES['head']}",
            "--port=6379",
            "--num-cpus=0",
            "--dashboard-host=127.0.0.1",
        ]
        self.begin("head", *start, "--head", *head, f"--temp-dir={self.folder}")
        deadline = time.monotonic() + 120
        while self.run("head", "ray", "health-check", "--address", f"{ADDRESSES['head']}:6379").returncode:
            assert time.monotonic() < deadline, (self.folder / "head.log").read_text()
        node = [
            f"--node-ip-address={ADDRESSES['node']}",
            f"--address={ADDRESSES['head']}:6379",
            "--num-cpus=4",
        ]
        self.begin("node", *start, *node)
        self.begin("head", sys.executable, "-c", FAR_END, str(self.folder / "tunnel"))

    def kill(self) -> None:
        """Everything on both hosts at once, as when the power goes."""
        everyone = []
        for process in self.started:
            with contextlib.suppress(psutil.Error):
                everyone += [process, *process.children(recursive=True)]
        for process in everyone:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(everyone, timeout=10)
        self.started.clear()


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
def hosts() -> Iterator[Hosts]:
    """Two hosts with Ray on them; both, and all they run, are gone at the end."""
    made = Hosts(Path(tempfile.mkdtemp(prefix="cr-", dir="/tmp")))  # short: sockets' paths may have 107 bytes
    try:
        made.cable()
        made.ray()
        yield made
    finally:
        made.kill()
        for host in ADDRESSES:
            subprocess.run(["ip", "netns", "del", made.namespace(host)], capture_output=True)
        shutil.rmtree(made.folder, ignore_errors=True)
