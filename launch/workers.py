"""Thin remote wrappers: what a Ray process does for one job, and nothing that decides.

Only plain typed data crosses: job descriptions in, records out. Records of an evaluation stream
back through Ray; records of a training go through a file of the job, for the training function
runs on the cluster's workers and Ray Train receives metrics only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import CrossoverError, JobFailed
from conf.hashing import plain
from conf.records import (
    RECORD_TYPES,
    AnswerRule,
    JournalEvent,
    Progress,
    SampleRecord,
    TrainRecord,
    TrainSummary,
    from_dict,
)
from conf.resolve import Arm
from evaluation.tasks import Task
from launch.plan import Machine, devices_per_actor, dtype_name
from training.job import TrainJob

if TYPE_CHECKING:
    from launch.sharded_engine import EngineSpec


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
    done: tuple[SampleRecord, ...]  # of a killed attempt
    log_path: Path
    actors: int = 1  # engine processes; 1: the evaluator's own
    kernels_impl: str = "auto"


class Evaluator:
    """A process that keeps its engine between jobs and swaps adapters; a Ray actor.

    The engine is in this process, or several engine processes of its own (launch/sharded_engine.py)
    which end with it.
    """

    def __init__(self) -> None:
        self._engine: Any = None
        self._engine_key: object = None

    def answer(self, work: AnswerWork) -> Iterator[list[Any]]:
        """Answer the items of the work's sets; yields records as they come, a few at a time."""
        from evaluation.plugins import load_plugins
        from evaluation.runner import EvaluateJob, evaluate

        with logged(work.log_path):
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
            )
            events = evaluate(job, task=work.task, engine=engine, renderer=renderer, done=work.done)
            yield from gathered(_with_kernels(events, engine, work), seconds=0.2)

    def _ready(self, work: AnswerWork) -> tuple[Any, Any]:
        from evaluation.rendering import Renderer
        from launch.sharded_engine import ShardedEngine

        model = work.arm.model
        renderer = Renderer.load(work.model_dir, layout=model.layout, max_length=model.max_length)
        spec = _engine_spec(work)
        key = (spec.identity(), work.actors)
        if key != self._engine_key:
            if isinstance(self._engine, ShardedEngine):
                self._engine.close()
            self._engine = None  # give the memory back before the next model is loaded
            self._engine = (
                spec.build()
                if work.actors == 1
                else ShardedEngine(spec, actors=work.actors, log_dir=work.log_path.parent)
            )
            self._engine_key = key
        if isinstance(self._engine, ShardedEngine):
            self._engine.log_dir = work.log_path.parent
        self._engine.set_adapter(work.adapter_dir)
        return self._engine, renderer


def _engine_spec(work: AnswerWork) -> EngineSpec:
    from launch.sharded_engine import EngineSpec

    arm, machine = work.arm, work.machine
    return EngineSpec(
        config=arm.engine,
        model_dir=work.model_dir,
        layout=arm.model.layout,
        max_length=arm.model.max_length,
        dtype=dtype_name(arm, machine.device),
        device=machine.device,
        threads=devices_per_actor(work.actors, machine) if machine.device == "cpu" else 1,
        kernels_impl=work.kernels_impl,
        task=work.task if arm.engine.name == "scripted" else None,
    )


def _with_kernels(events: Iterator[Any], engine: Any, work: AnswerWork) -> Iterator[Any]:
    """A job's events, and once, when the engine knows it, what each kernel runs as and why."""
    from launch.sharded_engine import kernels_of

    is_told = False
    for event in events:
        kernels = {} if is_told else kernels_of(engine)
        if kernels:
            is_told = True
            yield JournalEvent(
                time=time.time(), event="kernels", job=work.job, arm=work.arm.name, data=kernels
            )
        yield event


def gathered(events: Iterator[Any], *, seconds: float) -> Iterator[list[Any]]:
    """Events in lists of what came within so many seconds: one Ray object a list, not a record."""
    pending: list[Any] = []
    begun = time.monotonic()
    for event in events:
        pending.append(event)
        if time.monotonic() - begun >= seconds:
            yield pending
            pending, begun = [], time.monotonic()
    if pending:
        yield pending


def evaluator(machine: Machine, *, actors: int) -> Any:
    """A new evaluator actor that reserves its devices; its engine processes do where it has any."""
    import ray

    is_cpu, is_sharded = machine.device == "cpu", actors > 1
    devices = 0 if is_sharded else devices_per_actor(actors, machine)
    threads = str(devices if is_cpu and not is_sharded else 1)
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
    from evaluation.plugins import load_plugins
    from evaluation.references import reference

    with logged(log_path):
        load_plugins(list(plugins))
        return list(reference(job, arm, task=task))


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Send what libraries print to the job's log file; a failure's traceback goes there too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8", buffering=1) as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        try:
            yield
        except BaseException:
            traceback.print_exc(file=stream)
            raise


class FileRuntime:
    """A training worker's place in the group; reports go to the job's file, from global rank 0.

    Progress is printed as well, so that the job's log tells when what happened.
    """

    def __init__(self, records_path: Path) -> None:
        import ray.train

        context = ray.train.get_context()
        self.global_rank: int = context.get_world_rank()
        self.local_rank: int = context.get_local_rank()
        self.world_size: int = context.get_world_size()
        self._path = records_path

    def report(self, record: TrainRecord | Progress | TrainSummary) -> None:
        """Append one record as a line; whole lines only, so that a reader can follow the file."""
        line = json.dumps({"type": type(record).__name__, **plain(record)})
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        if isinstance(record, Progress):
            now = time.strftime("%H:%M:%S")
            print(f"{now} {record.done}/{record.total} {record.unit}: {record.note}")


def train_worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker."""
    job: TrainJob = config["job"]
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    with logged(Path(config["log_dir"]) / f"{rank}.log"):
        from training.loop import train

        job = dataclasses.replace(job, device_memory_bytes=device_memory_bytes(job))
        runtime = FileRuntime(Path(config["records_path"]))
        try:
            summary = train(job, runtime)
        except CrossoverError as error:
            _write_error(Path(config["log_dir"]), rank, error)
            raise
        if rank == 0:
            runtime.report(summary)


def device_memory_bytes(job: TrainJob) -> int:
    """What one worker may use: its accelerator's memory, or its share of the machine's."""
    if job.device == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import torch

    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def _write_error(log_dir: Path, rank: int, error: CrossoverError) -> None:
    text = {"global_rank": rank, "exception": type(error).__name__, "message": str(error)}
    (log_dir / f"error-{rank}.json").write_text(json.dumps(text), encoding="utf-8")


def run_training(job: TrainJob, *, machine: Machine, log_dir: Path) -> Iterator[Any]:
    """Train on Ray; yields the job's records while it runs.

    Raises:
        JobFailed: the training failed; the message is the first worker's own where there is one.
    """
    records_path = Path(job.output_dir) / "stream.jsonl"
    records_path.parent.mkdir(parents=True, exist_ok=True)
    log_dir.mkdir(parents=True, exist_ok=True)
    for stale in [*log_dir.glob("error-*.json"), *records_path.parent.glob("stream.jsonl")]:
        stale.unlink()
    records_path.touch()
    failure: list[BaseException] = []
    arguments = {"job": job, "records_path": str(records_path), "log_dir": str(log_dir)}
    thread = threading.Thread(
        target=_fit, args=(arguments, job, machine, failure), daemon=True, name="train"
    )
    thread.start()
    yield from _follow(records_path, thread)
    if failure:
        raise JobFailed(_reason(log_dir, failure[0])) from failure[0]


def _follow(path: Path, thread: threading.Thread) -> Iterator[Any]:
    """Records of a growing file until the thread that causes it has ended."""
    with path.open(encoding="utf-8") as stream:
        pending = ""
        while True:
            is_last = not thread.is_alive()
            pending += stream.read()
            *whole, pending = pending.split("\n")
            for text in whole:
                line = json.loads(text)
                yield from_dict(RECORD_TYPES[line["type"]], line)
            if is_last:
                return
            if not whole:
                time.sleep(0.1)


def _fit(
    arguments: dict[str, Any], job: TrainJob, machine: Machine, failure: list[BaseException]
) -> None:
    try:
        if job.world_size == 1:
            _fit_alone(arguments, job, machine)
        else:
            _trainer(arguments, job, machine).fit()
    except BaseException as error:  # noqa: BLE001 - handed to the scheduler's thread, which raises it
        failure.append(error)


def _fit_alone(arguments: dict[str, Any], job: TrainJob, machine: Machine) -> None:
    """Train with one worker: Ray Train's local mode, in a Ray task that reserves the devices.

    A group of workers comes with five processes that look after it, which take 9 CPU-seconds of
    imports. One worker needs no looking after.
    """
    import ray

    is_cpu = machine.device == "cpu"
    task = ray.remote(
        num_cpus=job.threads if is_cpu else 1,
        num_gpus=0 if is_cpu else 1,
        max_calls=1,  # the process ends with the task, and gives its memory back
        max_retries=0,
    )(fit_here)
    ray.get(task.remote(arguments, job, machine))


def fit_here(arguments: dict[str, Any], job: TrainJob, machine: Machine) -> None:
    """Train in this process, as a group of one."""
    # Ray Train's local mode forms the process group if it finds the environment of one.
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})  # 0: any free port
    _trainer(arguments, job, machine).fit()


def _trainer(arguments: dict[str, Any], job: TrainJob, machine: Machine) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    is_cpu = machine.device == "cpu"
    resources = {"CPU": job.threads} if is_cpu else {"CPU": 1, "GPU": 1}
    return TorchTrainer(
        train_worker,
        train_loop_config=arguments,
        torch_config=TorchConfig(backend="gloo" if is_cpu else "nccl", timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=job.world_size if job.world_size > 1 else 0,  # 0: in this process
            use_gpu=not is_cpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"attempt-{int(time.time() * 1000)}",
            storage_path=str(Path(job.output_dir).resolve() / "ray"),
            failure_config=FailureConfig(max_failures=0),
        ),
    )


def _reason(log_dir: Path, error: BaseException) -> str:
    """The first worker's own message, else the innermost cause Ray gives."""
    for path in sorted(log_dir.glob("error-*.json")):
        return str(json.loads(path.read_text())["message"])
    failures = getattr(error, "worker_failures", None) or {}
    causes = [*failures.values(), getattr(error, "cause", None)]  # of a group, of a task
    for cause in filter(None, causes):
        return f"{type(cause).__name__}: {str(cause).strip().splitlines()[-1]}"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
