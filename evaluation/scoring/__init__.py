"""From an answer to a score: one function per scoring rule, a user's by the same decorator."""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from conf.errors import ConfigError, DataError
from conf.records import Item
from evaluation.plugins import SCORERS, scorer
from evaluation.scoring.answers import is_format_valid, last_number, satisfies_schema
from evaluation.tasks import Task

NUMERIC_TOLERANCE = 1e-6  # relative to the right number


@dataclass(kw_only=True, slots=True, frozen=True)
class Score:
    """score: in [0, 1]. is_correct: None under rules that grade (token_f1, rouge_l, chrf) and do
    not decide. is_format_valid: None for scored answers and where any text is a valid answer.
    """

    score: float
    is_correct: bool | None = None
    is_format_valid: bool | None = None


def score(answer: str | None, item: Item, task: Task, *, completion: str | None = None) -> Score:
    """Score an answer by the task's rule.

    Args:
        answer: what read_answer gave, or a label chosen by its probability; None: no answer, which
            scores 0 and is wrong.
        item: the item, with its right answer and further references.
        task: names the rule and holds the JSON schema.
        completion: the generated text; None for a scored answer, which has no format.

    Raises:
        ConfigError: no such rule, or a plugin's scorer that gives no number in [0, 1].
        DataError: a right answer that the rule cannot read.
    """
    rule = SCORERS.get(task.scoring, key="task.scoring")
    found = _checked(rule(answer or "", item, task), name=task.scoring)
    if answer is None:
        found = Score(score=0.0, is_correct=None if found.is_correct is None else False)
    if completion is not None:
        found = replace(found, is_format_valid=is_format_valid(completion, item, task))
    return found


def _checked(found: object, *, name: str) -> Score:
    """A plugin may give a Score, a bool (right or wrong) or a number (a grade)."""
    if isinstance(found, bool):
        found = Score(score=float(found), is_correct=found)
    if isinstance(found, (int, float)):
        found = Score(score=float(found))
    if not isinstance(found, Score) or not 0.0 <= found.score <= 1.0:
        raise ConfigError(
            "task.scoring",
            found=f"{found!r} from the scorer {name!r}",
            expected="a number in [0, 1], a bool or a Score",
            remedy="mend what the scorer returns",
        )
    return found


def right_answers(item: Item) -> tuple[str, ...]:
    """The right answer and all other accepted ones, each once."""
    return tuple(dict.fromkeys((item.answer_key, *item.references)))


def _best(grade: Callable[[str], float], item: Item) -> float:
    return max(grade(reference) for reference in right_answers(item))


@scorer("exact")
def exact(answer: str, item: Item, task: Task) -> Score:
    """Equal: labels and choices as they are, texts but for case, spaces and outer punctuation."""
    if task.candidates(item):
        is_equal = answer == item.answer_key
    else:
        is_equal = plain_text(answer) in {plain_text(right) for right in right_answers(item)}
    return Score(score=float(is_equal), is_correct=is_equal)


def plain_text(text: str) -> str:
    """Lower case, single spaces, no punctuation around; a text of punctuation alone is kept."""
    folded = " ".join(text.casefold().split())
    return folded.strip(string.punctuation + " ") or folded


@scorer("numeric")
def numeric(answer: str, item: Item, task: Task) -> Score:
    """Equal as numbers, within one millionth of the right one."""
    found = last_number(answer)
    is_equal = found is not None and any(
        _is_close(float(found), _right_number(right, item)) for right in right_answers(item)
    )
    return Score(score=float(is_equal), is_correct=is_equal)


def _is_close(found: float, right: float) -> bool:
    return math.isfinite(found) and abs(found - right) <= NUMERIC_TOLERANCE * abs(right)


def _right_number(text: str, item: Item) -> float:
    found = last_number(text)
    if found is None or not math.isfinite(float(found)):
        raise DataError(
            f"item {item.id}",
            found=f"the right answer {text!r}",
            expected="a number, as task.scoring is numeric",
            remedy="mend the target, or write task.scoring=exact",
        )
    return float(found)


@scorer("token_f1")
def token_f1(answer: str, item: Item, task: Task) -> float:
    """F1 over words as in SQuAD (Rajpurkar et al. 2016), the best over the references."""
    return _best(lambda reference: _f1(squad_words(answer), squad_words(reference)), item)


def squad_words(text: str) -> list[str]:
    """Lower case, without punctuation and articles, as in SQuAD's evaluation script."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(found: list[Any], right: list[Any]) -> float:
    """F1 of two bags; two empty ones agree."""
    if not found or not right:
        return float(found == right)
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right))


@scorer("rouge_l")
def rouge_l(answer: str, item: Item, task: Task) -> float:
    """ROUGE-L F-measure by the library rouge_score, the best over the references."""
    grader = _rouge()
    return _best(lambda reference: float(grader.score(reference, answer)["rougeL"].fmeasure), item)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # slow to import

    return RougeScorer(["rougeL"], use_stemmer=False)


@scorer("chrf")
def chrf(answer: str, item: Item, task: Task) -> float:
    """Sentence chrF2 by the library sacrebleu, over all references, as a share."""
    from sacrebleu import sentence_chrf  # slow to import

    return min(1.0, float(sentence_chrf(answer, list(right_answers(item))).score) / 100)


@scorer("json")
def json_fields(answer: str, item: Item, task: Task) -> Score:
    """F1 over fields, nested ones by their path; right when all are, and the schema holds."""
    try:
        found = list(_fields(json.loads(answer)))
    except (ValueError, RecursionError):
        return Score(score=0.0, is_correct=False)
    grade = _best(lambda reference: _f1(found, list(_fields(_right_value(reference, item)))), item)
    is_correct = grade == 1.0 and satisfies_schema(answer, task.json_schema)
    return Score(score=grade, is_correct=is_correct)


def _right_value(text: str, item: Item) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(
            f"item {item.id}",
            found=f"a right answer that is no JSON: {error}",
            expected="JSON, as task.scoring is json",
            remedy="mend the target, or write task.scoring=exact",
        ) from None


def _fields(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[object, ...]]:
    """(path, type, value) of every leaf; 1 and 1.0 are equal, 1 and true and "1" are not."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _fields(inner, (*path, name))
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield from _fields(inner, (*path, i))
    else:
        kind = "number" if type(value) in (int, float) else type(value).__name__
        leaf = value.strip() if isinstance(value, str) else value
        yield path, kind, str(leaf) if isinstance(leaf, (dict, list)) else leaf
