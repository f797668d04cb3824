"""From a checked configuration to the jobs that answer it (pure).

A job's key is the hash of all that determines its records, and nothing else: not its name, not the
run, not the machine (latency excepted). The same key found finished in the cache is not run again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from conf.choices import TaskKind
from conf.errors import ConfigError
from conf.groups import ModelConfig
from conf.hashing import plain, sha256_of, sha256_of_file
from conf.methods import GivenMethod, LoraMethod, TfidfMethod, TunedMethod
from conf.resolve import Arm
from conf.schema import RunConfig
from launch.planned import Estimate as Estimate
from launch.planned import TrainingPlan as TrainingPlan

# Raised by hand when a change alters records that a job leaves; cached jobs of older numbers are
# then not found any more.
RECORDS_VERSION = 3
# How a training is kept safe, not what it computes; nor do its workers determine it, so that a run
# stopped on two goes on with one.
STATE_KEYS = ("state_every_steps", "keep_states")


@dataclass(kw_only=True, slots=True, frozen=True)
class Machine:
    """What a plan is made for: device slots in all, slots per node, and their kind."""

    devices: int
    devices_per_node: int
    device: str  # cpu | cuda
    name: str  # what latency depends on, e.g. the processor's name


@dataclass(kw_only=True, slots=True, frozen=True)
class ModelSource:
    """Where an arm's base model comes from: key identifies its bytes; is_ready needs no job."""

    key: str
    is_ready: bool


@dataclass(kw_only=True, slots=True, frozen=True)
class Job:
    """A unit of the plan.

    kind: model | rows | train | evaluate | curve | general | general_base | instructions |
    instructions_base | latency | reference.

    point: curve jobs only, which of the training's intermediate checkpoints (0 is the first).
    is_exclusive: nothing else may run on the machine at the same time.
    """

    id: str
    kind: str
    arm: str | None
    key: str
    depends_on: tuple[str, ...] = ()
    devices: int = 0
    is_exclusive: bool = False
    point: int | None = None
    estimate: Estimate = Estimate()


@dataclass(kw_only=True, slots=True, frozen=True)
class Plan:
    """All jobs of a run in an order in which they could run one after another."""

    jobs: tuple[Job, ...]

    def job(self, job_id: str) -> Job:
        """The job of this id."""
        return next(j for j in self.jobs if j.id == job_id)


@dataclass(kw_only=True, slots=True, frozen=True)
class TaskFacts:
    """What a plan needs to know of a task."""

    sha256: str
    kind: TaskKind


def check_arms(arms: Mapping[str, Arm], task: TaskFacts) -> None:
    """Refuse arms that cannot run on this task."""
    for name, arm in arms.items():
        if arm.kind == "tfidf" and task.kind is not TaskKind.classification:
            raise ConfigError(
                f"arms.{name}",
                found=f"TF-IDF on a {task.kind.name} task",
                expected="a classification task",
                remedy=f"drop it: ~method@arms.{name}",
            )


def with_reference(config: RunConfig, task: TaskFacts) -> RunConfig:
    """The configuration with a bag-of-words classifier beside the arms of every classification."""
    is_there = any(method.kind == "tfidf" for method in config.arms.values())
    if is_there or task.kind is not TaskKind.classification:
        return config
    return dataclasses.replace(config, arms={**config.arms, "tfidf": TfidfMethod()})


def build_plan(
    config: RunConfig,
    arms: Mapping[str, Arm],
    *,
    task: TaskFacts,
    models: Mapping[str, ModelSource],
    plugins: tuple[str, ...],
    machine: Machine,
    mixes: Mapping[str, str] | None = None,
) -> Plan:
    """All jobs of a run.

    Trainings stand first, for their checkpoints are what most of the rest waits for.

    Args:
        config: the run's configuration.
        arms: resolved arms by name.
        task: hash and kind of the task.
        models: the base model of each arm that has one.
        plugins: sha256 of each plugin file.
        machine: what there is to run on.
        mixes: sha256 of the mix of each arm that trains on one.
    """
    common = {"version": RECORDS_VERSION, "task": task.sha256, "plugins": plugins}
    jobs: list[Job] = _model_jobs(arms, models)
    tuned = [a for a in arms.values() if a.is_tuned]
    rows = {a.name: _rows_job(a, models[a.name], common, (mixes or {}).get(a.name)) for a in tuned}
    trainings = {
        a.name: _train_job(config, a, models[a.name], rows[a.name], machine) for a in tuned
    }
    jobs += [*rows.values(), *trainings.values()]
    for arm in arms.values():
        if arm.kind in ("tfidf", "given"):
            jobs.append(_reference_job(arm, common))
        else:
            kernels_impl = config.kernels.impl.name
            jobs += _answer_jobs(arm, models[arm.name], trainings, common, kernels_impl, machine)
            for name, size in general_sets(config).items() if arm.is_tuned else ():
                jobs += _general_jobs(
                    name, size, config, arm, models[arm.name], trainings[arm.name], machine
                )
    return Plan(jobs=_one_after_another(jobs))


def _one_after_another(jobs: list[Job]) -> tuple[Job, ...]:
    """Jobs of equal keys have equal records: the second waits for the first and reuses them."""
    first: dict[str, str] = {}
    ordered = []
    for job in jobs:
        if job.key in first:
            job = dataclasses.replace(job, depends_on=(*job.depends_on, first[job.key]))
        first.setdefault(job.key, job.id)
        ordered.append(job)
    return tuple(ordered)


def _model_jobs(arms: Mapping[str, Arm], models: Mapping[str, ModelSource]) -> list[Job]:
    sources = {m.key: m for name, m in models.items() if name in arms and not m.is_ready}
    return [Job(id=f"model:{key[:8]}", kind="model", arm=None, key=key) for key in sources]


def _needs_model(source: ModelSource) -> tuple[str, ...]:
    return () if source.is_ready else (f"model:{source.key[:8]}",)


def workers_of(config: RunConfig, machine: Machine) -> int:
    """Training workers: as asked, else one per accelerator, or on CPU one per node.

    Of accelerators only as many as get equal shares of every arm's batch: with a batch of 8 on 32
    devices the other 24 would have nothing to do. On CPU a worker uses its node's cores as threads:
    two one-thread workers would send each full gradient (540 MB for 135M parameters) over gloo at
    every step.
    """
    if config.cluster.workers is not None:
        return config.cluster.workers
    if machine.device == "cpu":
        return config.cluster.nodes
    given = [getattr(method, "trainer", None) for method in config.arms.values()]
    sizes = [g.batch_size for g in given if g is not None and g.batch_size is not None]
    batch = math.gcd(config.trainer.batch_size, *sizes)
    return max(n for n in range(1, machine.devices + 1) if batch % n == 0)


def threads_of(workers: int, machine: Machine) -> int:
    """CPU threads of one training worker; 1 where an accelerator computes."""
    return max(1, machine.devices // workers) if machine.device == "cpu" else 1


def engine_actors(arm: Arm, machine: Machine) -> int:
    """Engine processes of an arm: as asked, else one per accelerator, or one on a CPU.

    On a CPU one process with all cores as threads has one copy of the weights and of each prefix,
    and no core waits at the end for a longer shard. A script needs no devices.

    Raises:
        ConfigError: more than there are devices.
    """
    asked = arm.engine.actors
    if asked is None:
        is_one = machine.device == "cpu" or arm.engine.name == "scripted"
        return 1 if is_one else machine.devices_per_node
    if asked > machine.devices_per_node:
        raise ConfigError(
            f"arms.{arm.name}.engine.actors",
            found=f"{asked} engine processes, one device each",
            expected=f"at most {machine.devices_per_node}: {machine.name}",
            remedy=f"write engine.actors={machine.devices_per_node}, or leave it out",
        )
    return asked


def devices_per_actor(actors: int, machine: Machine) -> int:
    """Devices of each engine process: one accelerator, or its share of the cores."""
    return machine.devices_per_node // actors if machine.device == "cpu" else 1


def dtype_name(arm: Arm, device: str) -> str:
    """What an arm's model is held in when it answers: nf4 where it was trained on that."""
    method = arm.training
    if isinstance(method, LoraMethod) and method.quantization is not None:
        return method.quantization.name
    return model_dtype(arm.model, device)


def model_dtype(model: ModelConfig, device: str) -> str:
    """float32 on CPU, bfloat16 on accelerators, unless the user said otherwise."""
    if model.dtype.name != "auto":
        return model.dtype.name
    return "float32" if device == "cpu" else "bfloat16"


def _model_facts(arm: Arm, source: ModelSource, device: str) -> list[object]:
    model = arm.model
    return [source.key, dtype_name(arm, device), device, model.layout, model.max_length]


def _rows_job(arm: Arm, source: ModelSource, common: object, mix: str | None) -> Job:
    """The prepare job of a training: its prompts and targets, rendered and tokenised once."""
    method = arm.answering
    prompt = [method.prompt, method.num_shots, method.shot_selection, method.draw, method.persona]
    prompt += [method.instruction, _prompt_file(method.prompt)]
    model = [source.key, arm.model.layout, arm.model.max_length]
    key = {"kind": "rows", "common": common, "prompt": prompt, "model": model, "mix": mix}
    return Job(
        id=f"rows:{arm.name}",
        kind="rows",
        arm=arm.name,
        key=sha256_of(key),
        depends_on=_needs_model(source),
    )


def _prompt_file(prompt: str) -> str | None:
    """The hash of the user's own prompt file, so that an edited file is a new prompt."""
    path = Path(prompt)
    return sha256_of_file(path) if path.suffix == ".md" and path.is_file() else None


def _train_job(
    config: RunConfig, arm: Arm, source: ModelSource, rows: Job, machine: Machine
) -> Job:
    workers = workers_of(config, machine)
    shared = {f.name for f in dataclasses.fields(TunedMethod)} - {"kind"}
    method = {k: v for k, v in plain(arm.training).items() if k not in shared}
    key = {
        "kind": "train",
        "rows": rows.key,
        "method": method,
        "trainer": {k: v for k, v in plain(arm.trainer).items() if k not in STATE_KEYS},
        "zero": arm.zero,
        "model": _model_facts(arm, source, machine.device),
        "kernels": config.kernels.impl.name,
    }
    devices = workers * threads_of(workers, machine)
    return Job(
        id=f"train:{arm.name}",
        kind="train",
        arm=arm.name,
        key=sha256_of(key),
        depends_on=(*_needs_model(source), rows.id),
        devices=devices,
    )


def _answer_jobs(
    arm: Arm,
    source: ModelSource,
    trainings: Mapping[str, Job],
    common: object,
    kernels_impl: str,
    machine: Machine,
) -> list[Job]:
    """The jobs that answer items with an arm: curve points, validation and test, latency."""
    training = trainings.get(arm.name) or trainings.get(arm.on or "")
    depends_on = _needs_model(source) + ((training.id,) if training else ())
    determined = {
        "common": common,
        "method": arm.method,
        "engine": dataclasses.replace(arm.engine, actors=None),  # where, not what
        "kernels": kernels_impl,
        "prompt_file": _prompt_file(arm.answering.prompt),
        "model": _model_facts(arm, source, machine.device),
        "training": training.key if training else arm.on,
    }
    actors = engine_actors(arm, machine)
    devices_alone = devices_per_actor(actors, machine)
    devices = actors * devices_alone
    jobs = []
    if arm.is_tuned:
        for point in range(arm.trainer.num_points - 1):
            jobs.append(
                Job(
                    id=f"curve:{arm.name}:{point}",
                    kind="curve",
                    arm=arm.name,
                    key=sha256_of({"kind": "curve", "point": point, **determined}),
                    depends_on=depends_on,
                    devices=devices,
                    point=point,
                )
            )
    evaluate = Job(
        id=f"evaluate:{arm.name}",
        kind="evaluate",
        arm=arm.name,
        key=sha256_of({"kind": "evaluate", **determined}),
        depends_on=depends_on,
        devices=devices,
    )
    jobs.append(evaluate)
    if arm.engine.latency_requests:
        jobs.append(
            Job(
                id=f"latency:{arm.name}",
                kind="latency",
                arm=arm.name,
                key=sha256_of(
                    {"kind": "latency", "on": [machine.name, devices_alone], **determined}
                ),
                depends_on=(evaluate.id,),
                devices=devices_alone,  # one engine process answers, alone
                is_exclusive=True,
            )
        )
    return jobs


def general_sets(config: RunConfig) -> dict[str, int]:
    """Sets that each tuned model and its base are asked besides the task: name -> items."""
    general = config.general
    sizes = {"general": general.items, "instructions": general.instruction_items}
    return {name: size for name, size in sizes.items() if size}


def _general_jobs(
    name: str,
    num_items: int,
    config: RunConfig,
    arm: Arm,
    source: ModelSource,
    training: Job,
    machine: Machine,
) -> tuple[Job, Job]:
    """One of the general sets, asked of the arm's base model and of the tuned one.

    The base model's key has nothing of the arm in it, so that arms on one base ask it once.
    """
    actors = engine_actors(arm, machine)
    determined = {
        "version": RECORDS_VERSION,
        "items": num_items,
        "engine": dataclasses.replace(arm.engine, actors=None),
        "kernels": config.kernels.impl.name,
        "model": _model_facts(arm, source, machine.device),
    }

    def job(kind: str, after: Job | None) -> Job:
        return Job(
            id=f"{kind}:{arm.name}",
            kind=kind,
            arm=arm.name,
            key=sha256_of({"kind": kind, "training": after and after.key, **determined}),
            depends_on=_needs_model(source) + ((after.id,) if after else ()),
            devices=actors * devices_per_actor(actors, machine),
        )

    return job(f"{name}_base", None), job(name, training)


def _reference_job(arm: Arm, common: object) -> Job:
    method: object = arm.method
    if isinstance(arm.method, GivenMethod):
        path = Path(arm.method.path)
        if not path.is_file():
            raise ConfigError(
                f"arms.{arm.name}.path",
                found=f"{arm.method.path}, which is not a file",
                expected="a CSV or JSONL file with columns id and answer",
                remedy=f"write arms.{arm.name}.path=predictions.csv",
            )
        method = [arm.method, sha256_of_file(path)]
    return Job(
        id=f"reference:{arm.name}",
        kind="reference",
        arm=arm.name,
        key=sha256_of({"kind": "reference", "common": common, "method": method}),
        devices=1,
    )
