"""A run online, against a server on loopback that answers, dies, or stops answering."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.tracking.wandb_log import history
from tests.launch.tracking.wandb_server import WandbServer
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[3]
KEY = "canary0123456789abcdef0123456789abcdef01"
pytestmark = [pytest.mark.slow, pytest.mark.all_cores]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    made = WandbServer()
    made.start()
    yield made
    made.die()


def environment(server: WandbServer) -> dict[str, str]:
    return {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}


def start(server: WandbServer, root: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch.py", "+exp=smoke", "tracking.wandb=online", *overrides]
        + ["tracking.alert=true", f"run.root={root}", "run.name=r"],
        cwd=ROOT,
        env=environment(server),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def logged(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Run -> the rows that the client wrote beside the run; one that failed to start has none."""
    files = (root / "r" / "wandb").glob("*run-*/run-*.wandb")
    rows = [(path.stem.removeprefix("run-"), history(path)) for path in files]
    return {run: found for run, found in rows if found}


def send(server: WandbServer, root: Path) -> None:
    """What a run that missed its server tells its user to type."""
    for path in sorted((root / "r" / "wandb").glob("*run-*")):
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", "--no-skip-online", str(path)],
            env=environment(server),
            check=True,
            capture_output=True,
            timeout=HANG_SECONDS,
        )


def assert_whole(server: WandbServer, root: Path) -> None:
    """Every row is there once, with its numbers."""
    wanted = logged(root)
    assert set(server.rows) == set(wanted) and len(wanted) == 4  # three arms and the summary
    for run, rows in wanted.items():
        assert sorted(server.rows[run]) == list(range(len(rows)))
        for i, row in enumerate(rows):
            numbers = {k: v for k, v in row.items() if "/" in k}
            assert numbers.items() <= server.rows[run][i].items()


def assert_nothing_leaks(server: WandbServer, root: Path) -> None:
    """The key is in no file, and no text of an item was sent."""
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert KEY.encode() not in path.read_bytes(), path
    items = [json.loads(line) for line in (root / "r/items.jsonl").read_text().splitlines()]
    texts = [item["input"].encode() for item in items if len(item["input"]) > 20]
    assert texts and not any(text in body for body in server.bodies for text in texts)


def wait_for_rows(server: WandbServer, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while server.num_rows() < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_all_rows_arrive_and_one_alert(server: WandbServer, tmp_path: Path) -> None:
    process = start(server, tmp_path)
    text = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 0 and "W&B" not in text, text
    assert_whole(server, tmp_path)
    assert_nothing_leaks(server, tmp_path)
    (alert,) = server.alerts
    assert (alert["title"], alert["severity"]) == ("r is done", "INFO")
    assert alert["text"].startswith("Verdict: ")


def test_a_budget_that_is_reached_sends_a_warning(server: WandbServer, tmp_path: Path) -> None:
    process = start(server, tmp_path, "budget.max_wall_seconds=0.01")
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 3
    (alert,) = server.alerts
    assert (alert["title"], alert["severity"]) == ("r has reached its budget", "WARN")


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_server_that_goes_away_loses_no_row(
    server: WandbServer, tmp_path: Path, fault: str
) -> None:
    process = start(server, tmp_path)
    wait_for_rows(server, process)
    getattr(server, fault)()
    text = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 0 and "Traceback" not in text, text
    assert f"wandb sync --no-skip-online {tmp_path}/r/wandb/*run-*" in text
    server.come_back()
    send(server, tmp_path)
    assert_whole(server, tmp_path)


def test_a_server_that_is_not_there_from_the_start(server: WandbServer, tmp_path: Path) -> None:
    """Nobody listens: it is waited for once, for 10 s, and all rows can be sent later."""
    server.die()
    process = start(server, tmp_path)
    text = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 0 and "Traceback" not in text, text
    assert text.count("W&B did not start") == 1, text
    assert f"wandb sync --no-skip-online {tmp_path}/r/wandb/*run-*" in text
    assert len(logged(tmp_path)) == 4
    server.come_back()
    send(server, tmp_path)
    assert_whole(server, tmp_path)
