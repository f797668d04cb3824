"""Everything that is refused before anything starts; needs no torch, Ray or transformers."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf.errors import ClusterError, ConfigError, Refused
from conf.hashing import plain, sha256_of
from conf.methods import (
    AnsweringMethod,
    InstructionMethod,
)
from conf.resolve import Arm, resolve_arms
from conf.schema import RunConfig, non_finite_keys
from evaluation.mix import Mix, make_mix
from evaluation.models import ModelPlace, locate
from evaluation.models.facts import ModelFacts, facts
from evaluation.plugins import load_plugins
from evaluation.probes.probe_sets import probe_items
from evaluation.tasks import Task, load_task
from kernels.dispatch import KernelsNotBuilt, choose
from launch import plan as planning
from launch.arm_checks import (
    check_arm,
    check_batches,
    check_hosted_price,
    check_label_tokens,
    check_points,
    check_quantization,
    check_targets,
)
from launch.budget import check_budget
from launch.checkpoints import checkpoint_sha256
from launch.cluster import check_cluster, machine_for, planned_machine
from launch.elsewhere.copy_store import check_copy_to
from launch.estimate import with_estimates
from launch.label_curve.jobs import PlanParts, with_label_jobs
from launch.label_curve.plan import LabelPlan, curve_of, label_plan
from launch.placement import Machine, workers_of
from launch.planned import ModelSource, Plan, TaskFacts
from launch.probing import wordings_of
from launch.search.checks import check_search
from launch.search.default_spaces import with_default_spaces
from launch.search.trials import Trial, check_space
from launch.tracking import mode_of
from launch.waves import check_waves


@dataclass(kw_only=True, slots=True, frozen=True)
class Checked:
    """A run that may start: nothing in it is refused any more."""

    config: RunConfig
    exp: str
    command: str
    name: str
    task: Task
    arms: dict[str, Arm]
    places: dict[str, ModelPlace]
    model_facts: dict[str, ModelFacts]  # of the base models that are ready
    mixes: dict[str, Mix]  # of the arms that train on a mix of sources
    searches: dict[str, tuple[Trial, ...]]  # the trials of the arms that are searched
    machine: Machine
    plan: Plan
    wandb_mode: Literal["online", "offline", "off"]
    labels: LabelPlan | None = None  # the runs of a label curve

    @property
    def root(self) -> Path:
        """Where runs and the cache lie."""
        return Path(self.config.run.root)


def check(
    config: RunConfig, *, exp: str | None, command: str, tasks: dict[str, Task] | None = None
) -> Checked:
    """Check a composed configuration against data, models and machine.

    Args:
        config: the composed configuration.
        exp: the name after `+exp=`.
        command: what was typed.
        tasks: those that earlier runs of a sweep have read, so that equal ones are read once.

    Raises:
        Refused: with the key or file, what was found, what is expected, and what to write.
    """
    _check_values(config, exp)
    if not is_planned(config):
        check_cluster(config.cluster)
    check_copy_to(config.cluster)
    plugins = load_plugins(config.plugins)
    tasks = {} if tasks is None else tasks
    key = sha256_of([plain(config.task), plugins])
    pool = tasks[key] = tasks.get(key) or load_task(config.task)
    name = _run_name(config, exp or "run")
    config = planning.with_reference(config, TaskFacts(sha256=pool.sha256, kind=pool.kind))
    config, task = curve_of(config, pool)
    config = with_default_spaces(config, task)
    arms = _checked_arms(config, task)
    mixes = {
        name: make_mix(arm, task, task_source=config.task.source)
        for name, arm in arms.items()
        if isinstance(arm.method, InstructionMethod)
    }
    machine = (planned_machine if is_planned(config) else machine_for)(config.cluster)
    _check_kernels(config, machine)
    check_quantization(arms, machine)
    places = _places(config, arms, task)
    ready = {n: facts(p.path) for n, p in places.items() if p.kind == "ready"}
    check_targets(arms, ready)
    check_label_tokens(arms, {name: places[name] for name in ready}, task)
    sources = _sources(arms, places, ready)
    check_batches(arms, workers=workers_of(config, machine))
    check_points(arms, task, mixes)
    probe_items(config.probes)  # a file that cannot be used is refused here
    searches = _checked_searches(config, arms, task, ready)
    _check_writable(Path(config.run.root))
    labels = label_plan(config, arms, pool=pool) if config.label_curve.enabled else None
    parts = PlanParts(
        config=config, places=places, sources=sources, plugins=plugins, machine=machine
    )
    plan = _plan_of(parts, arms, task=task, mixes=mixes, searches=searches, labels=labels)
    check_budget(config, plan, machine)
    return Checked(
        config=config,
        exp=exp or "run",
        command=command,
        name=name,
        task=task,
        arms=arms,
        places=places,
        model_facts=ready,
        mixes=mixes,
        searches=searches,
        machine=machine,
        plan=plan,
        wandb_mode=mode_of(config),
        labels=labels,
    )


def _plan_of(
    parts: PlanParts,
    arms: dict[str, Arm],
    *,
    task: Task,
    mixes: dict[str, Mix],
    searches: dict[str, tuple[Trial, ...]],
    labels: LabelPlan | None,
) -> Plan:
    """The jobs of what was checked, with their estimates; those of a label curve with the rest."""
    config = parts.config
    plan = planning.build_plan(
        config,
        arms,
        task=TaskFacts(sha256=task.sha256, kind=task.kind, wordings=wordings_of(task, config)),
        models=parts.sources,
        plugins=parts.plugins,
        machine=parts.machine,
        mixes={name: mix.sha256 for name, mix in mixes.items()},
        searches=searches,
    )
    plan = with_estimates(
        plan,
        config=config,
        arms=arms,
        task=task,
        places=parts.places,
        machine=parts.machine,
        mix_sizes={name: mix.size for name, mix in mixes.items()},
        searches=searches,
    )
    return plan if labels is None else with_label_jobs(plan, arms, labels, parts)


def is_planned(config: RunConfig) -> bool:
    """Whether the plan is for a named accelerator, which need not be here."""
    return config.dry_run and config.cluster.device.is_named


def _check_values(config: RunConfig, exp: str | None) -> None:
    for key in non_finite_keys(plain(config)):
        raise ConfigError(key, found="nan or infinity", expected="a finite number")
    if not config.arms:
        raise ConfigError(
            "arms",
            found="no arm",
            expected="at least one arm to run",
            remedy="name an experiment, e.g. +exp=compare; `python launch.py` lists them",
        )
    for name in config.arms:
        if not name.replace("_", "").replace("-", "").isalnum() or len(name) > 64:
            raise ConfigError(
                f"arms.{name}", found=name, expected="a name of letters, digits, _ and -"
            )
    check_waves(config.decision)
    _check_distribution_name()


def _check_kernels(config: RunConfig, machine: Machine) -> None:
    try:
        choose(config.kernels.impl.name, machine.device)
    except KernelsNotBuilt as error:
        raise ConfigError(
            f"kernels.impl={config.kernels.impl.name}",
            found=str(error),
            expected="an implementation that runs on this device",
            remedy="write kernels.impl=auto",
        ) from error


def _check_distribution_name() -> None:
    """A distribution called `kernels` and our folder of that name cannot both be imported."""
    try:
        importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ConfigError(
        "the installed package `kernels`",
        found="a distribution with the name of this project's folder kernels/",
        expected="an environment without it",
        remedy="type: pip uninstall kernels, or use the .venv that `make install` makes",
    )


def _checked_arms(config: RunConfig, task: Task) -> dict[str, Arm]:
    arms = resolve_arms(config)
    planning.check_arms(arms, TaskFacts(sha256=task.sha256, kind=task.kind))
    for arm in arms.values():
        check_arm(arm, task)
        check_hosted_price(config, arm)
    return arms


def _checked_searches(
    config: RunConfig,
    arms: dict[str, Arm],
    task: Task,
    ready: dict[str, ModelFacts],
) -> dict[str, tuple[Trial, ...]]:
    """The trials of each arm that is searched; each passes the checks of an arm of its own."""
    searches = check_space(config, arms)
    for name, trials in searches.items():
        for trial in trials:
            try:
                check_arm(trial.arm, task)
                check_targets({name: trial.arm}, ready)
                check_batches({name: trial.arm}, workers=1)
            except Refused as error:
                error.where = f"{error.where}, in the trial {trial.label}"
                raise
        check_search(arms[name], trials)
    return searches


def _places(config: RunConfig, arms: dict[str, Arm], task: Task) -> dict[str, ModelPlace]:
    cache = Path(config.run.root) / ".cache"
    return {
        name: locate(arm.model, cache=cache, texts_sha256=task.sha256)
        for name, arm in arms.items()
        if isinstance(arm.method, AnsweringMethod)
    }


def _place_key(place: ModelPlace, ready: ModelFacts | None) -> str:
    """What identifies a model's bytes: a made directory's key, else the directory's own hash."""
    is_made = place.path.parent.name == "models" and place.path.name == place.key
    return place.key if is_made or ready is None else ready.sha256


def _sources(
    arms: dict[str, Arm], places: dict[str, ModelPlace], ready: dict[str, ModelFacts]
) -> dict[str, ModelSource]:
    """What identifies the weights that each arm starts from: model, and the user's checkpoint."""
    sources = {}
    for name, place in places.items():
        key, checkpoint = _place_key(place, ready.get(name)), _checkpoint_key(arms[name], arms)
        sources[name] = ModelSource(
            key=sha256_of([key, checkpoint]) if checkpoint else key, is_ready=place.kind == "ready"
        )
    return sources


def _checkpoint_key(arm: Arm, arms: dict[str, Arm]) -> str | None:
    """The hash of the user's own checkpoint directory that an arm runs on."""
    if arm.on is None or arm.on in arms:
        return None
    directory = Path(arm.on)
    if not directory.is_dir():
        raise ConfigError(
            f"arms.{arm.name}.on",
            found=f"{arm.on}, neither an arm of this run nor a directory",
            expected="a fine-tuned arm of this run "
            f"({', '.join(n for n, a in arms.items() if a.is_tuned) or 'there is none'}), "
            "or a checkpoint directory",
            remedy=f"write arms.{arm.name}.on=outputs/RUN/arms/lora/final/checkpoint",
        )
    return checkpoint_sha256(directory)


def _check_writable(root: Path) -> None:
    """The first existing directory on the way to the root must be writable."""
    place = root.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ClusterError(
            "run.root",
            found=f"{root}: {place} cannot be written",
            expected="a directory that can be written",
            remedy="write run.root=DIRECTORY",
        )


def _run_name(config: RunConfig, exp: str) -> str:
    """The user's name, else <exp>-<task>-<model>-<8 hex>: same command, same directory.

    Raises:
        ConfigError: a part that would lead out of run.root.
    """
    made = {"task.name": config.task.name, "model.name": config.model.name}
    for key, name in {"run.name": config.run.name}.items() if config.run.name else made.items():
        allowed = name.replace(".", "").replace("_", "").replace("-", "").isalnum()
        if not allowed or len(name) > 128 or name.startswith("."):
            raise ConfigError(key, found=name, expected="letters, digits, '.', '_' and '-' only")
    if config.run.name:
        return config.run.name
    content = {
        k: v for k, v in plain(config).items() if k not in ("run", "cluster", "tracking", "dry_run")
    }
    return f"{exp}-{config.task.name}-{config.model.name}-{sha256_of(content)[:8]}"
