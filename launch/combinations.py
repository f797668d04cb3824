"""What `-m` asks for: the overrides of each run of a sweep, by Hydra's own grammar (pure)."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conf.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

FLAGS = ("-m", "--multirun")
# Keys of Hydra's own sweepers and launchers, which would start one run after another.
HYDRAS_OWN = ("hydra/sweeper", "hydra/launcher", "hydra.sweep", "hydra.launcher")


@dataclass(kw_only=True, slots=True, frozen=True)
class Combination:
    """One run of a sweep.

    number: from 1, as tables name it. overrides: all that a run of its own is typed with. swept:
    key and value of those that the sweep varies.
    """

    number: int
    overrides: tuple[str, ...]
    swept: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        """The values that tell it from the others."""
        return " ".join(f"{key}={value}" for key, value in self.swept)

    @property
    def command(self) -> str:
        """The command that does this run alone, in the same directory."""
        return shlex.join(["python", "launch.py", *self.overrides])


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether -m or --multirun was typed."""
    return any(a in FLAGS for a in arguments)


def combinations(arguments: Sequence[str], *, config_loader: Any) -> list[Combination]:
    """Every combination of the values, the last key varying fastest, as Hydra orders them.

    Args:
        arguments: as typed, with -m.
        config_loader: Hydra's, which knows the presets that `glob(..)` chooses from.

    Raises:
        ConfigError: a flag beside -m, values without end (`interval`), or none.
        hydra.errors.HydraException: an override that cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    typed = [a for a in arguments if a not in FLAGS]
    for argument in typed:
        _check_argument(argument)
    parsed = OverridesParser.create(config_loader=config_loader).parse_overrides(typed)
    choices = [_choices(text, override) for text, override in zip(typed, parsed, strict=True)]
    swept = [len(values) > 1 for values in choices]
    return [
        Combination(
            number=number,
            overrides=tuple(chosen),
            swept=tuple(
                _key_and_value(text) for text, is_it in zip(chosen, swept, strict=True) if is_it
            ),
        )
        for number, chosen in enumerate(itertools.product(*choices), start=1)
    ]


def _check_argument(argument: str) -> None:
    if argument.startswith("-"):
        raise ConfigError(
            argument,
            found=f"{argument} with -m",
            expected="overrides only",
            remedy=f"leave out -m to use {argument}",
        )
    if argument.lstrip("+~").startswith(HYDRAS_OWN):
        raise ConfigError(
            argument.partition("=")[0],
            found="one of Hydra's own launchers and sweepers",
            expected="the values alone: all runs of a sweep share one schedule of Crossover's",
            remedy=f"leave {argument} out",
        )


def _choices(text: str, override: Override) -> list[str]:
    """The overrides that one argument stands for; itself where it varies nothing."""
    if not override.is_sweep_override():
        return [text]
    key = override.get_key_element()
    if not override.is_discrete_sweep():
        raise ConfigError(
            key,
            found=text.partition("=")[2],
            expected="values that can be listed: a,b,c or choice(..), range(..), glob(..)",
            remedy=f"write {key}=1e-4,3e-4",
        )
    values = list(dict.fromkeys(f"{key}={value}" for value in override.sweep_string_iterator()))
    if not values:
        raise ConfigError(key, found=f"{text}, which is no value", expected="at least one value")
    return values


def _key_and_value(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value
