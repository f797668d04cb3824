"""Votes and early stops against all ways in which the remaining repeats could go."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from conf.choices import RepeatStopping
from conf.errors import ConfigError
from evaluation.scoring.voting import (
    ballot,
    check_voting,
    further,
    is_decided,
    is_likely,
    is_settled,
    majority,
)

ballots = st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=7)


def plain_majority(given: list[str | None]) -> str | None:
    """The most frequent, of equal ones the first, by a second way of counting."""
    votes = [b for b in given if b is not None]
    best = max(Counter(votes).values(), default=0)
    return next((b for b in votes if votes.count(b) == best), None)


@given(ballots)
def test_the_majority_is_the_most_frequent_and_the_first_of_equals(given: list[str | None]) -> None:
    place = majority(given)
    wanted = plain_majority(given)
    assert (None if place is None else given[place]) == wanted
    assert place is None or wanted not in given[:place]


@given(ballots.filter(lambda b: len(b) <= 5), st.integers(0, 3))
def test_decided_is_exactly_when_nothing_can_change_the_vote(
    given: list[str | None], remaining: int
) -> None:
    # "z" stands for any answer that was not given yet.
    futures = itertools.product([None, "a", "b", "c", "z"], repeat=remaining)
    ends = {plain_majority([*given, *future]) for future in futures}
    is_fixed = ends == {plain_majority(given)} and plain_majority(given) is not None
    assert is_decided(given, remaining=remaining) is is_fixed


@given(ballots.filter(lambda b: len(b) <= 4), st.integers(0, 4), st.sampled_from(RepeatStopping))
def test_no_repeat_of_a_wave_could_have_been_saved(
    given: list[str | None], remaining: int, stopping: RepeatStopping
) -> None:
    repeats = len(given) + remaining
    more = further(given, repeats=repeats, stopping=stopping)
    assert 0 <= more <= remaining
    for count in range(more):
        for future in itertools.product([None, "a", "b", "c", "z"], repeat=count):
            assert not is_settled([*given, *future], repeats=repeats, stopping=stopping)
    assert further(given, repeats=repeats, stopping=None) == remaining
    assert further(given, repeats=repeats, stopping=RepeatStopping.never) == remaining


def stopped(every: list[str | None], stopping: RepeatStopping) -> list[str | None]:
    """What is asked of an item whose repeats would answer so."""
    given: list[str | None] = []
    while more := further(given, repeats=len(every), stopping=stopping):
        given += every[len(given) : len(given) + more]
    assert is_settled(given, repeats=len(every), stopping=stopping)
    return given


@given(st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=3, max_size=12))
def test_stopping_when_decided_never_changes_the_vote(every: list[str | None]) -> None:
    given = stopped(every, RepeatStopping.decided)
    assert plain_majority(given) == plain_majority(every)
    if plain_majority(given) is None:
        assert given == every
    assert stopped(every, RepeatStopping.never) == every


def test_stopping_saves_repeats_where_answers_agree() -> None:
    assert len(stopped(["a"] * 5, RepeatStopping.decided)) == 3
    assert len(stopped(["a"] * 40, RepeatStopping.decided)) == 20
    assert len(stopped(["a"] * 40, RepeatStopping.likely)) == 4
    assert len(stopped(["a", "b"] * 20, RepeatStopping.likely)) == 39  # a tie goes to the first


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 5))
def test_likely_is_the_beta_posterior(a: int, b: int, c: int) -> None:
    given = ["a"] * a + ["b"] * b + ["c"] * c + [None]
    first, second, _ = sorted((a, b, c), reverse=True)
    share = beta.sf(0.5, first + 1, second + 1)
    assert is_likely(given) is bool(first > 0 and share > 0.95)


def test_ballots() -> None:
    def same(a: str, b: str, *, is_label: bool = False) -> bool:
        return ballot(a, is_label=is_label) == ballot(b, is_label=is_label)

    assert same("5", "5.0") and same("1e3", "1000") and not same("5", "5.1")
    assert same("Paris.", "paris") and not same("Paris", "London")
    assert same('{"a": 1, "b": [2]}', '{"b":[2],"a":1}') and not same('{"a": 1}', '{"a": 2}')
    assert not same("US", "us", is_label=True) and same("US", "us")
    assert not same("true", "1") and not same("9007199254740993", "9007199254740992")
    assert ballot(None, is_label=False) is None


@given(st.text(max_size=8) | st.floats(allow_nan=True).map(str) | st.integers().map(str))
def test_any_text_is_a_ballot_equal_to_itself(text: str) -> None:
    found = ballot(text, is_label=False)
    assert isinstance(found, str) and found == ballot(text, is_label=False)


def test_deep_json_is_a_text() -> None:
    assert ballot("[" * 100_000, is_label=False) is not None
    assert json.loads(ballot('{"a": null}', is_label=False) or "") == {"a": None}


def test_graded_texts_do_not_vote() -> None:
    with pytest.raises(ConfigError, match=r"arms\.x\.self_consistency"):
        check_voting("rouge_l", key="arms.x")
    check_voting("exact", key="arms.x")
