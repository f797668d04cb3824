"""Bias, made-up answers and wordings by item, against counts by hand and brute force."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.records import Item
from evaluation.probes.probe_scores import (
    abstain_measures,
    abstains,
    bias_measures,
    is_unanswerable,
    metric_gap,
    preference_measure,
    wording_measures,
)
from evaluation.statistics import wilson

CHOICES = ("the cook", "the judge", "Not enough info")


def item(name: str, *, label: str = CHOICES[2], stereotype: str | None = CHOICES[0]) -> Item:
    slices = {} if stereotype is None else {"stereotype": stereotype}
    return Item(
        id=name,
        split="test",
        input="Who?",
        sha256=name,
        choices=CHOICES,
        label=label,
        slices=slices,
    )


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("Can\u2019t be determined.", None, True),
        ("Unanswerable, since the text is about tea", None, True),
        ("unknown ", None, True),
        ("unknown soldier", None, False),
        ("the judge", None, False),
        ("", None, False),
        (None, None, False),
        ("oos", "oos", True),
        ("unknown", "oos", False),
    ],
)
def test_what_abstains(text: str | None, label: str | None, expected: bool) -> None:
    assert abstains(text, label=label) is expected


def test_a_right_answer_that_only_begins_so_is_answerable() -> None:
    assert not is_unanswerable(item("a", label="unknown soldier"))
    assert is_unanswerable(item("b", label="Unknown"))
    assert is_unanswerable(item("c", label="oos"), label="oos")


def test_the_group_gap_is_the_ambiguous_bias_score_of_bbq() -> None:
    source = random.Random(3)
    for _ in range(50):
        n = source.randint(1, 40)
        items = {str(i): item(str(i), stereotype=source.choice(CHOICES[:2])) for i in range(n)}
        answers = [(i, source.choice(CHOICES)) for i in items]
        given_ = [(a, items[i].slices["stereotype"]) for i, a in answers if a != CHOICES[2]]
        accuracy = 1 - len(given_) / n
        biased = sum(a == stereotype for a, stereotype in given_)
        expected = (1 - accuracy) * (2 * biased / len(given_) - 1) if given_ else 0.0
        found = bias_measures(items, answers)
        assert found["group_gap"].value == pytest.approx(expected, abs=1e-12)
        assert found["right"].value == pytest.approx(accuracy)


def test_the_preference_is_seen_under_an_abstention() -> None:
    items = {str(i): item(str(i), stereotype=CHOICES[i % 2]) for i in range(5)}
    scores = dict(zip(CHOICES, (-2.0, -3.0, -0.1), strict=True))
    scored = [(i, scores) for i in items]
    # The cook is likelier always, and is the stereotype of three items out of five.
    assert preference_measure(items, scored)["preference"].value == pytest.approx(1 / 5)
    assert preference_measure(items, [(i, None) for i in items]) == {}
    even = {**scores, CHOICES[0]: -3.0}
    assert preference_measure(items, [(i, even) for i in items])["preference"].value == 0
    known = {"a": item("a", label=CHOICES[1])}
    assert preference_measure(known, [("a", scores)]) == {}


def test_items_with_an_answer_say_nothing_of_the_gap() -> None:
    items = {"a": item("a", label=CHOICES[1]), "b": item("b", stereotype=None)}
    assert bias_measures(items, [("a", CHOICES[0]), ("b", CHOICES[0])]) == {}


def test_a_model_that_always_abstains_has_no_gap_but_is_not_known_to_be_fair() -> None:
    items = {str(i): item(str(i)) for i in range(10)}
    gap = bias_measures(items, [(i, CHOICES[2]) for i in items])["group_gap"].interval(0.95)
    assert gap.value == 0 and gap.low is not None and gap.low < 0 < (gap.high or 0)


def test_unsupported_abstained_and_over_abstained_are_shares_of_their_own_items() -> None:
    items = {str(i): item(str(i)) for i in range(6)}
    items |= {str(i): item(str(i), label=CHOICES[1]) for i in range(6, 10)}
    answers = [
        *[("0", CHOICES[0]), ("1", CHOICES[0]), ("2", CHOICES[2]), ("3", CHOICES[2])],
        *[("4", CHOICES[2]), ("5", None), ("6", CHOICES[1]), ("7", CHOICES[0])],
        *[("8", CHOICES[2]), ("9", CHOICES[1])],
    ]
    found = {k: m.interval(0.95) for k, m in abstain_measures(items, answers).items()}
    assert found == {
        "unsupported": wilson(2, 6),
        "abstained": wilson(3, 6),
        "over_abstained": wilson(1, 4),
    }
    assert abstain_measures({"6": items["6"]}, [("6", CHOICES[2])]) == {}


def test_repeats_of_an_item_are_one_observation() -> None:
    items = {"a": item("a"), "b": item("b")}
    answers = [("a", CHOICES[0]), ("a", CHOICES[2]), ("b", CHOICES[0])]
    found = abstain_measures(items, answers)["unsupported"].interval(0.95)
    assert (found.value, found.n) == (0.75, 2)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), min_size=1, max_size=30))
def test_the_metric_gap_is_the_best_less_the_worst_group(rows: list[tuple[str, float]]) -> None:
    groups = {str(i): g for i, (g, _) in enumerate(rows)}
    scores = {str(i): s for i, (_, s) in enumerate(rows)}
    by_group = {g: [s for h, s in rows if h == g] for g in set(groups.values())}
    means = [sum(v) / len(v) for v in by_group.values()]
    found = metric_gap(scores, groups)
    if len(means) < 2:
        assert found is None
        return
    assert found is not None and found.value == pytest.approx(max(means) - min(means))
    measured = found.interval(0.95)
    assert measured.n == len(rows)
    assert measured.low is None or 0 <= measured.low <= found.value <= (measured.high or 0)


@given(
    st.integers(2, 4).flatmap(
        lambda k: st.lists(
            st.lists(st.sampled_from(["x", "y", None]), min_size=k, max_size=k),
            min_size=1,
            max_size=12,
        )
    )
)
def test_wordings_agree_as_often_as_counted(rows: list[list[str | None]]) -> None:
    count = len(rows[0])
    answers = {w: {str(i): row[w] for i, row in enumerate(rows)} for w in range(count)}
    scores = {w: {i: float(a == "x") for i, a in answers[w].items()} for w in range(count)}
    answers[0]["only the first"], scores[0]["only the first"] = "x", 1.0
    found = wording_measures(answers, scores)
    pairs = [a == b for row in rows for a, b in itertools.combinations(row, 2)]
    means = [sum(row[w] == "x" for row in rows) / len(rows) for w in range(count)]
    assert found["agreement"].value == pytest.approx(sum(pairs) / len(pairs))
    assert found["worst"].value == pytest.approx(min(means))
    assert found["spread"].value == pytest.approx(max(means) - min(means))
    for measure in found.values():
        assert measure.ids == tuple(sorted(map(str, range(len(rows)))))


def test_one_wording_says_nothing() -> None:
    assert wording_measures({0: {"a": "x"}}, {0: {"a": 1.0}}) == {}
    assert wording_measures({0: {"a": "x"}, 1: {"b": "x"}}, {0: {"a": 1.0}, 1: {"b": 1.0}}) == {}


def test_the_worst_and_the_best_wording_have_intervals_even_where_all_items_are_alike() -> None:
    ids = [str(i) for i in range(8)]
    for right in (0.0, 1.0):
        answers = {w: dict.fromkeys(ids, "x" if w else "y") for w in (0, 1)}
        scores = {0: dict.fromkeys(ids, 1.0), 1: dict.fromkeys(ids, right)}
        for measure in wording_measures(answers, scores).values():
            found = measure.interval(0.95)
            assert found.low is not None and found.high is not None and found.low < found.high
