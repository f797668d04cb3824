"""Sets of labels: nested, every label first, flipped alike at more noise."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError
from conf.label_curve import LabelCurveConfig
from evaluation.tasks import Task
from evaluation.tasks.label_subsets import share_flipped, sizes_of, subset, with_noise
from tests.conftest import TOPICS, make_topic_task

TASK = make_topic_task(train=90)


def ids(task: Task) -> set[str]:
    return {item.id for item in task.items["train"]}


@settings(max_examples=40)
@given(small=st.integers(2, 90), more=st.integers(0, 88), draw=st.integers(0, 5))
def test_smaller_sets_are_parts_of_larger_ones(small: int, more: int, draw: int) -> None:
    large = min(90, small + more)
    one, other = subset(TASK, size=small, draw=draw), subset(TASK, size=large, draw=draw)
    assert ids(one) <= ids(other)
    assert (len(ids(one)), len(ids(other))) == (small, large)
    counts = [sum(i.label == label for i in one.items["train"]) for label in TOPICS]
    assert max(counts) - min(counts) <= 1  # the pool has as many of each
    assert one.items["test"] == TASK.items["test"]
    assert (one.sha256 == other.sha256) == (small == large)


def test_draws_differ_and_the_whole_pool_is_the_task_itself() -> None:
    assert ids(subset(TASK, size=20, draw=0)) != ids(subset(TASK, size=20, draw=1))
    assert subset(TASK, size=90, draw=3) is TASK


@settings(max_examples=20)
@given(low=st.floats(0, 1), more=st.floats(0, 1), draw=st.integers(0, 3))
def test_noise_is_nested_and_never_keeps_the_right_label(
    low: float, more: float, draw: int
) -> None:
    high = min(1.0, low + more)
    for item in TASK.items["train"]:
        one = with_noise(item, TASK.labels, noise=low, draw=draw)
        other = with_noise(item, TASK.labels, noise=high, draw=draw)
        if one.label != item.label:
            assert other.label == one.label
        assert other == dataclasses.replace(item, label=other.label)
        assert other.label in TASK.labels


def test_the_share_of_flipped_labels_is_what_was_asked_for() -> None:
    task = make_topic_task(train=2000)
    noisy = subset(task, size=2000, draw=1, noise=0.2)
    share = share_flipped(task, noisy)
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 2000) ** 0.5
    assert noisy.items["test"] == task.items["test"]
    assert noisy.items["validation"] == task.items["validation"]
    pairs = list(zip(noisy.items["train"], task.items["train"], strict=True))
    assert {a.label for a, b in pairs if a.label != b.label} == set(TOPICS)
    assert share_flipped(task, subset(task, size=500, noise=0.0)) == 0


def test_sizes_are_spaced_alike_on_a_log_scale_up_to_the_pool() -> None:
    task = make_topic_task(train=512)
    assert sizes_of(LabelCurveConfig(), task) == (8, 32, 128, 512)
    assert sizes_of(LabelCurveConfig(num_sizes=2), make_topic_task(train=10)) == (5, 10)
    assert sizes_of(LabelCurveConfig(sizes=[3, 90]), TASK) == (3, 90)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"sizes": [8, 91]}, "label_curve.sizes=[8,90]"),
        ({"sizes": [200, 300]}, "at most 90"),
    ],
)
def test_more_labels_than_there_are_are_refused(config: dict[str, list[int]], says: str) -> None:
    with pytest.raises(ConfigError, match=r"label_curve.sizes") as error:
        sizes_of(LabelCurveConfig(sizes=config["sizes"]), TASK)
    assert says in f"{error.value.expected} {error.value.remedy}"


@pytest.mark.parametrize(
    "config",
    [{"sizes": [8]}, {"sizes": [8, 4]}, {"noise": [0.1]}, {"noise": [0, 1.0]}, {"draws": 0}],
)
def test_a_curve_that_is_none_is_refused(config: dict[str, list[int]]) -> None:
    with pytest.raises(ConfigError):
        LabelCurveConfig(**config)  # type: ignore[arg-type]
