"""launch.status and launch.runs: what the files of a run tell, also of one that was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.errors import ConfigError, DataError
from conf.hashing import plain
from conf.records import LedgerLine
from conf.run_groups import PricingConfig
from launch import runs
from launch.logs.errors_file import note_failure, note_worker, write_job_error
from launch.run_state import age, is_locked_here, view_run
from launch.spending import Spending
from launch.status import status
from launch.store import RunDirectory, write_json

ROOT = Path(__file__).resolve().parent.parent.parent


def make_run(root: Path, name: str, *, jobs: tuple[str, ...] = ("train:a", "evaluate:a")) -> Path:
    """A run directory whose journal tells nothing yet."""
    run = root / name
    write_json(run / "plan.json", {"jobs": [{"id": j, "key": f"key-{j}"} for j in jobs]})
    pricing = {**plain(PricingConfig()), "device_hour": {"usd": 3.6}}
    config = {"config": {"pricing": pricing}, "exp": "lora", "task": {"name": "tickets"}}
    write_json(run / "config.json", config)
    return run


def journalled(run: Path, *events: tuple[str, str | None, dict[str, Any]]) -> None:
    directory = RunDirectory(run.parent, run.name)
    directory.open()
    for name, job, data in events:
        directory.journal(name, job=job, arm="a", data=data)
    directory.close()


def failed_run(root: Path) -> Path:
    run = make_run(root, "r")
    logs = run / "logs"
    (logs / "train-a").mkdir(parents=True)
    note_worker(logs / "train-a" / "1.log")
    (logs / "train-a" / "1.stack").write_text("Thread 0x1\n")
    note_failure(logs / "train-a" / "1.log", ValueError("odd"))
    reason = "worker 1: ValueError: odd"
    write_job_error(logs, job="train:a", arm="a", error=None, reason=reason, attempts=2)
    spending = Spending(run)
    spending.add(job="k", device_seconds=40.0)
    spending.add(job="k", device_seconds=20.0, hosted_usd=0.5)
    journalled(
        run,
        ("run_started", None, {"command": "x"}),
        ("job_started", "train:a", {"attempt": 2}),
        ("job_failed", "train:a", {"error": reason, "remedy": "", "is_refused": False}),
        ("run_finished", None, {"exit_code": 1}),
    )
    return run


def test_a_failed_job_is_shown_with_node_worker_remedy_and_the_money_of_all_invocations(
    tmp_path: Path,
) -> None:
    text = status(failed_run(tmp_path))
    assert "exit code 1 (failed)" in text
    assert "last error: train:a: worker 1: ValueError: odd" in text
    assert f"where:  {os.uname().nodename}, worker 1" in text
    assert "remedy: see" in text and "1.stack" in text
    assert "60 device-seconds, 0.5600 USD" in text  # 60 s at 3.6 USD an hour, 0.5 for tokens
    job = next(line for line in text.splitlines() if line.startswith("  train:a"))
    assert "failed" in job and "attempt 2" in job and os.uname().nodename in job


def test_a_run_whose_driver_was_killed_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom launch.store import RunDirectory\n"
        f"run = RunDirectory(Path({str(tmp_path)!r}), 'r')\nrun.open()\n"
        "run.journal('run_started', data={'command': 'x'})\n"
        "run.journal('job_started', job='train:a', arm='a', data={'attempt': 1})\n"
        "print('ready', flush=True)\ntime.sleep(600)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert driver.stdout is not None and driver.stdout.readline() == b"ready\n"
        assert view_run(run).status == "running" and is_locked_here(run)
        assert "its driver runs on this machine" in status(run)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    records = tmp_path / ".cache" / "jobs" / "key-train:a" / "records.jsonl"
    records.parent.mkdir(parents=True)
    records.write_text("{}\n")
    os.utime(records, (4e9, 4e9))  # the worker's last record, newer than the journal
    view = view_run(run)
    assert view.status == "broken off" and not is_locked_here(run)
    assert (view.jobs[0].state, view.jobs[0].heartbeat, view.heartbeat) == ("running", 4e9, 4e9)
    text = status(run)
    assert "no driver on this machine" in text and "typed again, goes on from here" in text
    journalled(run)  # whoever looks has taken no lock


def test_a_new_invocation_is_not_told_by_the_last_ones_end(tmp_path: Path) -> None:
    run = failed_run(tmp_path)
    journalled(run, ("run_started", None, {"command": "x"}))
    view = view_run(run)
    assert view.exit_code is None and not view.errors
    assert [job.state for job in view.jobs] == ["waiting", "waiting"]
    assert view.spent is not None and view.spent.device_seconds == 60.0


def test_a_run_of_before_spending_was_noted_shows_its_bill(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    directory = RunDirectory(tmp_path, "r")
    directory.open()
    for is_reused in (True, False):
        line = LedgerLine(
            job="j", arm="a", purpose="test", tokens=1, device_seconds=7.0, is_reused=is_reused
        )
        directory.append(line, job="evaluate:a", arm="a")
    directory.close()
    view = view_run(run)
    assert view.spent is not None and view.spent.device_seconds == 7.0
    assert view.usd == pytest.approx(0.007)


def test_age_is_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1e6)
    shown = [age(when) for when in (None, 1e6 + 5, 1e6 - 30, 1e6 - 600, 1e6 - 7200, 1e6 - 2e5)]
    assert shown == ["-", "0 s ago", "30 s ago", "10 min ago", "2 h ago", "2 d ago"]


def test_runs_are_listed_newest_first_and_damaged_ones_are_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed_run(tmp_path)
    done = make_run(tmp_path, "done")
    journalled(done, ("run_finished", None, {"exit_code": 0}))
    choice = {"recommendation": {"arm": "lora", "verdict": "take lora"}}
    write_json(done / "results.json", choice)
    for name, file, text in (
        ("torn", "plan.json", '{"jobs": [{"id"'),
        ("other", "plan.json", "[]"),
        ("empty", "journal.jsonl", ""),
        ("binary", "plan.json", "\x00"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
        for path in (tmp_path / name / file, tmp_path / name):
            os.utime(path, (1e9, 1e9))
    bad_results = make_run(tmp_path, "bad_results")
    (bad_results / "results.json").write_text("[1]")
    (tmp_path / "no_run").mkdir()
    (tmp_path / ".cache").mkdir()
    found = {row.run: row for row in runs.rows(tmp_path)}
    assert set(found) == {"r", "done", "torn", "other", "empty", "binary", "bad_results"}
    assert (found["done"].status, found["done"].verdict, found["done"].arm) == (
        *("done", "take lora"),
        "lora",
    )
    assert (found["r"].status, found["r"].task, found["r"].usd) == ("failed", "tickets", 0.56)
    damaged = {name for name, row in found.items() if row.status == "damaged" and row.note}
    assert damaged == {"torn", "other", "empty", "binary", "bad_results"}
    whens = [row.when or 0.0 for row in runs.rows(tmp_path)]
    assert whens == sorted(whens, reverse=True) and whens[-1] == 1e9
    assert runs.main([str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in shown] == [row.run for row in runs.rows(tmp_path)]
    assert next(r for r in shown if r["run"] == "torn")["usd"] is None
    assert runs.main([str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in found) and "take lora" in table


def test_what_is_no_place_of_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no directory"):
        runs.rows(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="at most one directory"):
        runs.main(["a", "b"])
    with pytest.raises(DataError, match="no plan.json"):
        status(tmp_path)
    assert runs.main([str(tmp_path)]) == 0
