"""The values of a setting, as they are shown and as they may leave the run directory (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from conf.hashing import canonical_json

PROMPT_TEXTS = ("instruction", "persona")  # fields of an arm that hold what a model is told


def last_name(field: str) -> str:
    """trainer.learning_rate -> learning_rate."""
    return field.rpartition(".")[2]


def is_number(value: object) -> bool:
    """A whole or real number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_text(field: str, value: object) -> bool:
    """Whether a value is prompt text: of such a field, or of several words."""
    is_named = last_name(field) in PROMPT_TEXTS
    return isinstance(value, str) and (is_named or len(value.split()) > 1)


def without_texts(every: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Values of settings, each text replaced by its number: 'instruction 3'.

    Args:
        every: field -> value, in the order of the trials; texts are numbered as they come.
    """
    seen: dict[str, list[str]] = {}
    safe = []
    for values in every:
        made = dict(values)
        for field, value in values.items():
            if is_text(field, value):
                texts = seen.setdefault(field, [])
                texts += [value] if value not in texts else []
                made[field] = f"{last_name(field)} {texts.index(value) + 1}"
        safe.append(made)
    return safe


def shown_value(value: Any) -> str:
    """A value as people write it: 3.42e-4, 16, true, cosine."""
    if isinstance(value, float):
        if value and not 1e-3 <= abs(value) < 1e5:
            mantissa, _, exponent = f"{value:.2e}".partition("e")
            return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return f"{value:.4g}"
    return value if isinstance(value, str) else canonical_json(value)


def label_of(values: Mapping[str, Any]) -> str:
    """learning_rate=3e-4 lora_rank=8 instruction="Is it spam?"."""
    names = [last_name(field) for field in values]
    return " ".join(
        f"{field if names.count(last_name(field)) > 1 else last_name(field)}={_quoted(value)}"
        for field, value in values.items()
    )


def _quoted(value: Any) -> str:
    shown = shown_value(value)
    return f'"{shown}"' if isinstance(value, str) and " " in value else shown
