"""The grammar of sweep.space: what is read, what is refused, and where in a range a value lies."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.choices import Schedule
from conf.errors import ConfigError
from conf.schema import RunConfig
from conf.space import Choice, Range, arm_with, space_of
from launch.compose import compose_config

BASE = compose_config(["+exp=lora", "sweep=random"])


def with_space(space: Any, arm: str = "lora") -> RunConfig:
    BASE.sweep.space = {arm: space}
    return BASE


def test_nested_and_dotted_fields_are_the_same_sorted_by_name() -> None:
    values = {"log_uniform": [1e-5, 3e-3]}
    nested = {"trainer": {"learning_rate": values}, "lora_rank": [4, 8]}
    dotted = {"lora_rank": [4, 8], "trainer.learning_rate": values}
    want = (
        Choice(field="lora_rank", values=(4, 8)),
        Range(field="trainer.learning_rate", kind="log_uniform", low=1e-5, high=3e-3),
    )
    assert space_of(with_space(nested), "lora") == want
    assert space_of(with_space(dotted), "lora") == want


def test_values_take_the_type_of_their_field() -> None:
    space = {
        "trainer.schedule": ["cosine", "constant"],
        "lora_plus_ratio": [None, 16],
        "target_modules": [["q_proj"], ["q_proj", "v_proj"]],
        "trainer.learning_rate": ["1e-4"],
        "instruction": ["Spam, or not?"],
    }
    found = {d.field: d.points() for d in space_of(with_space(space), "lora")}
    assert found["trainer.schedule"] == (Schedule.cosine, Schedule.constant)
    assert found["lora_plus_ratio"] == (None, 16.0)
    assert found["target_modules"] == (["q_proj"], ["q_proj", "v_proj"])
    assert found["trainer.learning_rate"] == (1e-4,)


@pytest.mark.parametrize(
    ("space", "where", "said"),
    [
        ({"rank": [4]}, "lora.rank", "did you mean sweep.space.lora.lora_rank?"),
        ({"learning_rate": [1.0]}, "lora.learning_rate", "lora.trainer.learning_rate?"),
        ({"trainer": {"lr": [1.0]}}, "lora.trainer.lr", "does not have"),
        ({"trainer": [1, 2]}, "lora.trainer", "does not have"),
        ({"kind": ["full"]}, "lora.kind", "does not have"),
        ({"peft.r": [4]}, "lora.peft.r", "does not have"),
        ({"trainer.seed": [1, 2]}, "trainer.seed", "sweep.replicates.seeds=5"),
        ({"draw": [1, 2]}, "lora.draw", "sweep.replicates.draws=5"),
        ({}, "space.lora", "fields of the arm"),
        ([4, 8], "space.lora", "fields of the arm"),
        ({"trainer": {}}, "space.lora", "fields of the arm"),
        ({"lora_rank": []}, "lora_rank", "a list of values"),
        ({"lora_rank": 8}, "lora_rank", "a list of values"),
        ({"lora_rank": "4,8"}, "lora_rank", "a list of values"),
        ({"lora_rank": [4, 8, 4]}, "lora_rank", "4 twice"),
        ({"trainer.learning_rate": [1e-3, "0.001"]}, "learning_rate", "0.001 twice"),
        ({"lora_rank": [4], "trainer": {"epochs": [1]}, "trainer.epochs": [2]}, "epochs", "twice"),
        ({"lora_rank": [4, 0]}, "lora_rank", "a positive count"),
        ({"lora_rank": [4.5]}, "lora_rank", "could not be converted"),
        ({"lora_rank": [[4]]}, "lora_rank", "could not be converted"),
        ({"lora_rank": [None]}, "lora_rank", "not Optional"),
        ({"trainer.learning_rate": [50.0]}, "learning_rate", "below 10"),
        ({"trainer.learning_rate": [math.nan]}, "learning_rate", "finite"),
        ({"trainer.schedule": ["spiral"]}, "schedule", "spiral"),
        ({"trainer.learning_rate": {"log_unifrom": [1, 2]}}, "learning_rate", "log_uniform"),
        ({"trainer.learning_rate": {}}, "learning_rate", "one of log_uniform"),
        (
            {"lora_alpha": {"uniform": [1, 2], "log_uniform": [1, 2]}},
            "lora_alpha",
            "one of log_uniform",
        ),
        ({"lora_alpha": {"uniform": [2, 1]}}, "lora_alpha", "empty or reversed"),
        ({"lora_alpha": {"uniform": [2, 2]}}, "lora_alpha", "empty or reversed"),
        ({"lora_alpha": {"uniform": [1]}}, "lora_alpha", "two finite numbers"),
        ({"lora_alpha": {"uniform": [1, math.inf]}}, "lora_alpha", "two finite numbers"),
        ({"lora_alpha": {"uniform": ["1", "2"]}}, "lora_alpha", "two finite numbers"),
        ({"lora_alpha": {"uniform": [0, 2]}}, "lora_alpha", "a positive number"),
        ({"lora_dropout": {"log_uniform": [0, 0.5]}}, "lora_dropout", "logarithm through 0"),
        ({"lora_dropout": {"log_uniform": [-0.1, 0.5]}}, "lora_dropout", "logarithm through 0"),
        ({"lora_rank": {"uniform": [1, 8]}}, "lora_rank", "could not be converted"),
        ({"lora_rank": {"int_uniform": [1, 8.0]}}, "lora_rank", "two finite whole numbers"),
        ({"lora_rank": {"int_uniform": [True, 8]}}, "lora_rank", "two finite whole numbers"),
        ({"lora_rank": {"int_uniform": [1, 3], "grid": 4}}, "lora_rank.grid", "at most 3"),
        ({"lora_alpha": {"uniform": [1, 3], "grid": 1}}, "lora_alpha.grid", "at least 2"),
    ],
    ids=str,
)
def test_a_wrong_space_is_refused_by_its_field(space: Any, where: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of(with_space(space), "lora")
    assert where in caught.value.where
    assert said in str(caught.value)


def test_an_arm_that_is_not_there_or_has_nothing_to_search_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean sweep.space.lora"):
        space_of(with_space({"lora_rank": [4]}, arm="loora"), "loora")
    config = compose_config(["+exp=zero_shot", "+method@arms.t=tfidf", "sweep=grid"])
    config.sweep.space = {"t": {"kind": ["x"]}}
    with pytest.raises(ConfigError, match="a tfidf arm"):
        space_of(config, "t")


def test_open_keys_of_peft_and_sources_of_a_mix() -> None:
    config = compose_config(["+method@arms.v=peft", "arms.v.peft_type=VERA", "sweep=grid"])
    config.sweep.space = {"v": {"peft": {"r": [4, 8]}}}
    assert space_of(config, "v") == (Choice(field="peft.r", values=(4, 8)),)
    method = arm_with(config, "v", [("peft.r", 8)]).method
    assert method.peft == {"r": 8}  # type: ignore[attr-defined]
    config = compose_config(["+exp=instruction", "sweep=grid"])
    source = next(iter(config.arms["instruction"].sources))  # type: ignore[attr-defined]
    config.sweep.space = {"instruction": {f"sources.{source}.weight": [0.5, 2]}}
    assert space_of(config, "instruction")[0].points() == (0.5, 2.0)


def test_an_arm_with_values_is_the_arm_that_is_typed() -> None:
    typed = ["arms.lora.trainer.learning_rate=3e-4", "arms.lora.lora_rank=8"]
    config = compose_config(["+exp=lora", *typed])
    want = arm_with(config, "lora", [])
    values = [("trainer.learning_rate", 3e-4), ("lora_rank", 8)]
    assert arm_with(compose_config(["+exp=lora"]), "lora", values) == want
    assert want.trainer.learning_rate == 3e-4


def test_the_command_line_replaces_what_a_preset_searches() -> None:
    key = "sweep.space.lora.trainer.learning_rate"
    for value in ("[1e-4,3e-4]", "{uniform:[1e-4,3e-4]}"):
        config = compose_config(["+exp=sweep", f"{key}={value}", "sweep.space.lora.lora_rank=[2]"])
        rank, rate = space_of(config, "lora")
        assert rank.points() == (2,)
        assert rate.field == "trainer.learning_rate"
        assert 1e-4 <= rate.at(0.99) <= 3e-4


@settings(max_examples=60, deadline=None)
@given(
    low=st.floats(1e-7, 10),
    factor=st.floats(1.0001, 1e5),
    share=st.floats(0, 1, exclude_max=True),
    points=st.integers(2, 9),
)
def test_a_logarithmic_range_by_its_closed_form(
    low: float, factor: float, share: float, points: int
) -> None:
    d = Range(field="x", kind="log_uniform", low=low, high=low * factor, num_points=points)
    assert d.low <= d.at(share) <= d.high
    assert math.isclose(d.at(share), low * factor**share, rel_tol=5.1e-3)
    grid = d.points()
    assert (grid[0], grid[-1], len(grid)) == (d.low, d.high, points)
    for a, b in zip(grid, grid[1:], strict=False):
        assert math.isclose(b / a, factor ** (1 / (points - 1)), rel_tol=1.1e-2)


@settings(max_examples=60, deadline=None)
@given(low=st.integers(-20, 20), width=st.integers(1, 30), data=st.data())
def test_whole_numbers_come_equally_often_and_grids_have_none_twice(
    low: int, width: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(2, width + 1))
    d = Range(field="x", kind="int_uniform", low=low, high=low + width, num_points=n)
    drawn = [d.at((i + 0.5) / (width + 1)) for i in range(width + 1)]
    assert drawn == list(range(low, low + width + 1))
    assert d.at(math.nextafter(1, 0)) == low + width
    assert d.size == width + 1
    grid = d.points()
    assert len(set(grid)) == n == len(grid)
    assert list(grid) == sorted(grid)
