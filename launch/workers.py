"""Thin remote wrappers: what a Ray process does for one job, and nothing that decides.

Only plain typed data crosses: job descriptions in, records out, which stream back through Ray.
launch/train_workers.py has the trainings.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.checkpoint_records import ProbeItem
from conf.records import AnswerRule, JournalEvent, LedgerLine, SampleRecord
from conf.resolve import Arm
from conf.row_meter import METER
from conf.sweeps import HalvingConfig, SweepBudgetConfig
from evaluation.engines.base import Closes, OverHttp
from evaluation.engines.endpoint_ceiling import EndpointPlace
from evaluation.tasks import Task
from launch.logs.worker_log import STALLED_SECONDS, beat, logged
from launch.placement import Machine, devices_per_actor, dtype_name
from launch.search.trials import Trial
from launch.store import read_events

if TYPE_CHECKING:
    from launch.engine_process import EngineSpec


@dataclass(kw_only=True, slots=True, frozen=True)
class AnswerWork:
    """What an evaluator process needs to answer items with one arm.

    model_dir: a transformers directory; adapter_dir: a peft directory on top of it, or None.
    """

    job: str
    arm: Arm
    sets: tuple[str, ...]
    task: Task
    model_dir: Path
    adapter_dir: Path | None
    step: int | None
    train_seed: int | None
    machine: Machine
    devices: int
    plugins: tuple[str, ...]
    rule: AnswerRule | None
    num_labels: int | None  # labelled rows that the checkpoint was trained on
    usd_per_device_second: float | None
    log_path: Path
    done: tuple[SampleRecord, ...] = ()  # what is answered already
    # Where a job's records lie: what a killed attempt answered is read there by who needs it.
    records_path: Path | None = None
    actors: int = 1  # engine processes; 1: the evaluator's own; 0: the model is hosted elsewhere
    kernels_impl: str = "auto"
    endpoint: EndpointPlace | None = None  # of a hosted engine
    probe: tuple[ProbeItem, ...] = ()  # what the trained model said, to be found again first
    trained_dtype: str = "float32"
    is_sample: bool = False  # the test items are a wave of them
    rows_dir: Path | None = None  # where rows are announced, see conf/row_meter.py


@dataclass(kw_only=True, slots=True, frozen=True)
class SearchWork:
    """What an evaluator process needs to search an arm's prompts.

    base: how the arm answers; its sets, rule and done play no part. trials: all of them, which
    share the base's engine and model. state_path: answers between attempts, in the job's directory.
    done: records of a killed attempt, beside those at the base's records_path.
    """

    base: AnswerWork
    trials: tuple[Trial, ...]
    halving: HalvingConfig
    budget: SweepBudgetConfig
    seed: int
    state_path: Path
    done: tuple[Any, ...] = ()


class Evaluator:
    """A process that keeps its engine between jobs and swaps adapters; a Ray actor.

    The engine is in this process, or several engine processes of its own (launch/sharded_engine.py)
    which end with it.
    """

    def __init__(self) -> None:
        self._engine: Any = None
        self._engine_key: object = None
        self._loading_rows = 0  # of the checks that a model passes when it is loaded

    def answer(self, work: AnswerWork) -> Iterator[list[Any]]:
        """Answer the items of the work's sets; yields records as they come, a few at a time."""
        from evaluation.answering.runner import EvaluateJob, evaluate
        from evaluation.plugins import load_plugins

        with logged(work.log_path, stalled_seconds=STALLED_SECONDS):
            load_plugins(list(work.plugins))
            engine, renderer = self._ready(work)
            job = EvaluateJob(
                name=work.job,
                arm=work.arm,
                sets=work.sets,
                step=work.step,
                train_seed=work.train_seed,
                num_labels=work.num_labels,
                devices=work.devices,
                usd_per_device_second=work.usd_per_device_second,
                rule=work.rule,
                is_sample=work.is_sample,
            )
            done = [e for e in _kept(work) if isinstance(e, SampleRecord)]
            answers = evaluate(job, task=work.task, engine=engine, renderer=renderer, done=done)
            events = itertools.chain(self._loading(work), _agreement(engine, work), answers)
            yield from gathered(_with_kernels(events, engine, work), seconds=0.2)

    def search(self, work: SearchWork) -> Iterator[list[Any]]:
        """Search an arm's prompts; yields records as they come, a few at a time."""
        from evaluation.plugins import load_plugins
        from launch.search.prompt_search import searched_prompts

        base = work.base
        with logged(base.log_path, stalled_seconds=STALLED_SECONDS):
            load_plugins(list(base.plugins))
            engine, renderer = self._ready(base)
            work = dataclasses.replace(work, done=(*work.done, *_kept(base)))
            found = searched_prompts(work, engine=engine, renderer=renderer)
            events = itertools.chain(self._loading(base), _agreement(engine, base), found)
            yield from gathered(_with_kernels(events, engine, base), seconds=0.2)

    def _ready(self, work: AnswerWork) -> tuple[Any, Any]:
        from evaluation.prompts.rendering import Renderer
        from launch.sharded_engine import ShardedEngine

        METER.count_into(work.rows_dir)
        before = METER.rows
        model = work.arm.model
        renderer = Renderer.load(work.model_dir, layout=model.layout, max_length=model.max_length)
        spec = _engine_spec(work)
        key = (spec.identity(), work.actors)
        if key != self._engine_key:
            if isinstance(self._engine, Closes):
                self._engine.close()
            self._engine = None  # give the memory back before the next model is loaded
            self._engine = (
                spec.build()
                if work.actors <= 1
                else ShardedEngine(spec, actors=work.actors, log_dir=work.log_path.parent)
            )
            self._engine_key = key
        if isinstance(self._engine, ShardedEngine):
            self._engine.log_dir, self._engine.rows_dir = work.log_path.parent, work.rows_dir
        self._engine.set_adapter(work.adapter_dir)
        self._loading_rows = METER.rows - before
        return self._engine, renderer

    def _loading(self, work: AnswerWork) -> Iterator[LedgerLine]:
        """The bill of what loading computed: the job that loads pays, and later ones do not."""
        if self._loading_rows:
            rows = self._loading_rows
            yield LedgerLine(job=work.job, arm=work.arm.name, purpose="padding", tokens=rows)


def _kept(work: AnswerWork) -> Iterator[Any]:
    """What is done of a job already; its driver holds no records."""
    yield from work.done
    if work.records_path is not None:
        yield from read_events(work.records_path)


def _engine_spec(work: AnswerWork) -> EngineSpec:
    from launch.engine_process import EngineSpec

    arm, machine = work.arm, work.machine
    return EngineSpec(
        config=arm.engine,
        model_dir=work.model_dir,
        layout=arm.model.layout,
        max_length=arm.model.max_length,
        dtype=dtype_name(arm, machine.device),
        device=machine.device,
        threads=max(1, devices_per_actor(work.actors, machine)) if machine.device == "cpu" else 1,
        kernels_impl=work.kernels_impl,
        task=work.task if arm.engine.name == "scripted" else None,
        endpoint=work.endpoint,
        log_dir=work.log_path.parent,
    )


def _agreement(engine: Any, work: AnswerWork) -> Iterator[LedgerLine]:
    """Find what the trained model said of its first rows; a script has no weights to check.

    Nor is an engine checked that gives no scores to compare.
    """
    from evaluation.answering.agreement import require_agreement
    from evaluation.answering.bill import Bill

    if work.arm.engine.name == "scripted" or work.arm.engine.only_generates:
        return
    checkpoint = work.adapter_dir or work.model_dir
    yield from require_agreement(
        engine,
        work.probe,
        dtypes=(work.trained_dtype, dtype_name(work.arm, work.machine.device)),
        where=str(checkpoint),
        bill=Bill(
            job=work.job,
            arm=work.arm.name,
            engine=engine,
            devices=work.devices,
            usd_per_device_second=work.usd_per_device_second,
        ),
    )


def _with_kernels(events: Iterator[Any], engine: Any, work: AnswerWork) -> Iterator[Any]:
    """A job's events, and once, when the engine knows it, what each kernel runs as and why."""
    from launch.engine_process import kernels_of

    is_told = False
    for event in events:
        kernels = {} if is_told else kernels_of(engine)
        if kernels:
            is_told = True
            yield JournalEvent(
                time=time.time(), event="kernels", job=work.job, arm=work.arm.name, data=kernels
            )
        yield from _attempts(engine, work)
        yield event


def _attempts(engine: Any, work: AnswerWork) -> Iterator[JournalEvent]:
    """The attempts over HTTP that have failed since this was last asked."""
    for attempt in engine.take_attempts() if isinstance(engine, OverHttp) else ():
        yield JournalEvent(
            time=time.time(), event="attempt_failed", job=work.job, arm=work.arm.name, data=attempt
        )


def gathered(events: Iterator[Any], *, seconds: float) -> Iterator[list[Any]]:
    """Events in lists of what came within so many seconds: one Ray object a list, not a record."""
    pending: list[Any] = []
    begun = time.monotonic()
    for event in events:
        pending.append(event)
        if time.monotonic() - begun >= seconds:
            beat()
            yield pending
            pending, begun = [], time.monotonic()
    if pending:
        yield pending


def evaluator(machine: Machine, *, actors: int) -> Any:
    """A new evaluator actor that reserves its devices; its engine processes do where it has any."""
    import ray

    is_cpu, is_sharded = machine.device == "cpu", actors > 1
    devices = 0 if is_sharded else devices_per_actor(actors, machine)
    threads = str(max(1, devices) if is_cpu and not is_sharded else 1)
    options = {
        "num_cpus": devices if is_cpu or is_sharded else 1,
        "num_gpus": 0 if is_cpu else devices,
        # Ray sets OMP_NUM_THREADS by itself, to 1 where num_cpus is not given.
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads}},
        "max_restarts": 0,
    }
    return ray.remote(Evaluator).options(**options).remote()


def run_reference(
    job: str, arm: Arm, task: Task, plugins: tuple[str, ...], log_path: Path
) -> list[Any]:
    """All records of a reference arm."""
    from evaluation.answering.references import reference
    from evaluation.plugins import load_plugins

    with logged(log_path):
        load_plugins(list(plugins))
        return list(reference(job, arm, task=task))
