"""Offsets and choices, against hand-made cases and numpy."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from conf.records import Item, Measured
from evaluation.scoring.calibration import (
    Candidate,
    best_label,
    choose,
    content_free_items,
    fit_offsets,
)

values = st.floats(-60, 0)


@given(st.lists(st.tuples(values, values, values), min_size=1, max_size=9))
def test_offsets_are_logs_of_mean_shares(rows: list[tuple[float, float, float]]) -> None:
    found = fit_offsets([dict(zip("abc", row, strict=True)) for row in rows])
    x = np.exp(np.array(rows))
    shares = x / x.sum(1, keepdims=True)
    wanted = np.log(np.maximum(shares.mean(0), 1e-30))
    assert found is not None
    np.testing.assert_allclose([found[k] for k in "abc"], wanted, rtol=1e-9, atol=1e-9)


def test_scores_far_below_zero_do_not_underflow() -> None:
    found = fit_offsets([{"a": -2000.0, "b": -2000.0 + math.log(3)}])
    assert found is not None
    assert math.isclose(math.exp(found["a"]), 0.25) and math.isclose(math.exp(found["b"]), 0.75)


def test_no_inputs_no_offsets() -> None:
    assert fit_offsets([]) is None


def test_a_constant_leaning_is_taken_out() -> None:
    clean = [{"a": -0.1, "b": -3.0}, {"a": -3.0, "b": -0.1}]
    leaning = [{"a": row["a"], "b": row["b"] + 5.0} for row in clean]
    assert [best_label(row) for row in leaning] == ["b", "b"]
    offsets = fit_offsets(leaning)
    assert [best_label(row, offsets) for row in leaning] == ["a", "b"]


def test_ties_go_to_the_first() -> None:
    assert best_label({"a": -1.0, "b": -1.0}) == "a"

    def candidate(name: str, value: float | None) -> Candidate:
        return Candidate(
            answer_by="score", calibration=name, offsets=None, value=Measured(value=value)
        )

    options = [candidate("none", 0.5), candidate("contextual", 0.5), candidate("batch", 0.4)]
    assert choose(options).calibration == "none"
    assert choose([*options, candidate("late", 0.51)]).calibration == "late"
    assert choose([candidate("none", None), candidate("batch", None)]).calibration == "none"


def test_content_free_items_keep_the_form() -> None:
    like = Item(
        id="x", split="validation", input="i", sha256="0", context="c", label="a",
        rationale="because", slices={"origin": "web"},
    )  # fmt: skip
    for item in content_free_items(like):
        assert item.context == item.input != "i" and item.slices == {"origin": item.input}
        assert item.rationale is None and item.id.startswith("content-free")
