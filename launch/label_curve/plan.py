"""The runs of a label curve: every arm that learns, on nested sets of labels (pure).

A run is an arm on one set of labels, under a name of its own (`lora@32.d1`), so that its jobs,
records and bill are those of any arm. Sets that equal an arm's own share its jobs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from conf.choices import AnswerBy, Calibration, Keep, Normalisation, ShotSelection
from conf.errors import ConfigError, NotBuiltYet
from conf.hashing import sha256_of
from conf.label_results import LabelPlace
from conf.methods import AnsweringMethod, InstructionMethod, Method, TunedMethod
from conf.resolve import Arm
from conf.schema import RunConfig
from evaluation.tasks import Task
from evaluation.tasks.defaults import LABEL_KINDS
from evaluation.tasks.label_subsets import share_flipped, sizes_of, subset

CLASSIFIERS = ("tfidf", "linear_probe")


@dataclass(kw_only=True, slots=True, frozen=True)
class LabelRun:
    """An arm on one set of labels. arm: complete, under the run's name; base: the arm it is of.

    task: with these training items alone.
    """

    base: str
    arm: Arm
    task: Task
    num_used: int
    is_first: bool  # of its arm and size: without noise, the first draw and seed


@dataclass(kw_only=True, slots=True, frozen=True)
class LabelPlan:
    """A label curve. places: arm by arm, where the records of each point lie.

    features_task: all training items of any run, for what is computed once per item.
    """

    sizes: tuple[int, ...]
    runs: tuple[LabelRun, ...]
    places: tuple[LabelPlace, ...]
    features_task: Task


def curve_of(config: RunConfig, pool: Task) -> tuple[RunConfig, Task]:
    """What the arms of a curve run as: on the largest set of the first draw, rules fixed.

    Nothing is chosen on validation labels, so that a point costs the labels it says: labels are
    scored, and calibrated by batch, which needs the inputs alone. Unchanged where no curve is
    asked for.

    Raises:
        ConfigError, NotBuiltYet: what a label curve cannot do.
    """
    if not config.label_curve.enabled:
        return config, pool
    _check(config)
    largest = sizes_of(config.label_curve, pool)[-1]
    arms = {name: _fixed(method, config, pool, largest) for name, method in config.arms.items()}
    return dataclasses.replace(config, arms=arms), head_task(config, pool)


def head_task(config: RunConfig, pool: Task) -> Task:
    """The task of the arms themselves: of a curve the largest set of the first draw."""
    if not config.label_curve.enabled:
        return pool
    return subset(pool, size=sizes_of(config.label_curve, pool)[-1])


def _check(config: RunConfig) -> None:
    if config.sweep.name != "none" or config.search:
        raise NotBuiltYet(
            "a search within a label curve",
            instead="search first (+exp=sweep), and type the chosen values with +exp=label_curve",
        )
    if config.decision.stop_early:
        raise ConfigError(
            "decision.stop_early",
            found="true with label_curve.enabled=true",
            expected="false: estimates that are published are made on all items",
            remedy="write decision.stop_early=false",
        )
    for name, method in config.arms.items():
        keep = method.trainer.keep if isinstance(method, TunedMethod) else None
        if keep is Keep.best or (keep is None and config.trainer.keep is Keep.best):
            raise ConfigError(
                f"arms.{name}.trainer.keep",
                found="best with label_curve.enabled=true",
                expected="last: a choice on validation takes labels that no point counts",
                remedy="write trainer.keep=last",
            )
        if isinstance(method, InstructionMethod):
            raise NotBuiltYet(
                f"arms.{name}: a mix of sources on a label curve",
                instead=f"drop the arm: ~method@arms.{name}",
            )


def _fixed(method: Method, config: RunConfig, pool: Task, largest: int) -> Method:
    """The method without a choice that validation labels would make, and no shots too many."""
    if not isinstance(method, AnsweringMethod):
        return method
    shots = min(method.num_shots, largest)
    if pool.kind not in LABEL_KINDS or method.self_consistency:
        return dataclasses.replace(method, num_shots=shots)
    is_sum = method.normalisation in (Normalisation.auto, Normalisation.sum)
    is_open = is_sum and method.calibration is Calibration.auto
    winner_only = config.engine.winner_only or method.engine.winner_only
    calibration = Calibration.none if winner_only or not is_sum else Calibration.batch
    return dataclasses.replace(
        method,
        num_shots=shots,
        answer_by=AnswerBy.score if method.answer_by is AnswerBy.auto else method.answer_by,
        normalisation=Normalisation.sum if is_sum else method.normalisation,
        calibration=calibration if is_open else method.calibration,
    )


def learns(arm: Arm, arms: Mapping[str, Arm]) -> bool:
    """Whether an arm's answers depend on the training labels."""
    if arm.is_tuned or arm.kind in CLASSIFIERS or arm.on in arms:
        return True
    return isinstance(arm.method, AnsweringMethod) and arm.method.num_shots > 0


def _used(arm: Arm, size: int) -> int:
    """How many of so many labels an arm looks at: shots that are drawn end at num_shots."""
    method = arm.method
    is_prompt = isinstance(method, AnsweringMethod) and arm.kind == "prompt" and arm.on is None
    if not is_prompt or arm.answering.shot_selection is ShotSelection.retrieved:
        return size
    return min(size, arm.answering.num_shots)


def label_plan(config: RunConfig, arms: Mapping[str, Arm], *, pool: Task) -> LabelPlan:
    """All runs of a curve.

    Args:
        config: what curve_of returned.
        arms: its arms, complete.
        pool: the task with all training items.
    """
    curve = config.label_curve
    sizes = sizes_of(curve, pool)
    sets = _Sets(pool=pool, largest=sizes[-1])
    runs: dict[str, LabelRun] = {}
    places = []
    for arm in arms.values():
        if not learns(arm, arms):
            places.append(LabelPlace(arm=arm.name, records=arm.name, num_labels=0, num_used=0))
            continue
        seeds = range(curve.seeds if arm.is_tuned or arm.on in arms else 1)
        for noise, size, draw, seed in itertools.product(
            curve.noise, sizes, range(curve.draws), seeds
        ):
            point = _Point(size=size, draw=draw, seed=seed, noise=noise)
            place, run = _place(arm, arms, point, sets)
            places.append(place)
            if place.records != arm.name:
                runs.setdefault(place.records, run)
    return LabelPlan(
        sizes=sizes,
        runs=tuple(runs.values()),
        places=tuple(places),
        features_task=sets.union(sizes[-1], curve.draws),
    )


@dataclass(kw_only=True, slots=True, frozen=True)
class _Point:
    size: int
    draw: int
    seed: int
    noise: float

    def name(self, arm: str, used: int) -> str:
        """The name of the records: what differs from the first run stands in it."""
        parts = [f"{used}", f"d{self.draw}"]
        parts += [f"s{self.seed}"] if self.seed else []
        parts += [f"e{self.noise:g}".replace(".", "_")] if self.noise else []
        return f"{arm}@{'.'.join(parts)}"


@dataclass(kw_only=True, slots=True)
class _Sets:
    """Sets of labels, each made once."""

    pool: Task
    largest: int
    known: dict[tuple[int, int, float], Task] = dataclasses.field(default_factory=dict)

    def task(self, size: int, draw: int, noise: float) -> Task:
        key = (size, draw, noise)
        if key not in self.known:
            self.known[key] = subset(self.pool, size=size, draw=draw, noise=noise)
        return self.known[key]

    def union(self, size: int, draws: int) -> Task:
        ids = {i.id for d in range(draws) for i in self.task(size, d, 0.0).items["train"]}
        train = tuple(item for item in self.pool.items["train"] if item.id in ids)
        told = [self.task(size, draw, 0.0).sha256 for draw in range(draws)]
        if len(train) == len(self.pool.items["train"]):
            return self.pool
        return dataclasses.replace(
            self.pool,
            items={**self.pool.items, "train": train},
            sha256=sha256_of(["union", *told]),
        )


def _place(
    arm: Arm, arms: Mapping[str, Arm], point: _Point, sets: _Sets
) -> tuple[LabelPlace, LabelRun]:
    used = _used(arm, point.size)
    task = sets.task(used, point.draw, point.noise)
    is_first = (point.draw, point.seed, point.noise) == (0, 0, 0.0)
    is_own = is_first and used == sets.largest
    name = arm.name if is_own else point.name(arm.name, used)
    on = arm.on
    if arm.on in arms:
        assert arm.on is not None
        on = arm.on if is_own else point.name(arm.on, point.size)
    place = LabelPlace(
        arm=arm.name,
        records=name,
        num_labels=point.size,
        num_used=used,
        draw=point.draw,
        seed=point.seed,
        noise=point.noise,
        share_flipped=share_flipped(sets.pool, task) if point.noise else 0.0,
        on=on,
    )
    made = _variant(arm, name, point, used, on=on, is_timed=is_first)
    run = LabelRun(base=arm.name, arm=made, task=task, num_used=used, is_first=is_first)
    return place, run


def _variant(
    arm: Arm, name: str, point: _Point, used: int, *, on: str | None, is_timed: bool
) -> Arm:
    """The arm under a run's name. Requests are timed once for each size."""
    method: Method = arm.method
    if isinstance(method, AnsweringMethod):
        shots = min(method.num_shots, used)
        draw = method.draw + point.draw if shots else method.draw
        method = dataclasses.replace(method, num_shots=shots, draw=draw, on=on)
    timed = arm.engine if is_timed else dataclasses.replace(arm.engine, latency_requests=0)
    trainer = dataclasses.replace(arm.trainer, seed=arm.trainer.seed + point.seed)
    return dataclasses.replace(arm, name=name, method=method, engine=timed, trainer=trainer)


def by_task(runs: Sequence[LabelRun]) -> Iterator[tuple[Task, list[LabelRun]]]:
    """Runs with equal sets of labels together."""
    groups: dict[str, list[LabelRun]] = {}
    for run in runs:
        groups.setdefault(run.task.sha256, []).append(run)
    yield from ((group[0].task, group) for group in groups.values())
