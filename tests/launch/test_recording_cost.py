"""What it costs to write a run down, against what the run itself takes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from evaluation.records.run_records import read_run
from launch.jsonl import Lines
from tests.evaluation import fake_run


@pytest.mark.slow
def test_recording_costs_at_most_one_percent_of_a_run(tmp_path: Path) -> None:
    """Every record is appended twice, to its job's stream and to the run's; its seconds are summed.

    The made run has the requests' seconds of the embedded model on two cores, prompts scored alone.
    """
    root = fake_run.write_spam_run(tmp_path / "run", num_test=200)
    records = read_run(root)
    written = [r for arm in records.arms.values() for r in (*arm.samples, *arm.train)]
    writers = [Lines(tmp_path / "job.jsonl"), Lines(tmp_path / "run.jsonl")]
    start = time.perf_counter()
    for record in written:
        for writer in writers:
            writer.append(record)
    seconds = time.perf_counter() - start
    for writer in writers:
        writer.close()
    run_seconds = sum(line.device_seconds for line in records.ledger) / 2  # of two devices
    assert len(written) > 2000
    assert seconds <= 0.01 * run_seconds, f"{seconds:.2f} s of {run_seconds:.0f} s"
