"""End what a driver that was killed has left behind.

Ray's raylet ends with its driver, but two of its agents stay (ray 2.60: DashboardAgent and
RuntimeEnvAgent, still there after a minute). A small process of its own session remembers the
driver's descendants, and ends those that outlive it. It kills nothing else, and nothing by name.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

import psutil

LOOK_SECONDS = 1.0
# How long processes have to end by themselves after their driver is gone.
GRACE_SECONDS = 5.0


def start() -> subprocess.Popen[bytes]:
    """Watch this process; its end closes the pipe, whichever way it ends."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch.watchdog", str(os.getpid())],
        stdin=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C in the terminal is the driver's, not the watchdog's
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )


def watch(driver_pid: int) -> None:
    """Remember the driver's descendants until its pipe closes, then end what is left of them."""
    descendants: dict[tuple[int, float], psutil.Process] = {}
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        try:
            found = psutil.Process(driver_pid).children(recursive=True)
        except psutil.NoSuchProcess:
            break
        mine = os.getpid()
        descendants |= {(p.pid, p.create_time()): p for p in found if p.pid != mine}
    time.sleep(GRACE_SECONDS)
    for process in descendants.values():
        try:
            if process.is_running():  # compares the creation time too, so a reused pid is safe
                process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    watch(int(sys.argv[1]))
