"""What people type, made into what Hydra takes (pure)."""

from __future__ import annotations

import re

from conf.errors import ConfigError

_SECRET = re.compile(r"(api[_-]?key|token|secret|password|passwd)(=|$)", re.IGNORECASE)
_PEFT_ARGUMENT = re.compile(r"^(arms\.[^.=]+\.peft\.[^=]+=)")
_SPACE = re.compile(r"^(?:\+\+?)?(sweep\.space\.[^=]+)=(.*)$", re.DOTALL)
_DIGIT_GROUP = re.compile(r"^(zero)=([0-3])$")


def key_of(override: str) -> str:
    """The key of an override without +, ++ or ~."""
    return override.lstrip("+~").partition("=")[0]


def rewrite(overrides: list[str]) -> list[str]:
    """Overrides with what they imply.

    `task.path` or `task.files` alone implies `task=file`, `model.path` alone implies `model=hub`;
    `zero=3` is quoted, since Hydra would read the preset's name as a number; `arms.NAME.peft.KEY=`
    and `sweep.space.ARM.FIELD=` get Hydra's ++, since their keys are in no schema; the latter
    replaces what a preset says of the field.

    Raises:
        ConfigError: a key that looks like a secret, which would be stored with the configuration.
    """
    keys = [key_of(o) for o in overrides]
    for override, key in zip(overrides, keys, strict=True):
        if not override.startswith("-") and _SECRET.search(key.rsplit(".", 1)[-1]):
            raise ConfigError(
                key,
                found="a secret on the command line",
                expected="secrets in the environment only, e.g. WANDB_API_KEY",
                remedy=f"export it, and leave {key} out",
            )
    if any(k.startswith("pricing.device_hour") for k in keys) and not (
        {"pricing.source", "pricing.date"} <= set(keys)
    ):
        raise ConfigError(
            "pricing.device_hour",
            found="a price without its source and date",
            expected="pricing.source and pricing.date beside it",
            remedy="add pricing.source=our-contract pricing.date=2026-11",
        )
    quoted = [_DIGIT_GROUP.sub(r"\1='\2'", o) for o in overrides]
    quoted = [_PEFT_ARGUMENT.sub(r"++\1", o) for o in quoted]
    quoted = [made for o in quoted for made in _replaced(o)]
    implied = []
    if any(k == "task.path" or k.startswith("task.files") for k in keys) and "task" not in keys:
        implied.append("task=file")
    if "model.path" in keys and "model" not in keys:
        implied.append("model=hub")
    return quoted + implied


def _replaced(override: str) -> list[str]:
    """A field of the search space as it is typed: a null first, since Hydra merges mappings."""
    found = _SPACE.match(override)
    if found is None:
        return [override]
    key, value = found.groups()
    return [f"++{key}=null", f"++{key}={value}"]


def experiment_of(overrides: list[str]) -> str | None:
    """The name after `+exp=`."""
    for override in overrides:
        if key_of(override) == "exp":
            return override.partition("=")[2]
    return None
