"""Legs of a full training as a worker runs them: together they are the training nobody cut."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from conf.records import LedgerLine, TrainRecord
from conf.resolve import resolve_arms
from conf.sweep_records import RungRecord
from evaluation.prepare import training_rows, write_rows
from evaluation.prompts.rendering import Renderer
from evaluation.search.rung_rows import rung_rows
from evaluation.tasks import Task
from launch.compose import compose_config
from launch.placement import Machine
from launch.search.leg_run import Leg, as_leg, run_leg, step_at, summary_of
from launch.search.messages import RUNG_ROWS
from launch.train_plan import training_job
from training.job import FINAL, TrainJob, checkpoint_directory

CPU = Machine(devices=1, devices_per_node=1, device="cpu", name="1 x test")
SHARES = (0.2, 0.4, 1.0)


class Killed(BaseException):
    """Stands for the end of the process."""


class Told:
    """A runtime of one worker that keeps all it is told, and may end its process at a step."""

    global_rank = local_rank = 0
    world_size = 1

    def __init__(self, *, ends_at: int = 0) -> None:
        self.records: list[Any] = []
        self.ends_at = ends_at

    def report(self, record: object) -> None:
        """Keep a record."""
        self.records.append(record)
        if isinstance(record, TrainRecord) and record.step == self.ends_at:
            raise Killed

    def should_save(self) -> bool:
        """Nobody asks."""
        return False

    @property
    def steps(self) -> list[TrainRecord]:
        """The steps told."""
        return [record for record in self.records if isinstance(record, TrainRecord)]

    def lines(self, purpose: str) -> list[LedgerLine]:
        """The lines of a purpose."""
        lines = [record for record in self.records if isinstance(record, LedgerLine)]
        return [line for line in lines if line.purpose == purpose]


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one worker."""
    store = tmp_path_factory.mktemp("group") / "store"
    with pytest.MonkeyPatch.context() as patch:
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            patch.setenv(name, value)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture
def job(tiny_model_dir: Path, topic_task: Task, tmp_path: Path) -> TrainJob:
    config = compose_config(
        ["+exp=full", "model=tiny", "trainer.epochs=1", "trainer.state_every_steps=1"]
    )
    arm = resolve_arms(config)["full"]
    renderer = Renderer.load(tiny_model_dir, layout="plain")
    write_rows(training_rows(topic_task, arm, renderer).rows, tmp_path / "rows.jsonl")
    write_rows(rung_rows(topic_task, arm, renderer), tmp_path / RUNG_ROWS)
    made = training_job(
        arm, machine=CPU, workers=1, device_memory_bytes=None, model_dir=str(tiny_model_dir)
    )
    made = dataclasses.replace(made, rows_path=str(tmp_path / "rows.jsonl"))
    return as_leg(made, trial=3)


@pytest.fixture
def run(job: TrainJob, tmp_path: Path) -> Callable[..., Told]:
    """run(rung) -> what the leg to this rung told."""

    def run(rung: int, *, shares: tuple[float, ...] = SHARES, name: str = "t", **at: int) -> Told:
        told = Told(**at)
        leg = Leg(
            rung=rung,
            share=shares[rung],
            share_before=shares[rung - 1] if rung else 0.0,
            previous=str(tmp_path / f"{name}{rung - 1}") if rung else "",
            rung_rows_path=str(tmp_path / RUNG_ROWS),
        )
        run_leg(leg, dataclasses.replace(job, output_dir=str(tmp_path / f"{name}{rung}")), told)
        return told

    return run


def check_whole(legs: list[Told], whole: Told) -> None:
    """The steps of legs are those of the whole training, each once and with the same numbers."""
    found = [step for leg in legs for step in leg.steps]
    assert [s.step for s in found] == [s.step for s in whole.steps]
    for ours, wanted in zip(found, whole.steps, strict=True):
        assert (ours.loss, ours.grad_norm) == (wanted.loss, wanted.grad_norm)
        assert (ours.tokens, ours.learning_rate) == (wanted.tokens, wanted.learning_rate)
        assert ours.trial == 3
    last, score = ([r for r in of.records if isinstance(r, RungRecord)] for of in (legs[-1], whole))
    assert last[0].per_item == score[0].per_item and last[0].tie_break == score[0].tie_break


def weights(directory: Path) -> bytes:
    return (checkpoint_directory(directory, FINAL) / "model.safetensors").read_bytes()


def test_legs_are_the_training_that_nobody_cut(run: Callable[..., Told], tmp_path: Path) -> None:
    whole = run(0, shares=(1.0,), name="whole")
    total = len(whole.steps)
    assert total >= 10 and not whole.lines("redone")
    legs = [run(rung) for rung in range(3)]
    check_whole(legs, whole)
    ends = [step_at(share, total_steps=total) for share in SHARES]
    assert [leg.steps[-1].step for leg in legs] == ends
    assert weights(tmp_path / "t2") == weights(tmp_path / "whole0")
    assert not checkpoint_directory(tmp_path / "t0", FINAL).exists()
    summary, wanted = summary_of(tmp_path / "t2"), summary_of(tmp_path / "whole0")
    assert summary is not None and wanted is not None
    for name in ("steps", "tokens", "examples", "padding_tokens", "probe_tokens"):
        assert getattr(summary, name) == getattr(wanted, name)
    for purpose in ("padding", "agreement", "redone"):
        parts = [line.tokens for leg in legs for line in leg.lines(purpose)]
        assert sum(parts) == sum(line.tokens for line in whole.lines(purpose))


@pytest.mark.slow
def test_a_killed_leg_goes_on_and_one_without_its_state_trains_anew(
    run: Callable[..., Told], tmp_path: Path
) -> None:
    whole = run(0, shares=(1.0,), name="whole")
    first = run(0)
    ends_at = first.steps[-1].step + 2
    with pytest.raises(Killed):
        run(1, ends_at=ends_at)
    again = run(1)
    assert again.steps[0].step in (ends_at, ends_at - 1) and not again.lines("redone")
    shutil.rmtree(tmp_path / "t1" / "state")
    last = run(2)
    known = [step for step in whole.steps if step.step < last.steps[0].step]
    assert [line.tokens for line in last.lines("redone")] == [step.tokens for step in known]
    assert last.steps[0].step == again.steps[-1].step + 1
    between = whole.steps[first.steps[-1].step : again.steps[0].step - 1]
    middle = Told()
    middle.records = [*between, *again.records]
    check_whole([first, middle, last], whole)
    assert weights(tmp_path / "t2") == weights(tmp_path / "whole0")
