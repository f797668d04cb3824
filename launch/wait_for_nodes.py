"""`python -m launch.wait_for_nodes N SECONDS`: ends when the Ray on this machine has N nodes."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any


def wait_for_nodes(count: int, seconds: float) -> bool:
    """Whether that many nodes joined in time; Ray itself may not have started yet."""
    import ray as untyped

    ray: Any = untyped
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if not ray.is_initialized():
                ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
            if sum(1 for node in ray.nodes() if node["Alive"]) >= count:
                ray.shutdown()
                return True
        except (ConnectionError, RuntimeError):  # not there yet
            pass
        time.sleep(1)
    return False


if __name__ == "__main__":
    wanted, patience = int(sys.argv[1]), float(sys.argv[2])
    if not wait_for_nodes(wanted, patience):
        sys.exit(f"No {wanted} nodes after {patience:g} s: the run does not start.")
