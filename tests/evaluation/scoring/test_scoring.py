"""Scorers against the libraries, brute force, and tables of awkward answers."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from evaluation.plugins import load_plugins
from evaluation.scoring import Score, score
from tests.evaluation.chat_models import free_task, make_item, make_task

TEXTS = st.text("abc ABC.,'the an-", max_size=20)


def grade(answer: str | None, right: str, scoring: str, *references: str, **task: Any) -> Score:
    item = make_item("x", target=right, references=references)
    return score(answer, item, free_task(scoring, **task))


def test_labels_are_compared_as_they_are() -> None:
    task = make_task(labels=("a", "A"), label_words={})
    item = make_item("x", label="a")
    assert score("a", item, task) == Score(score=1.0, is_correct=True)
    assert score("A", item, task) == Score(score=0.0, is_correct=False)
    assert score(None, item, task) == Score(score=0.0, is_correct=False)


def test_format_is_judged_only_where_there_is_a_completion() -> None:
    item, task = make_item("x", label="spam"), make_task()
    assert score("spam", item, task).is_format_valid is None
    for completion, is_valid in (("spam", True), ("It is spam.", False)):
        found = score("spam", item, task, completion=completion)
        assert found == Score(score=1.0, is_correct=True, is_format_valid=is_valid)
    assert score("ham", item, task, completion="ham") == Score(
        score=0.0, is_correct=False, is_format_valid=True
    )
    assert score(None, item, task, completion="?").is_format_valid is False


def test_multiple_choice_is_exact() -> None:
    task = make_task(kind=TaskKind.multiple_choice, labels=(), label_words={})
    item = make_item("x", choices=("one", "One."), label="one")
    assert [score(a, item, task).is_correct for a in ("one", "One.", None)] == [True, False, False]


@pytest.mark.parametrize(
    ("answer", "right", "is_correct"),
    [
        ("Paris", "paris", True),
        (" paris.\n", "Paris", True),
        ('"New  York"', "new york", True),
        ("Paris, France", "Paris", False),
        ("e.g.", "e.g", True),
        ("!", "?", False),
        ("C++", "C#", True),  # outer punctuation is no part of a text; use labels where it is
        ("", "x", False),
        (None, "x", False),
    ],
)
def test_exact(answer: str | None, right: str, is_correct: bool) -> None:
    assert grade(answer, right, "exact") == Score(score=float(is_correct), is_correct=is_correct)


def test_any_reference_will_do() -> None:
    assert grade("color", "colour", "exact", "Color").is_correct
    assert grade("7", "5", "numeric", "7.0").is_correct
    assert grade('{"a": 2}', '{"a": 1}', "json", '{"a": 2}').is_correct


@pytest.mark.parametrize(
    ("answer", "right", "is_correct"),
    [
        ("1234.5", "1,234.50", True),
        ("18", "so #### 18", True),
        ("1000000", "1000001", True),
        ("1000000", "1000002", False),
        ("0", "0", True),
        ("0.0000001", "0", False),
        ("-3", "3", False),
        ("1e400", "5", False),
        ("ten", "10", False),
        (None, "10", False),
    ],
)
def test_numeric(answer: str | None, right: str, is_correct: bool) -> None:
    assert grade(answer, right, "numeric").is_correct is is_correct


@pytest.mark.parametrize(("scoring", "right"), [("numeric", "ten"), ("json", "{")])
def test_a_right_answer_that_the_rule_cannot_read_is_refused(scoring: str, right: str) -> None:
    with pytest.raises(DataError, match="item "):
        grade("{}" if scoring == "json" else "1", right, scoring)


def squad_f1(prediction: str, truth: str) -> float:
    """Brute force after the published SQuAD rules, word by word."""

    def words(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return [w for w in re.sub(r"\b(a|an|the)\b", " ", text).split() if w]

    found, right = words(prediction), words(truth)
    left = list(right)
    common = 0
    for word in found:
        if word in left:
            left.remove(word)
            common += 1
    if not found or not right:
        return float(found == right)
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(right)
    return 2 * precision * recall / (precision + recall)


@given(TEXTS, TEXTS, TEXTS)
def test_token_f1_equals_brute_force(answer: str, right: str, other: str) -> None:
    found = grade(answer, right, "token_f1", other)
    assert found.score == pytest.approx(max(squad_f1(answer, right), squad_f1(answer, other)))
    assert found.is_correct is None


def longest_common(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


@settings(deadline=None, max_examples=60)
@given(*[st.lists(st.sampled_from(["cat", "sat", "mat", "on"]), max_size=6)] * 3)
def test_rouge_l_equals_brute_force(a: list[str], b: list[str], c: list[str]) -> None:
    def f_measure(right: list[str]) -> float:
        common = longest_common(a, right)
        return 2 * common / (len(a) + len(right)) if common else 0.0

    found = grade(" ".join(a), " ".join(b), "rouge_l", " ".join(c))
    assert found.score == pytest.approx(max(f_measure(b), f_measure(c)))
    assert found.is_correct is None


def chrf_by_hand(answer: str, right: str) -> float:
    """chrF2 of one sentence (Popovic 2015): mean F2 over character n-grams of 1 to 6."""
    a, b = "".join(answer.split()), "".join(right.split())
    scores = []
    for n in range(1, 7):
        grams_a = [a[i : i + n] for i in range(len(a) - n + 1)]
        grams_b = [b[i : i + n] for i in range(len(b) - n + 1)]
        if not grams_a or not grams_b:
            continue
        left = list(grams_b)
        common = sum(1 for gram in grams_a if gram in left and not left.remove(gram))
        precision, recall = common / len(grams_a), common / len(grams_b)
        scores.append((precision, recall))
    if not scores:
        return 0.0
    precision = sum(p for p, _ in scores) / len(scores)
    recall = sum(r for _, r in scores) / len(scores)
    return 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


@settings(deadline=None, max_examples=60)
@given(st.text("ab c", min_size=1, max_size=15), st.text("ab c", min_size=1, max_size=15))
def test_chrf_equals_the_definition(answer: str, right: str) -> None:
    found = grade(answer, right, "chrf")
    assert found.score == pytest.approx(chrf_by_hand(answer, right), abs=1e-6)
    assert found.is_correct is None


def test_the_graded_rules_give_one_to_an_equal_text_and_the_best_reference() -> None:
    for scoring in ("token_f1", "rouge_l", "chrf"):
        same = grade("the cat sat on mats", "other words", scoring, "the cat sat on mats")
        assert same == Score(score=1.0)
        assert grade(None, "other words", scoring) == Score(score=0.0)
        assert grade("zzz", "other words", scoring).score < 0.2


@pytest.mark.parametrize(
    ("answer", "right", "f1", "is_correct"),
    [
        ('{"a": 1, "b": "x"}', '{"b": "x", "a": 1}', 1.0, True),
        ('{"a": 1.0}', '{"a": 1}', 1.0, True),
        ('{"a": true}', '{"a": 1}', 0.0, False),
        ('{"a": "1"}', '{"a": 1}', 0.0, False),
        ('{"a": " x "}', '{"a": "x"}', 1.0, True),
        ('{"a": "X"}', '{"a": "x"}', 0.0, False),
        ('{"a": 1}', '{"a": 1, "b": 2}', 2 / 3, False),
        ('{"a": 1, "b": 2, "c": 3}', '{"a": 1, "b": 2}', 4 / 5, False),
        ('{"a": {"b": [1, 2]}}', '{"a": {"b": [1, 3]}}', 0.5, False),
        ('{"a": {"b": 1}}', '{"a.b": 1}', 0.0, False),
        ('{"a": []}', '{"a": {}}', 0.0, False),
        ('{"a": []}', '{"a": []}', 1.0, True),
        ("{}", "{}", 1.0, True),
        ('{"a": null}', "{}", 0.0, False),
        ("no json", '{"a": 1}', 0.0, False),
        (None, '{"a": 1}', 0.0, False),
    ],
)
def test_json_fields(answer: str | None, right: str, f1: float, is_correct: bool) -> None:
    found = grade(answer, right, "json")
    assert found.score == pytest.approx(f1)
    assert found.is_correct is is_correct


def test_json_is_right_only_with_its_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    found = grade('{"a": " x"}', '{"a": "x"}', "json", json_schema=schema)
    assert found == Score(score=1.0, is_correct=False)


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), min_size=1))
def test_json_f1_counts_fields(value: dict[str, Any]) -> None:
    name = sorted(value)[0]
    less = {k: v for k, v in value.items() if k != name}
    found = grade(json.dumps(less), json.dumps(value), "json").score
    expected = 2 * len(less) / (len(less) + len(value)) if less else 0.0
    assert found == pytest.approx(expected)


PLUGIN = """
from evaluation.plugins import scorer


@scorer("{name}")
def mine(answer, item, task):
    return {value}
"""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("len(answer) / 10", Score(score=0.3)),
        ("answer == item.answer_key", Score(score=1.0, is_correct=True)),
        ("2", None),
        ("-0.1", None),
        ("float('nan')", None),
        ("None", None),
    ],
)
def test_a_users_scorer(tmp_path: Path, value: str, expected: Score | None) -> None:
    name = f"mine_{abs(hash(value))}"
    path = tmp_path / "my_scorer.py"
    path.write_text(PLUGIN.format(name=name, value=value))
    load_plugins([path])
    if expected is not None:
        assert grade("abc", "abc", name) == expected
        assert grade(None, "abc", name).score == 0.0
        return
    with pytest.raises(ConfigError, match="number in"):
        grade("abc", "abc", name)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="rouge_l"):
        grade("a", "a", "rogue")
