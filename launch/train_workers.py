"""One attempt at a training on Ray: start the workers, follow their records, say how it ended.

Records go through a file of the attempt, for the training function runs on the cluster's workers
and Ray Train receives metrics only. Ray Train never retries: an attempt has a name and a run of its
own, and the scheduler starts the next, which resumes from the newest state of the training room.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.errors import CrossoverError, JobFailed, MachineFailed
from conf.record_types import RECORD_TYPES
from conf.records import Progress, from_dict
from conf.row_meter import METER
from launch.attempts import rows_dir, stop_path, stream_line, stream_path
from launch.elsewhere.ray_cluster import draining
from launch.logs.worker_log import beat, logged
from launch.placement import Machine
from launch.search.leg_run import Leg, run_leg
from launch.search.pack_search import PackSearch, run_search
from training.job import TrainingStopped, TrainJob, WorkerLost

# How Ray says that a process or node was lost; by name, for some are Ray Train's own.
LOST = (
    "ActorDiedError",
    "ActorUnavailableError",
    "NodeDiedError",
    "OutOfMemoryError",  # the process that Ray's memory monitor chose
    "WorkerCrashedError",
    "WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError",
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
)
# What a worker's own exception says where it waited in vain for another one.
CUT_OFF = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out")

# Of the collective's timeout, after which a worker that makes no step dumps its stacks: before the
# others give it up, and Ray ends them all.
STALLED_SHARE = 0.8
LOOK_SECONDS = 1.0  # between two looks at the nodes; a cloud tells 30 to 120 s before
# Ends of a worker that its settings have no part in.
OF_THE_MACHINE = ("MachineFailed", "OSError", "PermissionError", "FileNotFoundError")
# Ends of our own after which another attempt goes on from the newest state.
MENDABLE = ("TrainingStopped", "WorkerLost", "PeerLost")


class FileRuntime:
    """A training worker's place in the group; reports go to the attempt's file, from rank 0.

    Progress is printed as well, so that the job's log tells when what happened.
    """

    def __init__(self, stream: Path, *, devices: int) -> None:
        import ray.train

        context = ray.train.get_context()
        self.global_rank: int = context.get_world_rank()
        self.local_rank: int = context.get_local_rank()
        self.world_size: int = context.get_world_size()
        self._stream = stream
        self._devices = devices

    def report(self, record: object) -> None:
        """Append one record as a line; whole lines only, so that a reader can follow the file.

        Raises:
            WorkerLost: the file is gone, since a newer attempt has taken it in.
        """
        beat()
        append_line(self._stream, stream_line(record, devices=self._devices))
        if isinstance(record, Progress):
            now = time.strftime("%H:%M:%S")
            print(f"{now} {record.done}/{record.total} {record.unit}: {record.note}")

    def should_save(self) -> bool:
        """Whether the driver or a signal asked this attempt to stop."""
        beat()  # asked after each step, by all workers
        return stop_path(self._stream).exists()


def append_line(stream: Path, line: str) -> None:
    """Append to a file that must exist: its absence tells a left-over worker that it is one."""
    try:
        descriptor = os.open(stream, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:
        raise WorkerLost("a newer attempt has taken over") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(line)


def train_worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker."""
    job: TrainJob = config["job"]
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    stalled = STALLED_SHARE * config["timeout_seconds"]
    with logged(Path(config["log_dir"]) / f"{rank}.log", stalled_seconds=stalled):
        METER.count_into(Path(config["rows_dir"]))
        runtime = FileRuntime(Path(config["stream"]), devices=job.devices)
        search = config["search"]
        if isinstance(search, PackSearch):
            run_search(search, runtime)
        elif isinstance(search, Leg):
            run_leg(search, _with_memory(job), runtime)
        else:
            _train_one(job, runtime)


def _train_one(job: TrainJob, runtime: FileRuntime) -> None:
    from training.loop import train

    summary = train(_with_memory(job), runtime)
    if runtime.global_rank == 0:
        runtime.report(summary)


def _with_memory(job: TrainJob) -> TrainJob:
    return dataclasses.replace(job, device_memory_bytes=device_memory_bytes(job))


def device_memory_bytes(job: TrainJob) -> int:
    """What one worker may use: its accelerator's memory, or its share of the machine's."""
    if job.device == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import torch

    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def run_training(
    job: TrainJob,
    *,
    machine: Machine,
    log_dir: Path,
    collective_timeout_seconds: float,
    search: PackSearch | Leg | None = None,
) -> Iterator[Any]:
    """Make one attempt at a training on Ray; yields its records while it runs.

    Args:
        job: the training; of a search the first of its trials.
        machine: what it runs on.
        log_dir: where its workers print to.
        collective_timeout_seconds: how long a worker waits for the others before the attempt ends.
        search: all trials that train together, where there are several, or the leg of one.

    Raises:
        TrainingStopped: it was asked to stop, and saved its state.
        WorkerLost: a process was killed, hung or cut off; another attempt may mend it.
        JobFailed: the training failed; the message is the first worker's own where there is one.
    """
    points = Path(job.output_dir)
    stream = stream_path(points, f"{time.time_ns()}")
    points.mkdir(parents=True, exist_ok=True)
    log_dir.mkdir(parents=True, exist_ok=True)
    for stale in log_dir.glob("error-*.json"):
        stale.unlink()
    stream.touch()
    failure: list[BaseException] = []
    arguments = {
        "job": job,
        "stream": str(stream),
        "rows_dir": str(rows_dir(points)),
        "log_dir": str(log_dir),
        "timeout_seconds": collective_timeout_seconds,
        "search": search,
    }
    thread = threading.Thread(
        target=_fit, args=(arguments, job, machine, failure), daemon=True, name="train"
    )
    thread.start()
    yield from _follow(stream, thread)
    shutil.rmtree(points / "ray", ignore_errors=True)  # Ray Train's own notes, which nobody reads
    if failure:
        raise ending(log_dir, failure[0]) from failure[0]


def _follow(path: Path, thread: threading.Thread) -> Iterator[Any]:
    """Records of a growing file until the thread that causes it has ended.

    A node that is to be taken away is no reason to lose steps: the attempt is asked to stop, which
    saves its state, and the next one does not use the node.
    """
    before, looked = draining(), time.monotonic()
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
            if time.monotonic() > looked + LOOK_SECONDS:
                looked = time.monotonic()
                if draining() - before:
                    stop_path(path).touch()
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
    """Train in this process, as a group of one; SIGTERM has it save its state and stop.

    A group's workers train in a thread of Ray's, where no signal arrives: there SIGTERM ends the
    process, and the next attempt goes on from the state before.
    """
    stop = stop_path(Path(arguments["stream"]))
    signal.signal(signal.SIGTERM, lambda signum, frame: stop.touch())
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
        torch_config=TorchConfig(
            backend="gloo" if is_cpu else "nccl", timeout_s=arguments["timeout_seconds"]
        ),
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


# --- How an attempt ended ------------------------------------------------------------------------


def ending(log_dir: Path, error: BaseException) -> CrossoverError:
    """What an attempt's end means, from its workers' own words and from Ray's error.

    The cause counts, whoever it came from: workers that waited for the failed one were then merely
    cut off, and often end first. A cause that another attempt may mend is a WorkerLost.
    """
    said = [json.loads(p.read_text()) for p in log_dir.glob("error-*.json")]
    said.sort(key=lambda words: int(words["global_rank"]))
    own = {w["exception"]: w for w in reversed(said) if w["is_own"]}  # the lowest rank's words
    failed = [w for w in said if w["is_own"] and w["exception"] not in MENDABLE]
    if failed:
        kind = MachineFailed if failed[0]["exception"] in OF_THE_MACHINE else JobFailed
        return kind(failed[0]["message"])
    if (stopped := own.get("TrainingStopped")) is not None:
        return TrainingStopped(int(stopped["step"]))
    if (lost := own.get("WorkerLost")) is not None:
        return WorkerLost(f"worker {lost['global_rank']}: {lost['message']}")
    causes = _causes(error)
    for who, cause in causes:
        if type(cause).__name__ in LOST:
            return WorkerLost(f"{who} was lost: {_first_line(cause)}")
    for w in said:
        if not w["is_own"] and not any(sign in w["message"] for sign in CUT_OFF):
            return JobFailed(f"worker {w['global_rank']}: {w['exception']}: {w['message']}")
    for w in said:  # nobody says why
        first_line = w["message"].strip().partition("\n")[0]
        return WorkerLost(f"worker {w['global_rank']} lost touch with the others: {first_line}")
    return JobFailed(_first_line(causes[0][1]))


def _causes(error: BaseException) -> list[tuple[str, BaseException]]:
    """Who failed and of what: workers of a group, its controller, or a task."""
    failures = getattr(error, "worker_failures", None) or {}
    found = [(f"worker {rank}", cause) for rank, cause in sorted(failures.items())]
    if (of_controller := getattr(error, "controller_failure", None)) is not None:
        found.append(("the group of workers", of_controller))
    if (of_task := getattr(error, "cause", None)) is not None:
        found.append(("worker 0", of_task))
    return [*found, ("worker 0", error)]


def _first_line(error: BaseException) -> str:
    # Ray's advice is about files of its own, which end with the run.
    text = str(error).strip().partition("\n")[0].partition(" Check python-core-worker")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
