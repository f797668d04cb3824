"""Trainings of a tiny model as a run drives them: scheduler, recorder, real Ray, real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil

from conf.groups import TrainerConfig, ZeroConfig
from conf.hashing import sha256_of_file
from conf.methods import FullMethod, LoraMethod
from conf.records import LedgerLine, Progress, TrainRecord, from_dict
from conf.run_groups import BudgetConfig, PricingConfig
from launch import cluster, train_workers
from launch.budget import Budget
from launch.elsewhere.copies import Copier
from launch.placement import Machine
from launch.planned import Job, Plan
from launch.recorder import Recorder, is_finished
from launch.run import is_lost_process
from launch.scheduler import JobState, Scheduler
from launch.store import JobDirectory, RunDirectory
from launch.together import Member, Runs
from training.job import TrainJob, checkpoint_directory

CPU = Machine(devices=2, devices_per_node=2, device="cpu", name="2 x test")
STEPS = 12
Act = Callable[["Bench", Any], None]


@contextmanager
def private_ray() -> Iterator[None]:
    """Ray with two CPUs, started as a run starts it."""
    before = dict(os.environ)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    cluster.start(CPU)
    try:
        yield
    finally:
        cluster.stop()
        os.environ.clear()
        os.environ.update(before)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def write_rows(path: Path, *, batch: int, length: int) -> None:
    """Rows for STEPS steps; long enough that a step takes a while."""
    source = random.Random(0)
    with path.open("w") as stream:
        for n in range(STEPS * batch):
            ids = [source.randrange(5, 200) for _ in range(length)]
            mask = [0] * (length - 4) + [1] * 4
            row = {"item_id": f"row-{n}", "input_ids": ids, "target_mask": mask}
            stream.write(json.dumps(row) + "\n")


@dataclass(kw_only=True)
class Bench:
    """One training job, run by as many invocations and attempts as it takes.

    act is called with every event of the job, in the scheduler's main thread.
    """

    root: Path
    model_dir: Path
    workers: int = 1
    lora: bool = False
    batch: int = 16
    length: int = 24
    state_every_steps: int = 1
    timeout_seconds: float = 300.0
    stage: int | None = None
    key: str = "k"
    notes: list[str] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    seen: list[tuple[float, int]] = field(default_factory=list)  # when, which step
    resumed_at: list[float] = field(default_factory=list)
    killed_at: float = 0.0

    @property
    def directory(self) -> JobDirectory:
        return JobDirectory(self.root, self.key)

    @property
    def log_dir(self) -> Path:
        return self.root / f"logs-{self.key}"

    def job(self) -> TrainJob:
        rows = self.root / f"rows-{self.batch}-{self.length}.jsonl"
        if not rows.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            write_rows(rows, batch=self.batch, length=self.length)
        return TrainJob(
            arm_name="a",
            method=LoraMethod(lora_rank=4) if self.lora else FullMethod(),
            trainer=TrainerConfig(
                epochs=1,
                batch_size=self.batch,
                num_points=1,
                state_every_steps=self.state_every_steps,
            ),
            zero=ZeroConfig(),
            model_dir=str(self.model_dir),
            base_model="tiny",
            base_model_sha256="",
            renderer_sha256="",
            prompt_sha256="",
            rows_path=str(rows),
            output_dir=str(self.directory.points),
            dtype="float32",
            device="cpu",
            threads=2 // self.workers,
            world_size=self.workers,
            pad_id=0,
            usd_per_device_second=None,
        )

    def attempt(self) -> Iterator[Any]:
        """One attempt, without the retries."""
        return train_workers.run_training(
            self.job(),
            machine=CPU,
            log_dir=self.log_dir,
            collective_timeout_seconds=self.timeout_seconds,
        )

    def run(
        self, act: Act = lambda bench, event: None, *, budget: BudgetConfig | None = None
    ) -> JobState:
        """One invocation; returns how the job ended.

        Raises:
            BudgetReached, KeyboardInterrupt: as in a run.
        """
        job = Job(id="train:a", kind="train", arm="a", key=self.key, devices=2)
        run = RunDirectory(self.root, "r")
        run.open()
        plan = Plan(jobs=(job,))
        runs = self._runs(
            run, plan, Budget(config=budget or BudgetConfig(), pricing=PricingConfig())
        )
        self.runs = runs
        scheduler = Scheduler(
            plan=plan,
            slots=2,
            run_job=runs.run_job,
            listener=_Acting(runs, lambda event: act(self, event), self),
            may_start=runs.refusal,
            is_retryable=is_lost_process,
            is_finished=lambda job: is_finished(self.root, job),
            reached=lambda event: event.step if isinstance(event, TrainRecord) else None,
            why_stopped=runs.why_stopped,
        )
        self.scheduler = scheduler
        run.journal("run_started")
        try:
            return scheduler.run()[job.id]
        finally:
            run.close()

    def state(self) -> JobState:
        """Where the job is."""
        return self.scheduler.states["train:a"]

    def _runs(self, run: RunDirectory, plan: Plan, budget: Budget) -> Runs:
        def ignore(*args: Any, **kwargs: Any) -> None:
            pass

        live = SimpleNamespace(
            start=ignore, event=ignore, end=ignore, tick=ignore, note=self.notes.append
        )
        recorder = Recorder(
            checked=cast(Any, SimpleNamespace(root=self.root)),
            run=run,
            tracker=cast(Any, SimpleNamespace(event=ignore)),
            budget=budget,
            copier=Copier(None, run.path),
            hardware="test",
        )
        member = Member(plan=plan, recorder=recorder, run_job=lambda job: self.attempt())
        return Runs(members={"": member}, budget=budget, live=cast(Any, live))

    # What is there afterwards.

    def steps(self) -> list[TrainRecord]:
        """arms/a/train.jsonl, as it stands."""
        text = (self.root / "r/arms/a/train.jsonl").read_text()
        return [from_dict(TrainRecord, json.loads(line)) for line in text.splitlines()]

    def bill(self, *purposes: str) -> tuple[int, float]:
        """Tokens and device-seconds of the finished job's ledger lines; those of some purposes."""
        lines = [e for e in self.directory.events() if isinstance(e, LedgerLine)]
        mine = [e for e in lines if not purposes or e.purpose in purposes]
        return sum(e.tokens for e in mine), sum(e.device_seconds for e in mine)

    def weights(self) -> str:
        """The hash of the final weights."""
        final = checkpoint_directory(self.directory.points, "final")
        (path,) = final.glob("*.safetensors")
        return sha256_of_file(path)

    def recovered_after_seconds(self) -> float:
        """From the kill of a worker to the first step that no attempt before had made."""
        known = max(step for at, step in self.seen if at < self.resumed_at[0])
        new = [at for at, step in self.seen if at > self.resumed_at[0] and step > known]
        return new[0] - self.killed_at

    def recovery_seconds(self) -> float:
        """The longest pause between two new steps."""
        times = [t for t, _ in self.seen]
        return max(b - a for a, b in zip(times, times[1:], strict=False))


@dataclass
class _Acting:
    """The listener of a run, with a fault after an event."""

    runs: Runs
    act: Callable[[Any], None]
    bench: Bench

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runs, name)

    def on_event(self, state: JobState, event: Any) -> None:
        if isinstance(event, TrainRecord):
            self.bench.seen.append((time.monotonic(), event.step))
        if isinstance(event, Progress) and event.note.startswith("resumed at step"):
            self.bench.resumed.append(event.done)
            self.bench.resumed_at.append(time.monotonic())
        self.runs.on_event(state, event)
        self.act(event)


def without_times(records: list[TrainRecord]) -> list[TrainRecord]:
    """What must be equal, whatever happened on the way."""
    return [
        dataclasses.replace(
            r, step_seconds=0.0, device_seconds=0.0, flops_share=None, peak_memory_bytes=()
        )
        for r in records
    ]


def workers_now() -> list[psutil.Process]:
    """Training processes of this Ray, by rank where it shows; started by this test."""
    names = ("fit_here", "RayTrainWorker")
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(name in " ".join(process.cmdline()) for name in names):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda p: p.pid)


def at_step(step: int, do: Callable[[Bench], None], *, times: int = 1) -> Act:
    """Do something after a step's record has come, so many times."""
    left = [times]

    def act(bench: Bench, event: Any) -> None:
        if isinstance(event, TrainRecord) and event.step >= step and left[0]:
            left[0] -= 1
            do(bench)

    return act


def kill_worker(index: int, signum: int = signal.SIGKILL) -> Callable[[Bench], None]:
    """Send a signal to one of the training processes."""

    def do(bench: Bench) -> None:
        bench.killed_at = time.monotonic()
        os.kill(workers_now()[index].pid, signum)

    return do
