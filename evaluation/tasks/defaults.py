"""What a task says when the user does not: scoring, instruction, words for labels (pure)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from conf.choices import TaskKind
from conf.errors import ConfigError
from conf.groups import TaskConfig
from conf.records import Item

LABEL_KINDS = (TaskKind.classification, TaskKind.multiple_choice)
# Scoring rules that evaluation/scoring brings; plugins add theirs by name.
BUILT_IN_SCORING = ("exact", "numeric", "token_f1", "rouge_l", "chrf", "json")
OBEYS = "obeys"  # of the embedded requests alone (probes/instructions.py): not for a task
MAX_EXACT_WORDS = 3

_NUMBER = re.compile(r"[-+]?[$\u20ac\u00a3]?\s?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?\s?%?")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def choose_scoring(config: TaskConfig, kind: TaskKind, train: Sequence[Item]) -> str:
    """task.scoring, or by kind and the train targets.

    Labels: exact. Free answers: json if all targets are JSON objects, numeric if all are numbers,
    exact if all have at most three words, else token_f1 with a context and rouge_l without.
    """
    if config.scoring != "auto":
        return config.scoring
    if kind in LABEL_KINDS:
        return "exact"
    targets = [item.answer_key for item in train]
    if all(as_object(target) is not None for target in targets):
        return "json"
    if all(is_number(target) for target in targets):
        return "numeric"
    if all(len(target.split()) <= MAX_EXACT_WORDS for target in targets):
        return "exact"
    return "token_f1" if any(item.context for item in train) else "rouge_l"


def as_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the text is, or None."""
    if not text.startswith("{"):
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def is_number(text: str) -> bool:
    """Digits with an optional sign, currency, thousands commas, decimals or percent."""
    return bool(re.search(r"\d", text)) and _NUMBER.fullmatch(text) is not None


def default_instruction(
    kind: TaskKind, scoring: str, *, words: Sequence[str], train: Sequence[Item]
) -> str:
    """One or two plain sentences: what to do and in which form to answer."""
    has_context = any(item.context for item in train)
    source = "the context" if has_context else "the text"
    match kind, scoring:
        case TaskKind.classification, _:
            return f"Classify the text. Answer with exactly one of: {', '.join(words)}."
        case TaskKind.multiple_choice, _:
            by = " from the context" if has_context else ""
            return f"Answer the question{by} with exactly one of the choices."
        case TaskKind.pairs, _:
            return "Answer the request."
        case _, "json":
            keys = dict.fromkeys(k for i in train for k in as_object(i.answer_key) or {})
            return (
                f"Turn {source} into one JSON object with the fields {', '.join(keys)}. "
                "Answer with the JSON object only."
            )
        case _, "numeric":
            return "Answer the question with a number only."
        case _, "exact":
            return f"Answer in at most {MAX_EXACT_WORDS} words."
        case _, _ if has_context:
            return "Answer the question from the context, in as few words as possible."
    return "Read the input and write the answer, nothing else."


def choose_label_words(config: TaskConfig, labels: Sequence[str]) -> dict[str, str]:
    """Words for every label: the user's, else the label in plain words.

    Raises:
        ConfigError: words for a label that does not exist, empty words, the same words twice.
    """
    for label, word in config.label_words.items():
        if label not in labels or not word.strip():
            raise ConfigError(
                f"task.label_words.{label}",
                found=repr(word),
                expected=f"a word for one of the labels {', '.join(labels)}",
                remedy="write the label as in the data, and a word that is not empty",
            )
    plain = {label: plain_words(label) for label in labels}
    clashes = {
        w for w in plain.values() if sum(v.casefold() == w.casefold() for v in plain.values()) > 1
    }
    words = {
        label: config.label_words.get(
            label, label if plain[label] in clashes else plain[label]
        ).strip()
        for label in labels
    }
    if len(set(words.values())) != len(words):
        twice = next(w for w in words.values() if list(words.values()).count(w) > 1)
        raise ConfigError(
            "task.label_words",
            found=f"{twice!r} for {', '.join(k for k, w in words.items() if w == twice)}",
            expected="different words for different labels",
            remedy="give each label a word of its own",
        )
    return words


def plain_words(label: str) -> str:
    """`reverted_card_payment?` -> reverted card payment, `AddToPlaylist` -> add to playlist.

    A label of one word stays as it is: ham, True, C++.
    """
    parts = [part for piece in re.split(r"[\s_]+", label) for part in _CAMEL.split(piece) if part]
    if len(parts) < 2:
        return label
    words = " ".join(p if p.isupper() and len(p) > 1 else p.lower() for p in parts)
    return words.rstrip("?!.") or label


def label_counts(
    items: Mapping[str, Sequence[Item]], labels: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Split -> label -> number of items; every label present, also with 0."""
    return {
        split: {label: sum(i.label == label for i in found) for label in labels}
        for split, found in items.items()
    }
