"""The search space of a sweep: what `sweep.space.<arm>.<field>` may say, read and checked (pure).

A field is what stands behind `arms.<arm>.` on the command line. Its values are a list, or a range:

    sweep.space.lora.lora_rank=[4,8,16]
    sweep.space.lora.trainer.learning_rate={log_uniform:[1e-5,3e-3]}
    sweep.space.lora.lora_alpha={uniform:[8,64]}          evenly over real numbers
    sweep.space.lora.trainer.batch_size={int_uniform:[4,16]}   evenly over whole numbers

`grid: n` beside a range is how many points of it `sweep=grid` takes; a random search draws from all
of it. A shell needs quotes around brackets and braces:

    python launch.py +exp=lora sweep=grid 'sweep.space.lora.lora_rank=[4,8,16]' \
        'sweep.space.lora.trainer.learning_rate={log_uniform:[1e-5,3e-3],grid:4}'

In YAML a field is nested (trainer: {learning_rate: ...}) or dotted (trainer.learning_rate: ...).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import ConfigError
from conf.hashing import canonical_json, plain
from conf.methods import AnsweringMethod, Method, check_answering
from conf.resolve import Arm, resolve_arms
from conf.schema import RunConfig

RANGES = ("log_uniform", "uniform", "int_uniform")
POINTS = "grid"
REPLICATES = {"seed": "seeds", "mix_seed": "seeds", "draw": "draws"}
DIGITS = 3  # significant ones of a value drawn from a range: what is shown is what is run


@dataclass(kw_only=True, slots=True, frozen=True)
class Choice:
    """A field that takes one of some values."""

    field: str
    values: tuple[Any, ...]

    @property
    def size(self) -> int | None:
        """How many values there are."""
        return len(self.values)

    def at(self, share: float) -> Any:
        """The value at a share in [0, 1)."""
        return self.values[int(share * len(self.values))]

    def points(self) -> tuple[Any, ...]:
        """The values of a grid."""
        return self.values


@dataclass(kw_only=True, slots=True, frozen=True)
class Range:
    """A field that takes a number between two, ends included. num_points: of a grid."""

    field: str
    kind: str
    low: float
    high: float
    num_points: int | None = None

    @property
    def size(self) -> int | None:
        """How many values there are; None: a continuum."""
        return int(self.high - self.low) + 1 if self.kind == "int_uniform" else None

    def at(self, share: float) -> float:
        """The value at a share in [0, 1) of the range; of its logarithm for log_uniform."""
        if self.kind == "int_uniform":
            return int(self.low) + int(share * (int(self.high - self.low) + 1))
        if self.kind == "uniform":
            return self._short(self.low + share * (self.high - self.low))
        return self._short(self.low * math.exp(share * math.log(self.high / self.low)))

    def points(self) -> tuple[float, ...]:
        """The values of a grid: evenly spaced, both ends among them."""
        assert self.num_points is not None
        shares = [i / (self.num_points - 1) for i in range(1, self.num_points - 1)]
        if self.kind == "int_uniform":
            width = int(self.high - self.low)
            inner = [int(self.low) + round(share * width) for share in shares]
            return (int(self.low), *inner, int(self.high))
        return (self.low, *(self.at(share) for share in shares), self.high)

    def _short(self, value: float) -> float:
        """A value of few digits, where that is still within the range."""
        short = float(f"{value:.{DIGITS}g}")
        return short if self.low <= short <= self.high else min(max(value, self.low), self.high)


Dimension = Choice | Range


def space_of(config: RunConfig, arm: str) -> tuple[Dimension, ...]:
    """The dimensions of an arm's space, by name of field; every end and value has been tried.

    Sorted, so that the order in which they were typed changes nothing.

    Raises:
        ConfigError: an arm or field that does not exist, a seed or draw, or values that are not
            a list or range, are not the field's, or come twice.
    """
    where = f"sweep.space.{arm}"
    method = _swept_method(config, arm, where)
    written = config.sweep.space[arm]
    known = tuple(_leaves(method))
    is_named = isinstance(written, Mapping)
    fields = list(_flat(written, prefix="", known=known)) if is_named else []
    if not fields:
        raise ConfigError(
            where,
            found=repr(written),
            expected="fields of the arm with their values",
            remedy=f"write '{where}.num_shots=[0,4,8]'",
        )
    found: dict[str, Dimension] = {}
    for name, values in fields:
        if name in found:
            raise ConfigError(f"{where}.{name}", found="the field twice", expected="it once")
        _check_field(where, name, method=method, known=known)
        found[name] = _dimension(config, arm, name, values)
    return tuple(found[name] for name in sorted(found))


def arm_with(config: RunConfig, arm: str, values: Sequence[tuple[str, Any]]) -> Arm:
    """An arm as `arms.<arm>.<field>=<value>` would make it, with all checks of its classes.

    Raises:
        ConfigError: values that are not of the field's type, or that a check refuses.
    """
    stored = OmegaConf.structured(config.arms[arm])
    shown = " ".join(f"{name}={plain(value)}" for name, value in values)
    where = f"sweep.space.{arm}" + (f".{values[0][0]}" if len(values) == 1 else "")
    try:
        for name, value in values:
            OmegaConf.update(stored, name, value, merge=False)
        method = OmegaConf.to_object(stored)
        assert isinstance(method, Method)
        made = resolve_arms(dataclasses.replace(config, arms={**config.arms, arm: method}))[arm]
        if isinstance(method, AnsweringMethod):
            check_answering(f"arms.{arm}", method, made.engine)
        return made
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise ConfigError(where, found=message, expected="values of the field's type") from None
    except ConfigError as error:
        raise ConfigError(
            where,
            found=f"{shown}, which makes {error.where} {error.found}",
            expected=error.expected,
            remedy=error.remedy,
        ) from None


def value_of(method: Any, field: str) -> Any:
    """A dotted field of a method, its mappings included."""
    for name in field.split("."):
        method = method[name] if isinstance(method, Mapping) else getattr(method, name)
    return method


def _swept_method(config: RunConfig, arm: str, where: str) -> Method:
    if arm not in config.arms:
        raise ConfigError(
            where,
            found=f"{arm}, which is no arm of this run",
            expected=f"one of {', '.join(config.arms) or 'its arms, of which there are none'}",
            remedy=_nearest(arm, list(config.arms), "sweep.space."),
        )
    method = config.arms[arm]
    if not isinstance(method, AnsweringMethod):
        raise ConfigError(
            where,
            found=f"a {method.kind} arm",
            expected="an arm that answers through a language model",
        )
    return method


def _leaves(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields below a dataclass; NAME.* where a mapping takes any key."""
    for f in dataclasses.fields(value):
        own, name = getattr(value, f.name), prefix + f.name
        if dataclasses.is_dataclass(own):
            yield from _leaves(own, f"{name}.")
        elif isinstance(own, dict) and any(map(dataclasses.is_dataclass, own.values())):
            for key, v in own.items():
                yield from _leaves(v, f"{name}.{key}.")
        elif isinstance(own, dict):
            yield f"{name}.*"
        elif f.name != "kind":
            yield name


def _flat(
    node: Mapping[str, Any], *, prefix: str, known: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Fields and what stands behind them; a mapping that is no range is a level of names."""
    for name, below in node.items():
        field = f"{prefix}{name}"
        is_level = isinstance(below, Mapping) and field not in known
        if is_level and not {*RANGES, POINTS} & set(below):
            yield from _flat(below, prefix=f"{field}.", known=known)
        else:
            yield field, below


def _check_field(where: str, field: str, *, method: Method, known: Sequence[str]) -> None:
    replicate = REPLICATES.get(field.rpartition(".")[2])
    if field in known and replicate is not None:
        raise ConfigError(
            f"{where}.{field}",
            found="a seed as a dimension, which would pick the luckiest one",
            expected="seeds and draws as replicates, judged by their mean",
            remedy=f"leave it out, and write sweep.replicates.{replicate}=5",
        )
    if field not in known and f"{field.rpartition('.')[0]}.*" not in known:
        raise ConfigError(
            f"{where}.{field}",
            found=f"{field}, which a {method.kind} arm does not have",
            expected="a field of the arm, as behind arms.NAME. on the command line",
            remedy=_nearest(field, known, f"{where}."),
        )


def _nearest(word: str, known: Sequence[str], prefix: str) -> str:
    """The known name most like a word, by the whole of it or by its last part."""
    last = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    close += [last[n] for n in difflib.get_close_matches(word, last, n=1, cutoff=0.5)]
    return f"did you mean {prefix}{close[0]}?" if close else ""


def _dimension(config: RunConfig, arm: str, field: str, written: Any) -> Dimension:
    key = f"sweep.space.{arm}.{field}"
    if isinstance(written, Mapping):
        return _range(config, arm, field, written)
    if not isinstance(written, (list, tuple)) or not written:
        raise ConfigError(
            key,
            found=repr(written),
            expected="a list of values, or a range",
            remedy=f"write '{key}=[a,b,c]' or '{key}={{log_uniform:[a,b]}}'",
        )
    values = tuple(_tried(config, arm, field, value) for value in written)
    texts = [canonical_json(value) for value in values]
    twice = next((text for i, text in enumerate(texts) if text in texts[:i]), None)
    if twice is not None:
        raise ConfigError(key, found=f"{twice} twice", expected="every value once")
    return Choice(field=field, values=values)


def _tried(config: RunConfig, arm: str, field: str, value: Any) -> Any:
    """A value as the field's type makes it, once the arm has taken it."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(
            f"sweep.space.{arm}.{field}", found=str(value), expected="finite numbers only"
        )
    return value_of(arm_with(config, arm, [(field, value)]).method, field)


def _range(config: RunConfig, arm: str, field: str, written: Mapping[str, Any]) -> Range:
    key = f"sweep.space.{arm}.{field}"
    kinds = [name for name in written if name != POINTS]
    if len(kinds) != 1 or kinds[0] not in RANGES:
        raise ConfigError(
            key,
            found=", ".join(written) or "an empty mapping",
            expected=f"one of {', '.join(RANGES)}, and {POINTS} if you like",
            remedy=f"write '{key}={{log_uniform:[a,b]}}'",
        )
    (kind,) = kinds
    low, high = _ends(key, kind, written[kind])
    for end in (low, high):
        _tried(config, arm, field, end)
    points = written.get(POINTS)
    limit = high - low + 1 if kind == "int_uniform" else math.inf
    if points is not None and (type(points) is not int or not 2 <= points <= limit):
        raise ConfigError(
            f"{key}.{POINTS}",
            found=repr(points),
            expected="a count of at least 2"
            + (f" and at most {limit}, the whole numbers there are" if limit < math.inf else ""),
        )
    return Range(field=field, kind=kind, low=low, high=high, num_points=points)


def _ends(key: str, kind: str, written: Any) -> tuple[float, float]:
    """The two ends of a range, as the numbers of its kind."""
    is_whole = kind == "int_uniform"
    number = (int,) if is_whole else (int, float)
    ends = written if isinstance(written, (list, tuple)) else []
    if len(ends) != 2 or any(type(end) not in number or not math.isfinite(end) for end in ends):
        raise ConfigError(
            key,
            found=f"{kind}: {written!r}",
            expected=f"two finite {'whole ' if is_whole else ''}numbers, the lower one first",
            remedy=f"write '{key}={{{kind}:[a,b]}}'",
        )
    low, high = ends if is_whole else map(float, ends)
    if low >= high:
        raise ConfigError(
            key,
            found=f"{kind}: {written!r}, an empty or reversed range",
            expected="the lower end first, below the higher one",
        )
    if kind == "log_uniform" and low <= 0:
        raise ConfigError(
            key,
            found=f"{kind}: {written!r}, a logarithm through 0",
            expected="ends above 0",
            remedy=f"write '{key}={{uniform:{written}}}', or a lower end like 1e-6",
        )
    return low, high
