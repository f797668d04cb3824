"""Normalisations of label scores against formulas over each label's own tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.scoring.calibration import best_label
from evaluation.scoring.normalisation import LabelScores, mean_logprobs

logprobs = st.floats(-30, -1e-3)
# Words with letters of one to four UTF-8 bytes.
words = st.text(alphabet="abé\u4e16\U0001f600", min_size=1, max_size=5)
label_tokens = st.dictionaries(
    words, st.lists(logprobs, min_size=1, max_size=5), min_size=1, max_size=6
)


def make(tokens: dict[str, list[float]], free: dict[str, float] | None = None) -> LabelScores:
    return LabelScores(
        sums={label: sum(values) for label, values in tokens.items()},
        num_tokens={label: len(values) for label, values in tokens.items()},
        num_bytes={label: len(label.encode()) for label in tokens},
        firsts={label: values[0] for label, values in tokens.items()},
        baselines=free,
    )


@given(label_tokens, st.data())
def test_each_normalisation_by_its_formula(
    tokens: dict[str, list[float]], data: st.DataObject
) -> None:
    free = {label: data.draw(logprobs) for label in tokens}
    scores = make(tokens, free)
    rows = {label: np.array(values) for label, values in tokens.items()}
    wanted = {
        "sum": {label: row.sum() for label, row in rows.items()},
        "token": {label: row.mean() for label, row in rows.items()},
        "byte": {label: row.sum() / len(bytes(label, "utf-8")) for label, row in rows.items()},
        "pmi": {label: row.sum() - free[label] for label, row in rows.items()},
        "first_token": {label: row[0] for label, row in rows.items()},
    }
    for name, values in wanted.items():
        found = scores.by(name)
        assert list(found) == list(tokens)
        assert found == pytest.approx(values, rel=1e-9, abs=1e-9)


def test_bytes_are_those_of_lm_evaluation_harness() -> None:
    # lls / [len(choice.encode("utf-8"))], as in lm_eval/api/task.py, and its argmax.
    choices = ["caf\u00e9", "tea", "a long drink"]
    sums = {"caf\u00e9": -4.0, "tea": -2.6, "a long drink": -9.0}
    scores = LabelScores(
        sums=sums,
        num_tokens=dict.fromkeys(choices, 1),
        num_bytes={c: len(c.encode("utf-8")) for c in choices},
    )
    wanted = np.array(list(sums.values())) / np.array([5, 3, 12])
    assert list(scores.by("byte").values()) == pytest.approx(list(wanted))
    assert best_label(scores.by("byte")) == choices[int(wanted.argmax())] == "a long drink"
    assert best_label(scores.by("sum")) == "tea"


def test_equal_first_tokens_are_a_tie_that_the_first_label_wins() -> None:
    scores = make({"b": [-1.0, -9.0], "a": [-1.0], "c": [-2.0]})
    assert best_label(scores.by("first_token")) == "b"


def test_without_baselines_pmi_leaves_them_to_the_rule() -> None:
    scores = make({"a": [-3.0], "b": [-2.0, -2.0]})
    offsets = mean_logprobs([{"a": -1.0, "b": -5.0}, {"a": -2.0, "b": -7.0}])
    assert offsets == {"a": -1.5, "b": -6.0}
    assert best_label(scores.by("pmi"), offsets) == "b"  # -3 + 1.5 < -4 + 6
    assert mean_logprobs([]) is None


@given(st.lists(st.tuples(logprobs, logprobs), min_size=1, max_size=5))
def test_means_are_means(rows: list[tuple[float, float]]) -> None:
    found = mean_logprobs([dict(zip("ab", row, strict=True)) for row in rows])
    assert found is not None
    assert [found["a"], found["b"]] == pytest.approx(list(np.array(rows).mean(0)))


def test_no_other_names() -> None:
    with pytest.raises(ValueError, match="acc_norm"):
        make({"a": [-1.0]}).by("acc_norm")


def test_long_labels_do_not_overflow() -> None:
    assert math.isfinite(make({"a": [-1e6] * 5}).by("token")["a"])
