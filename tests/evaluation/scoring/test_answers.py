"""Answers are read leniently, formats strictly, and the two stand apart."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.choices import TaskKind
from evaluation.scoring.answers import (
    first_object,
    is_format_valid,
    last_number,
    match_label,
    read_answer,
    satisfies_schema,
)
from tests.evaluation.chat_models import free_task, make_item, make_task

ITEM = make_item("x", label="spam", target="1")
SPAM = {"ham": "ham", "spam": "spam", "not_spam": "not spam"}


@pytest.mark.parametrize(
    ("completion", "label"),
    [
        ("spam", "spam"),
        (" spam\n", "spam"),
        ("SPAM", "spam"),
        ("Spam.", "spam"),
        ('"spam"', "spam"),
        ("**spam**", "spam"),
        ("spam, because it is not ham", "spam"),
        ("Not spam!", "not_spam"),
        ("not spam", "not_spam"),
        ("The answer is ham.", "ham"),
        ("I think it is not spam at all", "not_spam"),
        ("This isn't ham", None),
        ("It is not a ham", None),
        ("It is not a ham but spam", "spam"),
        ("either ham or spam", None),
        ("hamster", None),
        ("spammy", None),
        ("", None),
        ("...", None),
        ("nothing of the kind", None),
        ("ham\n\nInput: spam", "ham"),
    ],
)
def test_labels(completion: str, label: str | None) -> None:
    assert match_label(completion, SPAM) == label


@pytest.mark.parametrize(
    ("completion", "label"),
    [("C", "c"), ("C++", "c++"), ("c++", "c++"), ("It is C++.", None), ("-", "-"), ("+", "+")],
)
def test_labels_that_differ_in_signs_alone_are_matched_strictly(
    completion: str, label: str | None
) -> None:
    words = {"c": "C", "c++": "C++", "+": "+", "-": "-"}
    assert match_label(completion, words) == label


def test_case_alone_can_tell_labels_apart() -> None:
    words = {"1": "US", "2": "us"}
    assert [match_label(text, words) for text in ("US", "us", "Us", "in the US")] == [
        "1",
        "2",
        None,
        None,
    ]


WORDS = st.lists(
    st.text("abcd \u00e9", min_size=1, max_size=6).map(str.strip).filter(bool),
    min_size=1,
    max_size=5,
    unique_by=lambda word: " ".join(word.split()),
)


@given(words=WORDS, data=st.data())
def test_a_label_word_is_its_own_answer_in_any_dress(words: list[str], data: st.DataObject) -> None:
    labels = {f"label {i}": word for i, word in enumerate(words)}
    label = data.draw(st.sampled_from(sorted(labels)))
    for form in ("{}", " {}\n", "{}.", '"{}"', "({})", "{}!", "**{}**"):
        assert match_label(form.format(labels[label]), labels) == label
        assert match_label(form.format(labels[label]).upper(), labels) == label


@given(st.text(), WORDS)
def test_any_text_gives_a_known_label_or_none(text: str, words: list[str]) -> None:
    assert match_label(text, dict(zip(words, words, strict=True))) in {None, *words}


def test_the_label_is_the_answer_and_the_word_the_format() -> None:
    task = make_task(label_words={"ham": "all good", "spam": "junk mail"})
    for completion, answer, is_valid in (
        ("junk mail", "spam", True),
        (" all good ", "ham", True),
        ("Junk mail", "spam", False),
        ("junk mail.", "spam", False),
        ("spam", None, False),
        ("good", None, False),
    ):
        assert read_answer(completion, ITEM, task) == answer
        assert is_format_valid(completion, ITEM, task) is is_valid


CHOICES = ("Paris", "London", "A man", "The new York")


@pytest.mark.parametrize(
    ("completion", "answer", "is_valid"),
    [
        ("London", "London", True),
        ("london.", "London", False),
        ("B", "London", False),
        ("(b)", "London", False),
        ("B.", "London", False),
        ("B. London", "London", False),
        ("B) it is London, not Paris", "London", False),
        ("The answer is B.", "London", False),
        ("Answer: (D)", "The new York", False),
        ("A man", "A man", True),
        ("A man did it", "A man", False),
        ("the answer is a man", "A man", False),
        ("I would say Paris", "Paris", False),
        ("Paris or London", "Paris", False),
        ("either Paris or London", None, False),
        ("E", None, False),
        ("", None, False),
    ],
)
def test_multiple_choice(completion: str, answer: str | None, is_valid: bool) -> None:
    task = make_task(kind=TaskKind.multiple_choice, labels=(), label_words={})
    item = make_item("Which?", choices=CHOICES, label="London")
    assert read_answer(completion, item, task) == answer
    assert is_format_valid(completion, item, task) is is_valid


def test_choices_that_are_letters_are_matched_as_texts() -> None:
    task = make_task(kind=TaskKind.multiple_choice, labels=(), label_words={})
    item = make_item("Which?", choices=("B", "A"), label="A")
    assert read_answer("A", item, task) == "A"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        ("The answer is 42.", "42"),
        ("about $1,234.50.", "1234.50"),
        ("1,234,567", "1234567"),
        ("3 apples and 4 pears make 7", "7"),
        ("-5", "-5"),
        ("\u22125 degrees", "-5"),
        ("+3", "3"),
        ("10-5", "5"),
        ("12%", "12"),
        ("x=.5", ".5"),
        ("-.5", "-.5"),
        ("1.5e3", "1.5e3"),
        ("6.02E+23 of them", "6.02E+23"),
        ("5kg", "5"),
        ("#### 18", "18"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("H2O", None),
        ("no number", None),
        ("", None),
        ("nan inf", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@given(
    st.integers(-(10**12), 10**12),
    st.integers(0, 6),
    st.sampled_from(["{}", "It is {}.", "= {}\n", "first 3, then {} euros", "({})", "{}, I think"]),
)
def test_any_number_is_found_with_and_without_thousands(whole: int, places: int, form: str) -> None:
    value = whole / 10**places
    for text in (f"{value:.{places}f}", f"{value:,.{places}f}"):
        found = last_number(form.format(text))
        assert found is not None
        assert float(found) == float(text.replace(",", ""))


@given(st.text("0123456789,.-+eE $x", max_size=60))
def test_what_is_found_is_a_number(text: str) -> None:
    found = last_number(text)
    assert found is None or re.fullmatch(r"-?\d*\.?\d+([eE][-+]?\d+)?", found)
    if found is not None:
        float(found)


@pytest.mark.parametrize(
    ("completion", "is_valid"),
    [("42", True), (" 1,234.5\n", True), ("-3", True), ("42.", False), ("$5", False), ("", False)],
)
def test_number_format(completion: str, is_valid: bool) -> None:
    assert is_format_valid(completion, ITEM, free_task("numeric")) is is_valid


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(
    st.dictionaries(st.text(max_size=4), VALUES, max_size=4),
    st.sampled_from(["", "Here: ", "{ not json } ", "```json\n", "a {\n"]),
    st.sampled_from(["", ".", "\n```", ' {"second": 1}', " }"]),
)
def test_the_first_object_is_found_in_any_text(
    value: dict[str, object], before: str, after: str
) -> None:
    found = first_object(before + json.dumps(value) + after)
    assert found is not None and found.value == value
    assert json.loads(found.text) == value


@pytest.mark.parametrize(
    "text",
    ["", "no", "{", '{"a": 1', "[1, 2]", '{"a": NaN}', "{'a': 1}", "{" * 5000, '{"a":' * 5000],
)
def test_texts_without_an_object(text: str) -> None:
    assert first_object(text) is None
    assert not satisfies_schema(text, None)


def test_json_format_is_the_whole_completion_and_the_schema() -> None:
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    task = free_task("json", json_schema=schema)
    for completion, answer, is_valid in (
        (' {"n": 1}\n', '{"n": 1}', True),
        ('{"n": "1"}', '{"n": "1"}', False),
        ("{}", "{}", False),
        ('```json\n{"n": 1}\n```', '{"n": 1}', False),
        ('{"n": 1} {"n": 2}', '{"n": 1}', False),
        ('{"n": 1', None, False),
    ):
        assert read_answer(completion, ITEM, task) == answer
        assert is_format_valid(completion, ITEM, task) is is_valid
    assert is_format_valid("{}", ITEM, free_task("json")) is True


def test_free_texts_have_no_format() -> None:
    task = free_task("rouge_l")
    assert read_answer(" Hello. \n", ITEM, task) == "Hello."
    assert read_answer(" \n", ITEM, task) is None
    assert is_format_valid("anything", ITEM, task) is None
