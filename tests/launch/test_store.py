from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from conf.errors import ClusterError
from conf.records import LedgerLine, PromptText, SampleRecord, TrainRecord
from launch.jsonl import read_lines
from launch.store import JobDirectory, RunDirectory, link_tree, write_atomically


def sample(item: str, tokens: int = 3) -> SampleRecord:
    return SampleRecord(arm="a", item_id=item, set="test", computed_tokens=tokens)


def step(number: int, tokens: int) -> TrainRecord:
    return TrainRecord(
        arm="a",
        step=number,
        examples=1,
        tokens=tokens,
        target_tokens=1,
        loss=1.0,
        learning_rate=0.1,
        grad_norm=None,
        step_seconds=1.0,
        device_seconds=1.0,
        usd=None,
    )


def test_only_a_finished_job_is_found(tmp_path: Path) -> None:
    job = JobDirectory(tmp_path, "k")
    job.begin(keeps_records=False)
    job.append(sample("1"))
    assert JobDirectory(tmp_path, "k").done() is None
    job.finish(seconds=2.5, hardware="cpu")
    done = JobDirectory(tmp_path, "k").done()
    assert done is not None and done.seconds == 2.5
    assert list(job.events()) == [sample("1")]


def test_a_killed_training_starts_again_and_its_work_stays_on_the_bill(tmp_path: Path) -> None:
    for attempt in range(2):
        job = JobDirectory(tmp_path, "k")
        job.begin(keeps_records=False)
        assert [e.tokens for e in job.events() if isinstance(e, LedgerLine)] == [15] * attempt
        job.append(step(1, 10))
        job.append(step(2, 5))
        job.close()
    job = JobDirectory(tmp_path, "k")
    job.begin(keeps_records=False)
    kept = list(job.events())
    job.close()
    assert [e.tokens for e in kept if isinstance(e, LedgerLine)] == [15, 15]
    assert {e.purpose for e in kept if isinstance(e, LedgerLine)} == {"redone"}


def test_a_killed_evaluation_goes_on_from_its_whole_records(tmp_path: Path) -> None:
    job = JobDirectory(tmp_path, "k")
    job.begin(keeps_records=True)
    job.append(sample("1"))
    job.append(sample("2"))
    job.close()
    text = job.records_path.read_bytes()
    job.records_path.write_bytes(text + text.splitlines()[0][:20])
    again = JobDirectory(tmp_path, "k")
    again.begin(keeps_records=True)
    assert list(again.events()) == [sample("1"), sample("2")]
    again.append(sample("3"))
    again.close()
    assert [e.item_id for e in again.events() if isinstance(e, SampleRecord)] == ["1", "2", "3"]


def write_for_ever(root: Path) -> None:
    job = JobDirectory(root, "k")
    job.begin(keeps_records=True)
    for i in range(10**9):
        job.append(sample(str(i)))


def test_a_killed_writer_leaves_whole_lines_in_order(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,))
    process.start()
    job = JobDirectory(tmp_path, "k")
    while len(list(read_lines(job.records_path))) < 50:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    found = [e.item_id for e in job.events() if isinstance(e, SampleRecord)]
    assert found == [str(i) for i in range(len(found))]
    assert len(found) >= 50


def hold(root: Path, ready: Path) -> None:
    run = RunDirectory(root, "r")  # kept: a lock goes with its object
    run.open()
    ready.touch()
    time.sleep(60)


def test_a_second_writer_is_refused_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, ready))
    process.start()
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(ClusterError, match=str(process.pid)):
        RunDirectory(tmp_path, "r").open()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    run = RunDirectory(tmp_path, "r")
    run.open()
    run.close()


def test_a_run_directory_is_rebuilt_but_its_journal_only_grows(tmp_path: Path) -> None:
    for _ in range(2):
        run = RunDirectory(tmp_path, "r")
        run.open()
        run.append(sample("1"), job="j", arm="a")
        run.append(PromptText(prompt_sha256="p", arm="a", text="t"), job="j", arm="a")
        run.append(PromptText(prompt_sha256="p", arm="a", text="t"), job="j", arm="a")
        run.append(LedgerLine(job="j", arm="a", purpose="test", tokens=3), job="j", arm="a")
        run.close()
    assert len(list(read_lines(run.path / "arms/a/samples.jsonl"))) == 1
    assert len(list(read_lines(run.path / "prompts.jsonl"))) == 1
    assert len(list(read_lines(run.path / "journal.jsonl"))) == 2


def test_link_tree_shows_the_same_bytes_and_replaces_an_older_tree(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x").write_text("1")
    target = tmp_path / "t"
    link_tree(tmp_path / "a", target)
    (tmp_path / "a/b/y").write_text("2")
    link_tree(tmp_path / "a", target)
    assert sorted(p.name for p in target.rglob("*") if p.is_file()) == ["x", "y"]
    assert (target / "b/x").stat().st_ino == (tmp_path / "a/b/x").stat().st_ino


def test_an_atomic_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "f.json", json.dumps({"a": 1}))
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]
