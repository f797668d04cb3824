"""Every field of the schema is given a wrong type, nan, a wrong sign and an unknown sibling."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from conf import schema
from conf.errors import ConfigError
from conf.hashing import plain
from conf.methods import LoraMethod
from conf.schema import RunConfig, non_finite_keys
from launch.cli import typed

ARM = "arms.lora"
# Numbers that may be negative: they name a random stream.
SIGNED = {
    "task.seed",
    "trainer.seed",
    "sweep.seed",
    "sweep.halving.min_correlation",
    f"{ARM}.draw",
    f"{ARM}.trainer.seed",
}


def composed() -> DictConfig:
    from hydra import compose, initialize_config_module

    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", overrides=["+exp=lora"])


BASE = composed()


def leaves(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        hint = hints[f.name]
        inner = [h for h in typing.get_args(hint) if h is not type(None)]
        if isinstance(hint, types.UnionType) and len(inner) == 1:
            hint = inner[0]
        key = f"{prefix}.{f.name}".lstrip(".")
        if is_dataclass(hint):
            yield from leaves(typing.cast(type, hint), key)
        elif key != "arms":
            yield key, hint


LEAVES = [*leaves(RunConfig, ""), *leaves(LoraMethod, ARM)]
NUMBERS = [(k, h) for k, h in LEAVES if h in (int, float)]


def refused(key: str, value: object) -> bool:
    """Whether setting a key is refused by its type, its range, or the check for finite numbers."""
    config = BASE.copy()
    try:
        OmegaConf.update(config, key, value, merge=False)
        found = typed(config)
    except (OmegaConfBaseException, ConfigError):
        return True
    return key in non_finite_keys(plain(found))


def wrong_values(hint: Any) -> list[object]:
    if hint is bool:
        return ["perhaps", 3.5]
    if hint in (int, float):
        return ["many", [1], {"a": 1}]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return ["no_such_name", [1]]
    if hint is str:
        return [["a list"], {"a": 1}]
    return ["a string instead of a container"]


def test_all_fields_are_seen() -> None:
    assert len(LEAVES) >= 130
    assert len(NUMBERS) >= 50


@pytest.mark.parametrize(("key", "hint"), LEAVES, ids=[k for k, _ in LEAVES])
def test_wrong_type_is_refused(key: str, hint: Any) -> None:
    accepted = [v for v in wrong_values(hint) if not refused(key, v)]
    assert not accepted


@pytest.mark.parametrize(("key", "hint"), NUMBERS, ids=[k for k, _ in NUMBERS])
def test_nan_and_infinity_are_refused(key: str, hint: Any) -> None:
    assert refused(key, float("nan"))
    assert refused(key, float("inf"))


@pytest.mark.parametrize(("key", "hint"), NUMBERS, ids=[k for k, _ in NUMBERS])
def test_wrong_sign_is_refused(key: str, hint: Any) -> None:
    if key in SIGNED:
        assert not refused(key, -1)
    elif any(group in key for group in (".engine.", ".trainer.", f"{ARM}.model.")):
        # An arm's override is checked when it is merged over the group it overrides.
        from conf.resolve import resolve_arms

        config = BASE.copy()
        OmegaConf.update(config, key, -1)
        with pytest.raises(ConfigError, match=key.rsplit(".", 1)[1]):
            resolve_arms(typed(config))
    else:
        assert refused(key, -1)


def sections() -> list[str]:
    return sorted({k.rpartition(".")[0] for k, _ in LEAVES})


@pytest.mark.parametrize("section", sections())
def test_unknown_sibling_is_refused_also_with_plus(section: str) -> None:
    key = f"{section}.no_such_key".lstrip(".")
    config = BASE.copy()
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.update(config, key, 1)
    config = BASE.copy()
    try:
        with open_dict(config):  # what Hydra does for +key=1
            OmegaConf.update(config, key, 1, force_add=True)
    except OmegaConfBaseException:
        return
    with pytest.raises(ConfigError):
        typed(config)
