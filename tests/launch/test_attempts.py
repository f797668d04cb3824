"""Attempts of a training that die at any point: each step once, every second and token billed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import JobFailed
from conf.records import LedgerLine, Progress, TrainRecord, TrainSummary
from launch.attempts import (
    ask_to_stop,
    each_step_once,
    left_streams,
    stop_path,
    stream_line,
    stream_path,
    training_ledger,
)
from launch.logs.errors_file import note_failure
from launch.store import JobDirectory, RunDirectory
from launch.train_workers import append_line, ending
from training.job import PeerLost, TrainingStopped, WorkerLost


def step(number: int, *, seconds: float = 1.0, tokens: int | None = None) -> TrainRecord:
    return TrainRecord(
        arm="a",
        step=number,
        examples=1,
        tokens=10 * number if tokens is None else tokens,
        target_tokens=1,
        loss=1.0 / number,
        learning_rate=0.1,
        grad_norm=None,
        step_seconds=seconds,
        device_seconds=2 * seconds,
        usd=None,
    )


def summary(steps: int, *, device_seconds: float) -> TrainSummary:
    return TrainSummary(
        arm="a",
        steps=steps,
        trained_parameters=1,
        total_parameters=1,
        checkpoint_bytes=1,
        device_seconds=device_seconds,
        peak_memory_bytes=None,
        examples=steps,
        tokens=sum(10 * s for s in range(1, steps + 1)),
        target_tokens=steps,
        padding_tokens=3,
        num_truncated=0,
        learning_rate=0.1,
        world_size=1,
        zero_stage=0,
        shown_row="",
    )


def write_stream(
    points: Path, attempt: int, events: list[TrainRecord | TrainSummary], *, loading: float
) -> None:
    """What a worker leaves: a first line, `loading` wall seconds, then the events one by one."""
    points.mkdir(parents=True, exist_ok=True)
    at, text = 100.0, stream_line(Progress(done=0, total=9, note="loading"), devices=2)
    lines = [json.loads(text) | {"at": at}]
    at += loading
    lines.append(json.loads(text) | {"at": at})
    for event in events:
        at += event.step_seconds if isinstance(event, TrainRecord) else 0.0
        lines.append(json.loads(stream_line(event, devices=2)) | {"at": at})
    stream_path(points, f"{attempt:03d}").write_text("".join(json.dumps(x) + "\n" for x in lines))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequence_of_deaths_leaves_each_step_once_and_the_whole_bill(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    job = JobDirectory(tmp_path_factory.mktemp("job"), "k")
    total, seconds_paid, tokens_paid, done = data.draw(st.integers(1, 8)), 0.0, 0, 0
    clock = 0.0
    for attempt in range(data.draw(st.integers(0, 4))):  # attempts that die
        start = data.draw(st.integers(0, done))  # the state it goes on from
        last = data.draw(st.integers(start, total))
        records = []
        for number in range(start + 1, last + 1):
            clock += 0.25
            records.append(step(number, seconds=clock))
        read = data.draw(st.integers(0, len(records)))  # so far its driver came
        job.begin(keeps_records=True)
        for record in records[:read]:
            job.append(record)
        job.close()
        write_stream(job.points, attempt, list(records), loading=3.0)
        seconds_paid += 2 * 3.0 + sum(r.device_seconds for r in records)
        tokens_paid += sum(r.tokens for r in records)
        done = last if records else done
    job.begin(keeps_records=True)
    job.close()
    kept = list(job.events())
    standing = [e for e in kept if isinstance(e, TrainRecord)]
    redone = [e for e in kept if isinstance(e, LedgerLine)]
    assert [r.step for r in standing] == list(range(1, done + 1))
    assert {line.purpose for line in redone} <= {"redone"}
    seconds = sum(e.device_seconds for e in [*standing, *redone])
    assert seconds == pytest.approx(seconds_paid)
    assert sum(e.tokens for e in [*standing, *redone]) == tokens_paid
    assert not left_streams(job.points)


def test_a_stream_is_taken_in_once_even_if_its_removal_was_lost(tmp_path: Path) -> None:
    job = JobDirectory(tmp_path, "k")
    write_stream(job.points, 1, [step(1), step(2)], loading=5.0)
    kept_file = left_streams(job.points)[0].read_text()
    job.begin(keeps_records=True)
    job.close()
    first = list(job.events())
    assert first
    stream_path(job.points, "001").write_text(kept_file)
    job.begin(keeps_records=True)
    job.close()
    assert list(job.events()) == first


def test_a_training_whose_driver_died_last_is_whole(tmp_path: Path) -> None:
    """The worker finished; nobody read its last lines. Steps 1 and 2 are of an earlier attempt."""
    job = JobDirectory(tmp_path, "k")
    job.begin(keeps_records=True)
    for record in (step(1), step(2), step(3, seconds=7.0)):
        job.append(record)
    job.close()
    end = summary(4, device_seconds=50.0)
    write_stream(job.points, 1, [step(3), step(4), end], loading=1.0)
    job.begin(keeps_records=True)
    job.close()
    kept = list(job.events())
    assert [e.step for e in kept if isinstance(e, TrainRecord)] == [1, 2, 3, 4]
    (whole,) = [e for e in kept if isinstance(e, TrainSummary)]
    assert whole == dataclasses.replace(end, device_seconds=50.0 + 2 * 2.0)
    bill = {e.purpose: e for e in kept if isinstance(e, LedgerLine) and (e.tokens or e.purpose)}
    assert (bill["train"].tokens, bill["train"].device_seconds) == (100, 54.0)
    redone = [e for e in kept if isinstance(e, LedgerLine) and e.purpose == "redone"]
    assert (sum(e.tokens for e in redone), sum(e.device_seconds for e in redone)) == (30, 14.0)


def test_records_of_other_jobs_pass_and_an_end_that_was_none_is_dropped() -> None:
    line = LedgerLine(job="j", arm="a", purpose="test", tokens=3)
    assert each_step_once([line, line]) == [line, line]
    end = summary(2, device_seconds=9.0)
    ended = [step(1), step(2), *training_ledger(end, job="j", arm="a"), end]
    again = each_step_once([*ended, step(2)])
    assert [type(e) for e in again] == [TrainRecord, TrainRecord, LedgerLine, LedgerLine]
    assert [e.purpose for e in again if isinstance(e, LedgerLine)] == ["redone", "redone"]


def test_what_was_paid_earlier_stands_on_a_line_of_its_own() -> None:
    end = summary(3, device_seconds=10.0)
    lines = training_ledger(end, job="j", arm="a", paid=[step(1)])
    train = [(e.tokens, e.device_seconds, e.is_reused) for e in lines if e.purpose == "train"]
    assert train == [(10, 2.0, True), (50, 8.0, False)]


def test_a_worker_that_was_left_over_cannot_write_and_a_stop_reaches_the_running_one(
    tmp_path: Path,
) -> None:
    stream = stream_path(tmp_path, "1")
    with pytest.raises(WorkerLost, match="newer attempt"):
        append_line(stream, "x\n")
    assert not stream.exists()
    stream.touch()
    append_line(stream, "x\n")
    append_line(stream, "y\n")
    assert stream.read_text() == "x\ny\n"
    ask_to_stop(tmp_path)
    ask_to_stop(tmp_path)
    assert stop_path(stream).exists()


def test_the_run_directory_goes_back_with_its_training_and_keeps_other_trials(
    tmp_path: Path,
) -> None:
    run = RunDirectory(tmp_path, "r")
    run.open()
    other = dataclasses.replace(step(9), trial=1)
    for record in (step(1), other, step(2)):
        run.append(record, job="train:a", arm="a")
    run.rewrite_steps("a", [step(1)])
    run.append(step(2), job="train:a", arm="a")
    run.close()
    lines = [json.loads(x) for x in (run.path / "arms/a/train.jsonl").read_text().splitlines()]
    assert [(x["trial"], x["step"]) for x in lines] == [(1, 9), (None, 1), (None, 2)]


# --- How an attempt ended -----------------------------------------------------------------------


class ActorDiedError(Exception):
    """Ray's name for it."""


class GroupError(Exception):
    """As Ray Train's: worker_failures by rank."""

    def __init__(self, **failures: Exception) -> None:
        self.worker_failures = {int(k[1:]): e for k, e in failures.items()}


GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")

# Words of real workers: one that waited, one that ran out of memory, told and untold.
NO_ANSWER = PeerLost("worker 0 of 2 got no answer from another in step 5: [gloo] Timed out")
OUT_OF_MEMORY = WorkerLost("worker 1 ran out of memory in step 5; the next takes at most 1 rows")
ALLOCATION = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    ("words", "error", "kind", "text"),
    [
        # A worker was killed; the other one lost its connection.
        (
            {0: GLOO},
            GroupError(r0=GLOO, r1=ActorDiedError("gone")),
            WorkerLost,
            "worker 1 was lost",
        ),
        ({0: GLOO}, GroupError(r0=GLOO), WorkerLost, "worker 0 lost touch"),
        ({0: NO_ANSWER, 1: GLOO}, GroupError(r0=GLOO), WorkerLost, "no answer"),
        # Both failed: the one that waited ended too, and often first.
        ({0: NO_ANSWER, 1: OUT_OF_MEMORY}, GroupError(r0=NO_ANSWER), WorkerLost, "at most 1 rows"),
        ({0: OUT_OF_MEMORY, 1: NO_ANSWER}, GroupError(r1=NO_ANSWER), WorkerLost, "at most 1 rows"),
        ({0: NO_ANSWER, 1: ALLOCATION}, GroupError(r0=NO_ANSWER), JobFailed, "worker 1: RuntimeE"),
        ({0: NO_ANSWER, 1: OSError(28, "No space")}, GroupError(r0=GLOO), JobFailed, "No space"),
        (
            {0: NO_ANSWER, 1: JobFailed("out of memory with a single row")},
            GroupError(r0=NO_ANSWER),
            JobFailed,
            "single row",
        ),
        (
            {0: NO_ANSWER},
            GroupError(r0=NO_ANSWER, r1=ActorDiedError("gone")),
            WorkerLost,
            "worker 1 was lost",
        ),
        ({2: NO_ANSWER, 10: NO_ANSWER}, GroupError(r2=GLOO), WorkerLost, "worker 2 lost touch"),
        # A worker failed of its own; the other one was merely cut off. No second attempt.
        ({0: GLOO, 1: JobFailed("loss is nan")}, GroupError(r0=GLOO), JobFailed, "loss is nan"),
        (
            {0: NO_ANSWER, 1: JobFailed("loss is nan")},
            GroupError(r0=GLOO),
            JobFailed,
            "loss is nan",
        ),
        ({0: GLOO, 1: OSError(28, "No space")}, GroupError(r0=GLOO), JobFailed, "No space"),
        ({}, ValueError("bad"), JobFailed, "ValueError: bad"),
        ({0: TrainingStopped(7)}, GroupError(r0=TrainingStopped(7)), TrainingStopped, "7"),
        # One stopped as it was told to, and then the rest fell apart: the state is there.
        ({0: TrainingStopped(7), 1: GLOO}, GroupError(r1=GLOO), TrainingStopped, "7"),
    ],
)
def test_the_first_cause_decides_whether_another_attempt_may_help(
    tmp_path: Path, words: dict[int, Exception], error: Exception, kind: type, text: str
) -> None:
    for rank, said in words.items():
        note_failure(tmp_path / f"{rank}.log", said)
    found = ending(tmp_path, error)
    assert type(found) is kind
    assert text in str(found)
