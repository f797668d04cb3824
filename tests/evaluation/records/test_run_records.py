"""Run directories read back: whole, cut off, damaged, repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.errors import DataError
from conf.hashing import plain
from conf.records import JournalEvent, LedgerLine
from evaluation.records.run_records import read_run
from tests.evaluation import fake_run


def test_a_run_reads_back(tmp_path: Path) -> None:
    records = read_run(fake_run.write_spam_run(tmp_path, num_test=20))
    assert records.experiment == "compare"
    assert list(records.arms) == list(fake_run.SPAM_ARMS)
    assert {a.status for a in records.arms.values()} == {"done"}
    assert records.base_arms("few_shot_on_lora") == ("few_shot_on_lora", "lora")
    assert records.arms["lora"].train_summary is not None
    assert len(records.arms["lora"].train) == 60
    assert records.arms["few_shot"].rule is not None
    assert records.arms["few_shot"].rule.calibration == "batch"
    assert records.pricing.device_hour.usd == 0.0408
    assert records.exit_code == 0 and records.num_broken_lines == 0


def test_a_cut_off_last_line_is_counted(tmp_path: Path) -> None:
    root = fake_run.write_spam_run(tmp_path, num_test=20)
    path = root / "arms" / "lora" / "samples.jsonl"
    whole = len(read_run(root).arms["lora"].samples)
    path.write_text(path.read_text()[:-30])
    records = read_run(root)
    assert records.num_broken_lines == 1
    assert len(records.arms["lora"].samples) == whole - 1


def test_a_damaged_line_in_the_middle_is_refused_with_its_number(tmp_path: Path) -> None:
    root = fake_run.write_spam_run(tmp_path, num_test=20)
    path = root / "journal.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:10]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as caught:
        read_run(root)
    assert caught.value.where == f"{path}:3"


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_run(tmp_path)
    assert "config.json" in caught.value.where and caught.value.remedy


def journal(root: Path, events: list[JournalEvent]) -> None:
    (root / "journal.jsonl").write_text("".join(json.dumps(plain(e)) + "\n" for e in events))


def ledger(job: str, seconds: float, *, is_reused: bool = False) -> JournalEvent:
    line = LedgerLine(
        job=job, arm="lora", purpose="train", device_seconds=seconds, is_reused=is_reused
    )
    return JournalEvent(time=0.0, event="ledger", job=job, arm="lora", data=plain(line))


def event(name: str, job: str | None = None, **data: object) -> JournalEvent:
    return JournalEvent(time=0.0, event=name, job=job, arm="lora" if job else None, data=dict(data))


def test_a_reused_job_keeps_its_cost_once(tmp_path: Path) -> None:
    root = fake_run.write_spam_run(tmp_path, num_test=20)
    journal(
        root,
        [
            event("run_started"),
            event("job_started", "train"),
            ledger("train", 7.0),
            event("job_done", "train"),
            event("run_started"),
            ledger("train", 7.0, is_reused=True),
            event("job_done", "train", is_reused=True),
            event("job_started", "test"),
            ledger("test", 2.0),
            event("job_done", "test"),
        ],
    )
    records = read_run(root)
    assert sorted(line.device_seconds for line in records.ledger) == [2.0, 7.0]
    assert [line.device_seconds for line in records.spent_now] == [2.0]
    assert not records.arms["lora"].is_reused


def test_a_new_attempt_replaces_the_bill_of_the_lost_one(tmp_path: Path) -> None:
    root = fake_run.write_spam_run(tmp_path, num_test=20)
    journal(
        root,
        [
            event("run_started"),
            event("job_started", "train"),
            ledger("train", 3.0),
            event("job_started", "train"),
            ledger("train", 7.0),
            ledger("train", 3.0),
            event("job_done", "train"),
        ],
    )
    records = read_run(root)
    assert sum(line.device_seconds for line in records.ledger) == 10.0
    assert records.spent_now == records.ledger


def test_failure_reaches_the_arm_that_stands_on_it(tmp_path: Path) -> None:
    root = fake_run.write_spam_run(tmp_path, num_test=20)
    for name in ("lora", "few_shot_on_lora"):
        (root / "arms" / name / "samples.jsonl").unlink()
    journal(
        root,
        [
            event("run_started"),
            event("job_started", "train:lora"),
            event("job_failed", "train:lora", error="not finite", remedy="lower the rate"),
        ],
    )
    arms = read_run(root).arms
    assert arms["lora"].status == "failed" and arms["lora"].error == "not finite\nlower the rate"
    assert arms["few_shot_on_lora"].status == "failed"
    assert arms["few_shot_on_lora"].error == "not run: the arm it stands on, lora, failed"


def test_a_failure_mended_by_a_retry_is_done(tmp_path: Path) -> None:
    root = fake_run.write_spam_run(tmp_path, num_test=20)
    journal(
        root,
        [
            event("run_started"),
            event("job_started", "evaluate:lora"),
            event("job_failed", "evaluate:lora", error="worker lost"),
            event("job_started", "evaluate:lora"),
            event("job_done", "evaluate:lora"),
        ],
    )
    assert read_run(root).arms["lora"].status == "done"


def test_an_arm_that_is_still_running_is_stopped_not_done(tmp_path: Path) -> None:
    root = fake_run.write_spam_run(tmp_path, num_test=20)
    journal(root, [event("run_started"), event("job_started", "evaluate:lora")])
    assert read_run(root).arms["lora"].status == "stopped"


def test_an_answer_written_twice_counts_once(tmp_path: Path) -> None:
    root = fake_run.write_spam_run(tmp_path, num_test=20)
    path = root / "arms" / "lora" / "samples.jsonl"
    before = read_run(root).arms["lora"].samples
    path.write_text(path.read_text() * 2)
    assert read_run(root).arms["lora"].samples == before
