"""A stored configuration (config.json) as typed objects again."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from conf.methods import METHODS, Method
from conf.schema import RunConfig

C = TypeVar("C")


def restore_config(stored: Mapping[str, Any]) -> RunConfig:
    """The RunConfig that was written as plain JSON; keys that no longer exist are left out."""
    return _restore(RunConfig, stored)


def _restore(cls: type[C], stored: Mapping[str, Any]) -> C:
    hints = typing.get_type_hints(cls)
    fields = typing.cast(Any, dataclasses.fields)(cls)
    return cls(
        **{f.name: _value(hints[f.name], stored[f.name]) for f in fields if f.name in stored}
    )


def _value(hint: Any, value: Any) -> Any:
    """One stored value under its field's type: enums by name, methods by their kind."""
    if value is None:
        return None
    if isinstance(hint, types.UnionType):
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint[value]
    if typing.get_origin(hint) is dict and typing.get_args(hint)[1] is Method:
        return {name: _restore(METHODS[arm["kind"]], arm) for name, arm in value.items()}
    return _restore(typing.cast(Any, hint), value) if dataclasses.is_dataclass(hint) else value
