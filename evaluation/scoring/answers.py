"""From a completion to an answer: leniently, and apart from it whether the format was kept."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conf.choices import TaskKind
from conf.records import Item
from evaluation.prompts import letter
from evaluation.tasks import Task

# A number with optional sign, thousands commas, decimals and exponent; not part of a word or date.
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})++(?!,?\d)|\d++)(?:\.\d++)?|\.\d++)"
    r"(?:[eE][-+]?\d{1,3}+)?(?![^\W\d_]*+\d)"
)
_NOT = {"not", "no", "never", "isnt", "arent", "wasnt", "cannot", "non"}
_ARTICLES = {"a", "an", "the"}
MAX_STARTS = 100  # places at which a JSON object is tried, so that brackets alone stay cheap


def read_answer(completion: str, item: Item, task: Task) -> str | None:
    """The answer that a completion gives: a label, a choice, a number, a JSON object or a text.

    None where it gives none. Labels are returned as the label, not as its word.
    """
    labels = task.candidates(item)
    if labels:
        words = {label: task.word(label) for label in labels}
        is_lettered = task.kind is TaskKind.multiple_choice
        return match_label(completion, words, is_lettered=is_lettered)
    if task.scoring == "json":
        found = first_object(completion)
        return None if found is None else found.text
    if task.scoring == "numeric":
        return last_number(completion)
    return completion.strip() or None


def is_format_valid(completion: str, item: Item, task: Task) -> bool | None:
    """Whether a completion, stripped, is an answer and nothing else; None where any text is one."""
    text = completion.strip()
    labels = task.candidates(item)
    if labels:
        return text in {task.word(label) for label in labels}
    if task.scoring == "json":
        return satisfies_schema(text, task.json_schema)
    if task.scoring == "numeric":
        return _NUMBER.fullmatch(text) is not None
    return None


def match_label(
    completion: str, words: Mapping[str, str], *, is_lettered: bool = False
) -> str | None:
    """The label whose word a completion gives; words: label -> word.

    In this order: the word itself; but for case; a choice's letter; the word at the start but for
    case and punctuation, the longest first; the only label that is mentioned at all.
    """
    text = completion.strip()
    for fold in (str, str.casefold):
        same = [label for label, word in words.items() if fold(word) == fold(text)]
        if len(same) == 1:
            return same[0]
    if is_lettered and (index := _letter_index(text, len(words))) is not None:
        return list(words)[index]
    tokens = _tokens(text)
    by_tokens = _labels_by_tokens(words)
    starts = [key for key in by_tokens if tokens[: len(key)] == list(key)]
    if starts:
        return by_tokens[max(starts, key=len)]
    mentioned = {by_tokens[key] for key in _mentions(tokens, list(by_tokens))}
    return mentioned.pop() if len(mentioned) == 1 else None


def _tokens(text: str) -> list[str]:
    """Words without case, marks and apostrophes; signs inside a word (C++, e-mail) split it."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("\u2019", "")
    return re.findall(r"[^\W_]+", plain)


def _labels_by_tokens(words: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    """Labels whose words stay distinct as tokens: C and C++ do not, and are matched strictly."""
    keys = {label: tuple(_tokens(word)) for label, word in words.items()}
    once = [key for key in keys.values() if key and list(keys.values()).count(key) == 1]
    return {key: label for label, key in keys.items() if key in once}


def _mentions(tokens: Sequence[str], keys: Sequence[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Keys that occur, longest first, without what a longer one covers or a "not" denies."""
    found: set[tuple[str, ...]] = set()
    position = 0
    longest_first = sorted(keys, key=len, reverse=True)
    while position < len(tokens):
        fits = (k for k in longest_first if tuple(tokens[position : position + len(k)]) == k)
        key = next(fits, None)
        if key is not None and not _is_denied(tokens[:position]):
            found.add(key)
        position += 1 if key is None else len(key)
    return found


def _is_denied(before: Sequence[str]) -> bool:
    words = [word for word in before[-2:] if word not in _ARTICLES]
    return bool(words) and words[-1] in _NOT


def _letter_index(text: str, num_choices: int) -> int | None:
    """The choice named by its letter: `B`, `(B)`, `B.`, `B: text`, `the answer is B`."""
    letters = [letter(i) for i in range(num_choices)]
    patterns = (
        r"\W*([A-Za-z]{1,2})\W*",
        r"\(?([A-Za-z]{1,2})[).:](?:\s.*)?",
        r".*?\b(?i:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([A-Z]{1,2})(?![\w'])(?!\s+\w).*",
    )
    for pattern in patterns:
        match = re.fullmatch(pattern, text, flags=re.DOTALL)
        if match and match[1].upper() in letters:
            return letters.index(match[1].upper())
    return None


def last_number(text: str) -> str | None:
    """The last number of a text, without thousands commas: `about $1,234.50.` gives 1234.50."""
    plain = text.replace("\u2212", "-")
    found = [match[0] for match in _NUMBER.finditer(plain)]
    return found[-1].replace(",", "").removeprefix("+") if found else None


@dataclass(kw_only=True, slots=True, frozen=True)
class FoundObject:
    """A JSON object in a text: as it stands there, and its value."""

    text: str
    value: dict[str, Any]


def first_object(text: str) -> FoundObject | None:
    """The first complete JSON object in a text, also one inside a code fence."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    starts = [match.start() for match in re.finditer(r"\{", text)][:MAX_STARTS]
    for start in starts:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        return FoundObject(text=text[start:end], value=value)
    return None


def satisfies_schema(text: str, schema: dict[str, Any] | None) -> bool:
    """Whether a text as a whole is a JSON object that satisfies the schema (None: any object)."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict):
        return False
    if schema is None:
        return True
    import jsonschema  # only where a task has a schema

    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")
