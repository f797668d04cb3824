"""What the row on orchestration reads of a run, on a made one with known seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.orchestration_rows import read_orchestration


def event(time: float, name: str, job: str | None = None, **data: Any) -> dict[str, Any]:
    return {"time": time, "event": name, "job": job, "data": data}


def bill(time: float, job: str, seconds: float, *, is_reused: bool = False) -> dict[str, Any]:
    line = {"job": job, "arm": "a", "purpose": "test", "is_reused": is_reused}
    return event(time, "ledger", job) | {"data": line | {"device_seconds": seconds}}


def test_what_is_no_work_is_counted_by_where_it_went(tmp_path: Path) -> None:
    """Two devices: a training on both, then two evaluations at once, each on one of them."""
    journal = [
        event(104.0, "run_started"),
        event(105.0, "job_started", "train:a"),
        bill(125.0, "train:a", 2 * 17.0),
        event(125.0, "job_done", "train:a"),
        event(126.0, "job_started", "evaluate:a"),
        event(126.0, "job_started", "evaluate:b"),
        bill(136.0, "evaluate:a", 8.0),
        event(136.0, "job_done", "evaluate:a"),
        bill(138.0, "evaluate:b", 10.0),
        bill(138.0, "evaluate:b", 99.0, is_reused=True),
        event(138.0, "job_done", "evaluate:b"),
        event(141.0, "run_finished", exit_code=0),
    ]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in journal))
    head = {"config": {"arms": {}}, "hardware": {"devices": 2}}
    (tmp_path / "config.json").write_text(json.dumps(head))
    run = read_orchestration(tmp_path, began=100.0, ended=142.0)
    assert run.seconds == 42.0 and run.jobs == 3
    assert run.work == 17.0 + 4.0 + 5.0
    assert run.orchestration == 16.0
    assert run.allowed == pytest.approx(15.0 + 0.84)
    assert run.stages == {"before": 5.0, "between": 1.0, "after": 4.0}
    assert run.beside == {"train": 3.0, "evaluate": (10.0 - 4.0) + (12.0 - 5.0)}
