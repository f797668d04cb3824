"""A Ray cluster of two nodes with a network between them: own addresses, and a link that is cut.

Each node is in a network namespace of its own; a pair of virtual interfaces is the cable. The
nodes share the file system, as nodes with NFS do. Needs root and iproute2.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.launch.two_nodes import TwoNodes, two_nodes

ADDRESSES = {"head": "10.77.0.1", "second": "10.77.0.2"}
INTERFACE = "eth0"  # within its own namespace
# Ray's own take 15 s and more to call a node dead; these some 6 s of silence.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "6",
}


def namespace(name: str) -> str:
    """Of a node; several tests may run at a time."""
    return f"xover-{name}-{os.getpid()}"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass(slots=True)
class TwoHosts(TwoNodes):
    """Two nodes as TwoNodes has them, each with an address of its own."""

    def inside(self, name: str) -> list[str]:
        return ["ip", "netns", "exec", namespace(name)]

    def start(self, name: str, *arguments: str) -> None:
        TwoNodes.start(self, name, *arguments, f"--node-ip-address={ADDRESSES[name]}")

    def link(self, state: str) -> None:
        """up or down: pull the cable, or plug it in. Nobody is told; packets are lost."""
        ip("-n", namespace("second"), "link", "set", INTERFACE, state)


@contextmanager
def network() -> Iterator[None]:
    """A namespace for each node and a cable between them; removed with all that is in it."""
    made: list[str] = []
    try:
        for name in ADDRESSES:
            ip("netns", "add", namespace(name))
            made.append(namespace(name))
        first, second = made
        peer = ("peer", "name", INTERFACE, "netns", second)
        ip("link", "add", INTERFACE, "netns", first, "type", "veth", *peer)
        for name, address in ADDRESSES.items():
            ip("-n", namespace(name), "addr", "add", f"{address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                ip("-n", namespace(name), "link", "set", device, "up")
        yield
    finally:
        for name in made:
            ip("netns", "del", name)


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """A head and a second node with a core each, on a network of their own."""
    try:
        with network():
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    before = dict(os.environ)
    # gloo would look the host's name up, which is an address outside of the namespaces.
    os.environ.update(HEALTH | {"GLOO_SOCKET_IFNAME": INTERFACE})
    try:
        with network(), two_nodes(TwoHosts) as found:
            assert isinstance(found, TwoHosts)
            yield found
    finally:
        os.environ.clear()
        os.environ.update(before)
