"""From a checked configuration to the jobs that answer it (pure).

A job's key is the hash of all that determines its records, and nothing else: not its name, not the
run, not the machine (latency excepted). The same key found finished in the cache is not run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from conf.choices import Keep, TaskKind
from conf.errors import ConfigError
from conf.hashing import plain, sha256_of, sha256_of_file
from conf.methods import TfidfMethod, TunedMethod
from conf.resolve import Arm
from conf.schema import RunConfig
from evaluation.probes.probe_sets import probe_key
from launch.placement import (
    Machine,
    devices_per_actor,
    dtype_name,
    engine_actors,
    threads_of,
    workers_of,
)
from launch.planned import LEG, Job, ModelSource, Plan, TaskFacts
from launch.probing import asks_probes, control_job
from launch.reference_plan import REFERENCE_KINDS, reference_jobs
from launch.search.checks import why_not_packed
from launch.search.leg_plan import after_legs, leg_jobs
from launch.search.trials import Trial
from launch.waves import in_waves

# Raised by hand when a change alters records that a job leaves; cached jobs of older numbers are
# then not found any more.
RECORDS_VERSION = 3
# How a training is kept safe and which of its checkpoints answers, not what it computes; nor do its
# workers determine it, so that a run stopped on two goes on with one.
NOT_TRAINED_KEYS = ("state_every_steps", "keep_states", "keep")


def check_arms(arms: Mapping[str, Arm], task: TaskFacts) -> None:
    """Refuse arms that cannot run on this task."""
    for name, arm in arms.items():
        is_classifier = arm.kind in ("tfidf", "linear_probe")
        if is_classifier and task.kind is not TaskKind.classification:
            raise ConfigError(
                f"arms.{name}",
                found=f"a {arm.kind} arm on a {task.kind.name} task",
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
    searches: Mapping[str, tuple[Trial, ...]] | None = None,
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
        searches: the trials of each arm that is searched.
    """
    searches = searches or {}
    common = {"version": RECORDS_VERSION, "task": task.sha256, "plugins": plugins}
    jobs: list[Job] = _model_jobs(arms, models)
    tuned = [a for a in arms.values() if a.is_tuned]
    facts = _Facts(config=config, models=models, common=common, machine=machine)
    rows, trainings, legs = dict[str, Job](), dict[str, Job](), list[Job]()
    for arm in tuned:
        trials, mix = searches.get(arm.name, ()), (mixes or {}).get(arm.name)
        rows[arm.name] = _rows_job(arm, facts, mix, has_rungs=bool(trials))
        make = partial(_search_job, trials=trials) if trials else _train_job
        trainings[arm.name] = make(arm, facts=facts, rows=rows[arm.name])
        if trials and why_not_packed(trials) is not None:
            train = partial(_train_job, facts=facts, rows=rows[arm.name])
            own = leg_jobs(trials, train, halving=config.sweep.halving)
            legs, trainings[arm.name] = [*legs, *own], after_legs(trainings[arm.name], own)
    curves = {
        a.name: () if a.name in searches else _curve_jobs(a, trainings[a.name], facts)
        for a in tuned
    }
    trained = {
        a.name: _Trained(
            training=trainings[a.name], judges=curves[a.name] if a.trainer.keep is Keep.best else ()
        )
        for a in tuned
    }
    judges = [job for t in trained.values() for job in t.judges]
    jobs += [*rows.values(), *legs, *trainings.values(), *judges]
    for arm in arms.values():
        if arm.kind in REFERENCE_KINDS:
            needs = _needs_model(models[arm.name]) if arm.name in models else ()
            jobs += reference_jobs(arm, facts, needs=needs)
            continue
        jobs += [job for job in curves.get(arm.name, ()) if job not in judges]
        weights = trained.get(arm.name) or trained.get(arm.on or "")
        if arm.name in searches and not arm.is_tuned:
            search = _prompt_search_job(arm, searches[arm.name], weights, facts)
            jobs.append(search)
            weights = _Trained(training=search)
        answers = _answer_jobs(arm, weights, facts)
        control = control_job(answers[0], arm=arm, arms=arms, config=config, task=task)
        jobs += [*answers, control] if control else answers
        for name, asked in general_sets(config, arm).items() if arm.is_tuned else ():
            jobs += _general_jobs(name, asked, arm, trained[arm.name], facts)
        if (probed := probe_key(config.probes)) and asks_probes(arm, arms):
            jobs += _general_jobs("probes", probed, arm, trained.get(arm.name), facts)
    if config.decision.stop_early:
        jobs = in_waves(jobs, seed=config.task.seed)
    return Plan(jobs=one_after_another(jobs))


@dataclass(kw_only=True, slots=True, frozen=True)
class _Facts:
    """What the keys of all jobs that answer have in common."""

    config: RunConfig
    models: Mapping[str, ModelSource]
    common: object
    machine: Machine

    def determined(self, arm: Arm, training: str | None) -> dict[str, object]:
        """What determines an arm's answers, but for the items; training: the checkpoint's key."""
        # What a training is determined by stands in its own key; the engine with its overrides
        # stands here.
        apart = ("trainer", "zero", "engine")
        method = {k: v for k, v in plain(arm.method).items() if k not in apart}
        return {
            "common": self.common,
            "method": method,
            "engine": arm.engine.determining(),
            "kernels": self.config.kernels.impl.name,
            "prompt_file": _prompt_file(arm.answering.prompt),
            "model": _model_facts(arm, self.models[arm.name], self.machine.device),
            "training": training,
        }

    def devices(self, arm: Arm) -> int:
        """Devices of all engine processes of an arm."""
        actors = engine_actors(arm, self.machine)
        return actors * devices_per_actor(actors, self.machine)


@dataclass(kw_only=True, slots=True, frozen=True)
class _Trained:
    """A checkpoint to be: of a training, the last one, or the one that curve jobs choose."""

    training: Job
    judges: tuple[Job, ...] = ()

    @property
    def depends_on(self) -> tuple[str, ...]:
        """Jobs that must be done before it is there and known."""
        return (self.training.id, *(job.id for job in self.judges))

    @property
    def key(self) -> str:
        """What determines it: of a chosen one also how it is chosen."""
        if not self.judges:
            return self.training.key
        return sha256_of({"training": self.training.key, "best": [j.key for j in self.judges]})


def one_after_another(jobs: list[Job]) -> tuple[Job, ...]:
    """Jobs of equal keys have equal records: the second waits for the first and reuses them.

    Of a later wave or leg the first may be cancelled, and the second run all the same.
    """
    first: dict[str, str] = {}
    ordered = []
    for job in jobs:
        if first.get(job.key, job.id) not in (job.id, *job.depends_on, *job.after):
            if job.wave or job.kind == LEG:
                job = dataclasses.replace(job, after=(*job.after, first[job.key]))
            else:
                job = dataclasses.replace(job, depends_on=(*job.depends_on, first[job.key]))
        first.setdefault(job.key, job.id)
        ordered.append(job)
    return tuple(ordered)


def _model_jobs(arms: Mapping[str, Arm], models: Mapping[str, ModelSource]) -> list[Job]:
    sources = {m.key: m for name, m in models.items() if name in arms and not m.is_ready}
    return [Job(id=f"model:{key[:8]}", kind="model", arm=None, key=key) for key in sources]


def _needs_model(source: ModelSource) -> tuple[str, ...]:
    return () if source.is_ready else (f"model:{source.key[:8]}",)


def _model_facts(arm: Arm, source: ModelSource, device: str) -> list[object]:
    model = arm.model
    return [source.key, dtype_name(arm, device), device, model.layout, model.max_length]


def _rows_job(arm: Arm, facts: _Facts, mix: str | None, *, has_rungs: bool) -> Job:
    """The prepare job of a training: its prompts and targets, rendered and tokenised once.

    has_rungs: with the validation rows that trials of a search are judged by.
    """
    method, source = arm.answering, facts.models[arm.name]
    prompt = [method.prompt, method.num_shots, method.shot_selection, method.draw, method.persona]
    prompt += [method.instruction, _prompt_file(method.prompt)]
    model = [source.key, arm.model.layout, arm.model.max_length]
    key = {"kind": "rows", "common": facts.common, "prompt": prompt, "model": model, "mix": mix}
    if has_rungs:
        key["rungs"] = [method.answer_by, arm.engine.too_long]
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


def _train_job(arm: Arm, *, facts: _Facts, rows: Job) -> Job:
    workers = workers_of(facts.config, facts.machine)
    source = facts.models[arm.name]
    shared = {f.name for f in dataclasses.fields(TunedMethod)} - {"kind"}
    method = {k: v for k, v in plain(arm.training).items() if k not in shared}
    key = {
        "kind": "train",
        "rows": rows.key,
        "method": method,
        "trainer": {k: v for k, v in plain(arm.trainer).items() if k not in NOT_TRAINED_KEYS},
        "zero": arm.zero,
        "model": _model_facts(arm, source, facts.machine.device),
        "kernels": facts.config.kernels.impl.name,
    }
    return Job(
        id=f"train:{arm.name}",
        kind="train",
        arm=arm.name,
        key=sha256_of(key),
        depends_on=(*_needs_model(source), rows.id),
        devices=workers * threads_of(workers, facts.machine),
    )


def _search_job(arm: Arm, *, facts: _Facts, rows: Job, trials: Sequence[Trial]) -> Job:
    """The training of an arm that is searched: all its trials, of which one is chosen."""
    training = _train_job(arm, facts=facts, rows=rows)
    keys = [[t.setting, _train_job(t.arm, facts=facts, rows=rows).key] for t in trials]
    return dataclasses.replace(
        training,
        id=f"search:{arm.name}",
        kind="search",
        key=sha256_of({"kind": "search", "trials": keys, **_search_rules(facts)}),
    )


def _prompt_search_job(
    arm: Arm, trials: Sequence[Trial], weights: _Trained | None, facts: _Facts
) -> Job:
    """The search of a prompted arm's setting, on validation."""
    source = facts.models[arm.name]
    on = weights.key if weights else arm.on
    keys = [[t.setting, facts.determined(t.arm, on)] for t in trials]
    return Job(
        id=f"search:{arm.name}",
        kind="prompt_search",
        arm=arm.name,
        key=sha256_of({"kind": "prompt_search", "trials": keys, **_search_rules(facts)}),
        depends_on=_needs_model(source) + (weights.depends_on if weights else ()),
        devices=facts.devices(arm),
    )


def _search_rules(facts: _Facts) -> dict[str, object]:
    sweep = facts.config.sweep
    budget = {k: v for k, v in plain(sweep.budget).items() if k != "max_trials"}
    return {"halving": sweep.halving, "budget": budget}


def _curve_jobs(arm: Arm, training: Job, facts: _Facts) -> tuple[Job, ...]:
    """The jobs that score a training's checkpoints on validation.

    The last one is scored by the evaluate job, but where it has to be chosen before.
    """
    count = arm.trainer.num_points
    points: list[int | None] = [*range(count - 1)]
    if arm.trainer.keep is Keep.best:
        points.append(None)
    determined = facts.determined(arm, training.key)
    return tuple(
        Job(
            id=f"curve:{arm.name}:{number}",
            kind="curve",
            arm=arm.name,
            key=sha256_of({"kind": "curve", "point": point, **determined}),
            depends_on=(*_needs_model(facts.models[arm.name]), training.id),
            devices=facts.devices(arm),
            point=point,
        )
        for number, point in enumerate(points)
    )


def _answer_jobs(arm: Arm, trained: _Trained | None, facts: _Facts) -> list[Job]:
    """The jobs that answer an arm's items: validation and test, latency."""
    determined = facts.determined(arm, trained.key if trained else arm.on)
    evaluate = Job(
        id=f"evaluate:{arm.name}",
        kind="evaluate",
        arm=arm.name,
        key=sha256_of({"kind": "evaluate", **determined}),
        depends_on=_needs_model(facts.models[arm.name]) + (trained.depends_on if trained else ()),
        devices=facts.devices(arm),
    )
    if not arm.engine.latency_requests:
        return [evaluate]
    devices = devices_per_actor(engine_actors(arm, facts.machine), facts.machine)
    latency = Job(
        id=f"latency:{arm.name}",
        kind="latency",
        arm=arm.name,
        key=sha256_of({"kind": "latency", "on": [facts.machine.name, devices], **determined}),
        depends_on=(evaluate.id,),
        devices=devices,  # one engine process answers, alone
        is_exclusive=True,
    )
    return [evaluate, latency]


def general_sets(config: RunConfig, arm: Arm) -> dict[str, int]:
    """Sets that each tuned model and its base are asked besides the task: name -> items.

    The general set's answers are found by the scores of its choices.
    """
    general = config.general
    num_scored = 0 if arm.engine.only_generates else general.items
    sizes = {"general": num_scored, "instructions": general.instruction_items}
    return {name: size for name, size in sizes.items() if size}


def _general_jobs(
    name: str, asked: object, arm: Arm, trained: _Trained | None, facts: _Facts
) -> tuple[Job, ...]:
    """One of the general sets, asked of the arm's base model and of the tuned one, if any.

    The base model's key has nothing of the arm in it, so that arms on one base ask it once.
    """
    source = facts.models[arm.name]
    determined = {
        "version": RECORDS_VERSION,
        "items": asked,
        "engine": arm.engine.determining(),
        "kernels": facts.config.kernels.impl.name,
        "model": _model_facts(arm, source, facts.machine.device),
    }

    def job(kind: str, after: _Trained | None) -> Job:
        return Job(
            id=f"{kind}:{arm.name}",
            kind=kind,
            arm=arm.name,
            key=sha256_of({"kind": kind, "training": after and after.key, **determined}),
            depends_on=_needs_model(source) + (after.depends_on if after else ()),
            devices=facts.devices(arm),
        )

    base = job(f"{name}_base", None)
    return (base, job(name, trained)) if trained else (base,)
