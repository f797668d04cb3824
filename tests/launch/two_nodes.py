"""A Ray cluster of two nodes on this machine: real processes, a token, a dashboard on loopback.

Each node has a temporary directory of its own, as two machines have: with a common one the second
node unpacks a job's archive over the first one's. Paths are short, for sockets lie below them.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"


@dataclass(slots=True)
class TwoNodes:
    """The cluster, and a user's directory beside it."""

    base: Path
    environment: dict[str, str]
    dashboard: int = 0
    gcs: str = ""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def overrides(self) -> list[str]:
        """What a user adds to run there."""
        return [
            *("cluster=ray", f"cluster.address=http://127.0.0.1:{self.dashboard}"),
            *(f"cluster.storage={self.base / 'storage'}", f"cluster.python={sys.executable}"),
            "tracking=none",
        ]

    def inside(self, name: str) -> list[str]:
        """What a command begins with that runs on a node; nothing where all are one machine."""
        return []

    def start(self, name: str, *arguments: str) -> None:
        """Start a node; its processes form a group of their own."""
        with (self.base / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [*self.inside(name), str(RAY), "start", *arguments]
                + [f"--temp-dir={self.base / name}", "--block"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )

    def start_head(self) -> None:
        """A head with one core, on ports of its own; returns when it answers."""
        self.dashboard, port = free_port(), free_port()
        self.start(
            "head",
            *("--head", f"--port={port}", "--num-cpus=1", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={free_port()}"),
            *("--min-worker-port=0", "--max-worker-port=0"),
            f"--dashboard-agent-listen-port={free_port()}",
        )
        self.wait_for(1)
        self.gcs = _told_address(self.base / "head.log", port)

    def add_node(self, name: str, cores: int) -> None:
        """A further node; returns when the cluster has it."""
        before = self.num_nodes()
        self.start(name, f"--address={self.gcs}", f"--num-cpus={cores}")
        self.wait_for(before + 1)

    def num_nodes(self) -> int:
        """Nodes that are alive, as a user's machine is told."""
        found = self.launch("-c", NODES, str(self.dashboard)).stdout.split()
        return int(found[-1]) if found and found[-1].isdigit() else 0

    def wait_for(self, nodes: int) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while self.num_nodes() != nodes:
            logs = {p.name: p.read_text()[-800:] for p in self.base.glob("*.log")}
            assert time.monotonic() < deadline, f"no {nodes} nodes: {logs}"
            time.sleep(1)

    def kill(self, name: str) -> None:
        """End a node at once, with all of its processes, as a power cut does."""
        process = self.processes.pop(name)
        for child in [*psutil.Process(process.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def launch(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python as the user would, in the user's directory."""
        return subprocess.run(
            [*self.inside("head"), sys.executable, *arguments],
            cwd=self.base / "user",
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )

    def begin(self, *arguments: str) -> subprocess.Popen[Any]:
        """The same, left running; what it prints goes to user.log."""
        return subprocess.Popen(
            [*self.inside("head"), sys.executable, *arguments],
            cwd=self.base / "user",
            env=self.environment,
            stdout=(self.base / "user.log").open("ab"),
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


NODES = """
import sys
from ray.util.state import list_nodes
print(sum(n.state == "ALIVE" for n in list_nodes(address=f"http://127.0.0.1:{sys.argv[1]}")))
"""


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def _told_address(log: Path, port: int) -> str:
    """What the head says others should join it by, once it has said so."""
    deadline = time.monotonic() + HANG_SECONDS
    while (found := re.search(rf"\d+\.\d+\.\d+\.\d+:{port}", log.read_text())) is None:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return found.group()


@contextmanager
def two_nodes(kind: type[TwoNodes] = TwoNodes) -> Iterator[TwoNodes]:
    """A head and a second node with a core each."""
    base = Path(tempfile.mkdtemp(prefix="x", dir="/tmp"))
    for name in ("user", "storage"):
        (base / name).mkdir()
    found = kind(
        base=base,
        environment=os.environ
        | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_period_ms": "500",
            "PYTHONPATH": str(ROOT),
        },
    )
    try:
        found.start_head()
        found.add_node("second", 1)
        yield found
    finally:
        for name in list(found.processes):
            found.kill(name)
        shutil.rmtree(base, ignore_errors=True)
