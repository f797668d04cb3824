"""Which trials a sweep has: settings of its space, by grid or at random, with replicates (pure)."""

from __future__ import annotations

import enum
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from conf.errors import ConfigError
from conf.hashing import canonical_json
from conf.methods import AnsweringMethod
from conf.resolve import Arm
from conf.schema import RunConfig
from conf.space import Dimension, Range, arm_with, space_of, value_of
from conf.sweeps import SweepConfig

MAX_SETTINGS = 1000  # of an arm; a grid grows over it unnoticed
MAX_DRAWS = 1000  # for a setting that has not come yet
MAX_SHOWN = 24  # characters of a value in a label

Values = tuple[tuple[str, Any], ...]


@dataclass(kw_only=True, slots=True, frozen=True)
class Trial:
    """One setting of one arm, tried once.

    number: of the arm's trials, from 0. setting: equal for trials that differ by seed or draw
    alone. seed, draw: the replicate's numbers from 0, added to the arm's own seed and draw. values:
    field and value, by field. arm: complete, as if the values had been typed.
    """

    number: int
    setting: int
    seed: int
    draw: int
    values: Values
    arm: Arm

    @property
    def setting_label(self) -> str:
        """The setting for people: learning_rate=3e-4 lora_rank=8."""
        last = Counter(field.rpartition(".")[2] for field, _ in self.values)
        names = {field: field.rpartition(".")[2] for field, _ in self.values}
        return " ".join(
            f"{field if last[names[field]] > 1 else names[field]}={shown(value)}"
            for field, value in self.values
        )

    @property
    def label(self) -> str:
        """The trial for people; the first replicate bears its setting's."""
        replicate = [f"{n}={i}" for n, i in (("seed", self.seed), ("draw", self.draw)) if i]
        return " ".join([self.setting_label, *(f"+{part}" for part in replicate)])


def shown(value: Any) -> str:
    """A value as short as people write it: 3e-4, true, null, cosine."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, bool) or value is None:
        return canonical_json(value)
    if isinstance(value, float):
        if value and not 1e-3 <= abs(value) < 1e5:
            mantissa, _, exponent = f"{value:.5e}".partition("e")
            return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(shown, value))}]"
    text = str(value)
    # Wordings often begin alike: what tells them apart may stand at the end.
    return text if len(text) <= MAX_SHOWN else f"{text[:10]}...{text[3 + 10 - MAX_SHOWN :]}"


def trials_of(config: RunConfig, arm: str) -> tuple[Trial, ...]:
    """The trials of one arm; none where nothing of it is searched.

    A grid is in row-major order of the fields by name, the last one varying fastest. Trial k of a
    random search is the same however many follow it. No two settings are equal.

    Raises:
        ConfigError: a space that cannot be searched so, or a setting that the arm refuses.
    """
    if config.sweep.name == "none" or arm not in config.sweep.space:
        return ()
    dimensions = space_of(config, arm)
    is_grid = config.sweep.name == "grid"
    settings = _grid(arm, dimensions) if is_grid else _drawn(arm, dimensions, config.sweep)
    return tuple(_numbered(config, arm, settings))


def check_space(config: RunConfig, arms: Mapping[str, Arm]) -> dict[str, tuple[Trial, ...]]:
    """Refuse a sweep that cannot be done as asked; the trials of each arm that is searched.

    Args:
        config: the run.
        arms: its arms, complete.

    Raises:
        ConfigError: no space, or a space and no search; a field or value that is refused;
            replicates that would all be equal; more trials than sweep.budget.max_trials.
    """
    sweep = config.sweep
    if (sweep.name == "none") != (not sweep.space):
        raise ConfigError(
            "sweep.space",
            found=f"{', '.join(sweep.space) or 'nothing'} to search, with sweep={sweep.name}",
            expected="fields with their values and sweep=random or grid, or none of both",
            remedy="write sweep=random 'sweep.space.lora.trainer.learning_rate="
            "{log_uniform:[1e-5,3e-3]}'"
            if not sweep.space
            else "write sweep=random or sweep=grid",
        )
    trials = {arm: trials_of(config, arm) for arm in sweep.space}
    _check_replicates(sweep, {arm: arms[arm] for arm in trials}, trials)
    _check_count(sweep, trials)
    return trials


def _grid(arm: str, dimensions: tuple[Dimension, ...]) -> Iterator[Values]:
    for d in dimensions:
        if isinstance(d, Range) and d.num_points is None:
            key = f"sweep.space.{arm}.{d.field}"
            raise ConfigError(
                key,
                found=f"{d.kind} without the number of points",
                expected="a grid's points, or a list of values",
                remedy=f"write '{key}={{{d.kind}:[{shown(d.low)},{shown(d.high)}],grid:4}}', "
                "or sweep=random",
            )
    points = [d.points() for d in dimensions]
    num_settings = math.prod(map(len, points))
    if num_settings > MAX_SETTINGS:
        raise ConfigError(
            f"sweep.space.{arm}",
            found=f"a grid of {num_settings} settings",
            expected=f"at most {MAX_SETTINGS}",
            remedy="write sweep=random, and sweep.trials for how many",
        )
    for values in itertools.product(*points):
        yield tuple(zip((d.field for d in dimensions), values, strict=True))


def _drawn(arm: str, dimensions: tuple[Dimension, ...], sweep: SweepConfig) -> Iterator[Values]:
    """Settings drawn one after another, each that has come before left out.

    A space with fewer settings than sweep.trials is searched whole: another arm's may have more.
    """
    sizes = [size for d in dimensions if (size := d.size) is not None]
    is_finite = len(sizes) == len(dimensions)
    num_settings = min(sweep.trials, math.prod(sizes)) if is_finite else sweep.trials
    if sweep.trials > MAX_SETTINGS:
        raise ConfigError(
            "sweep.trials", found=str(sweep.trials), expected=f"at most {MAX_SETTINGS}"
        )
    seen: set[str] = set()
    attempt = 0
    while len(seen) < num_settings:
        for _ in range(MAX_DRAWS * (len(seen) + 1)):
            values = tuple((d.field, d.at(_share(sweep, d.field, attempt))) for d in dimensions)
            attempt += 1
            if canonical_json(values) not in seen:
                break
        else:
            raise ConfigError(
                f"sweep.space.{arm}",
                found=f"a space with no more than {len(seen)} settings that differ",
                expected=f"{sweep.trials}, as sweep.trials asks for",
                remedy=f"widen a range, or write sweep.trials={len(seen)}",
            )
        seen.add(canonical_json(values))
        yield values


def _share(sweep: SweepConfig, field: str, attempt: int) -> float:
    """A number in [0, 1) with 53 random bits, by hash: the same everywhere and in any order.

    It does not depend on the arm, so that two arms with the same space try the same settings, nor
    on the other fields, so that a field more leaves the values of the rest as they were.
    """
    digest = hashlib.sha256(f"{sweep.seed}/{field}/{attempt}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _numbered(config: RunConfig, arm: str, settings: Iterator[Values]) -> Iterator[Trial]:
    number = 0
    for setting, values in enumerate(settings):
        first = arm_with(config, arm, values)
        for seed, draw in _replicates(config.sweep, first):
            own = [] if not seed else [("trainer.seed", first.trainer.seed + seed)]
            own += [] if not draw else [("draw", first.answering.draw + draw)]
            made = arm_with(config, arm, [*values, *own]) if own else first
            typed = tuple((field, value_of(made.method, field)) for field, _ in values)
            yield Trial(
                number=number, setting=setting, seed=seed, draw=draw, values=typed, arm=made
            )
            number += 1


def _replicates(sweep: SweepConfig, arm: Arm) -> Iterator[tuple[int, int]]:
    """Seeds for what trains and draws for what has shots: other replicates would be equal."""
    seeds = sweep.replicates.seeds if arm.is_tuned else 1
    has_draws = isinstance(arm.method, AnsweringMethod) and arm.method.num_shots > 0
    draws = sweep.replicates.draws if has_draws else 1
    return itertools.product(range(seeds), range(draws))


def _check_replicates(
    sweep: SweepConfig, arms: Mapping[str, Arm], trials: Mapping[str, tuple[Trial, ...]]
) -> None:
    every = [trial for of in trials.values() for trial in of]
    asked = sweep.replicates
    if asked.seeds > 1 and not any(arm.is_tuned for arm in arms.values()):
        raise ConfigError(
            "sweep.replicates.seeds",
            found=f"{asked.seeds}, and no arm of sweep.space trains",
            expected="1 for prompted arms",
            remedy="write sweep.replicates.draws for the shots",
        )
    if asked.draws > 1 and every and not any(trial.arm.answering.num_shots for trial in every):
        raise ConfigError(
            "sweep.replicates.draws",
            found=f"{asked.draws}, and no setting has shots",
            expected="1, or settings with num_shots above 0",
            remedy="write sweep.replicates.seeds for trainings",
        )


def _check_count(sweep: SweepConfig, trials: Mapping[str, tuple[Trial, ...]]) -> None:
    num_trials = sum(map(len, trials.values()))
    limit = sweep.budget.max_trials
    if limit is None or num_trials <= limit:
        return
    settings = sum(len({trial.setting for trial in of}) for of in trials.values())
    raise ConfigError(
        "sweep.budget.max_trials",
        found=f"{limit}, and {settings} settings with replicates are {num_trials} trials",
        expected="a budget that all of them fit",
        remedy="raise it, or lower sweep.replicates or "
        + ("sweep.trials" if sweep.name == "random" else "the values in sweep.space"),
    )
