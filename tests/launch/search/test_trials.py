"""Trials of a sweep: which settings, in which order, with which replicates."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest

from conf.choices import Schedule
from conf.errors import ConfigError
from conf.hashing import canonical_json, plain
from conf.resolve import resolve_arms
from conf.restore import restore_config
from conf.schema import RunConfig
from launch.compose import compose_config
from launch.search.trials import Trial, check_space, shown, trials_of

RATE = "sweep.space.lora.trainer.learning_rate"


def trials(*overrides: str, arm: str = "lora") -> tuple[Trial, ...]:
    return trials_of(compose_config(list(overrides)), arm)


def checked(*overrides: str) -> dict[str, tuple[Trial, ...]]:
    config = compose_config(list(overrides))
    return check_space(config, resolve_arms(config))


def test_a_grid_is_in_row_major_order_of_the_fields_by_name() -> None:
    space = [f"{RATE}={{log_uniform:[1e-4,1e-2],grid:3}}", "sweep.space.lora.lora_rank=[4,8]"]
    found = trials("+exp=lora", "sweep=grid", *space)
    want = list(itertools.product([4, 8], [1e-4, 1e-3, 1e-2]))
    assert [tuple(v for _, v in t.values) for t in found] == want
    assert [t.number for t in found] == [t.setting for t in found] == list(range(6))
    assert trials("+exp=lora", "sweep=grid", *reversed(space)) == found
    for trial, (rank, rate) in list(zip(found, want, strict=True))[1::3]:
        typed = compose_config(
            ["+exp=lora", f"arms.lora.lora_rank={rank}", f"arms.lora.trainer.learning_rate={rate}"]
        )
        assert plain(trial.arm) == plain(resolve_arms(typed)["lora"])
    assert found[0].label == "lora_rank=4 learning_rate=1e-4"


def test_trial_k_of_a_random_search_is_the_same_whatever_their_number() -> None:
    many = trials("+exp=sweep", "sweep.trials=40")
    assert trials("+exp=sweep", "sweep.trials=7") == many[:7]
    assert len({canonical_json(t.values) for t in many}) == 40
    other = trials("+exp=sweep", "sweep.trials=7", "sweep.seed=1")
    assert [t.values for t in other] != [t.values for t in many[:7]]


def test_random_settings_are_the_same_in_another_process() -> None:
    code = "from launch.compose import compose_config as c\n"
    code += "from launch.search.trials import trials_of\n"
    code += "print([t.label for t in trials_of(c(['+exp=sweep']), 'lora')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([t.label for t in trials("+exp=sweep")])


def test_draws_follow_their_distribution() -> None:
    found = trials("+exp=sweep", "sweep.trials=120")
    rates = sorted(float(dict(t.values)["trainer.learning_rate"]) for t in found)
    shares = [math.log(rate / 1e-4) / math.log(30) for rate in rates]
    # Kolmogorov-Smirnov against the uniform distribution; 1.63 / sqrt(n) is its 1% point.
    gap = max(abs(share - (i + 0.5) / len(shares)) for i, share in enumerate(shares))
    assert gap < 1.63 / math.sqrt(len(shares))
    ranks = [dict(t.values)["lora_rank"] for t in found]
    counts = [ranks.count(rank) for rank in (4, 8, 16, 32)]
    chi_square = sum((n - 30) ** 2 / 30 for n in counts)
    assert chi_square < 11.3, "the 1% point with 3 degrees of freedom"


def test_a_field_more_leaves_the_values_of_the_rest() -> None:
    def rates(*overrides: str) -> list[Any]:
        return [dict(t.values)["trainer.learning_rate"] for t in trials("+exp=sweep", *overrides)]

    assert rates("sweep.space.lora.trainer.epochs={uniform:[1,4]}") == rates()


def test_all_settings_of_a_finite_space_are_drawn_once() -> None:
    space = ["sweep.space.lora.lora_rank=[4,8,16]", f"{RATE}=[1e-4,1e-3]"]
    found = trials("+exp=lora", "sweep=random", "sweep.trials=6", *space)
    assert len({canonical_json(t.values) for t in found}) == 6
    assert trials("+exp=lora", "sweep=random", "sweep.trials=7", *space) == found


def test_a_range_too_narrow_for_its_trials_is_refused_not_searched_forever() -> None:
    narrow = f"{RATE}={{uniform:[0.001,0.00100000000000000045]}}"
    with pytest.raises(ConfigError, match="settings that differ"):
        trials("+exp=lora", "sweep=random", "sweep.trials=50", narrow)


def test_replicates_are_trials_of_one_setting_and_only_where_they_differ() -> None:
    base = ["+exp=lora", "sweep=grid", "sweep.replicates.seeds=2", "sweep.replicates.draws=3"]
    base += ["trainer.seed=10", "arms.lora.draw=5", "sweep.space.lora.num_shots=[0,4]"]
    found = trials(*base)
    shape = [(t.number, t.setting, t.arm.trainer.seed, t.arm.answering.draw) for t in found]
    want = [(0, 0, 10, 5), (1, 0, 11, 5)]
    want += [
        (n + 2, 1, 10 + s, 5 + d) for n, (s, d) in enumerate(itertools.product(range(2), range(3)))
    ]
    assert shape == want
    assert found[0].label == "num_shots=0"
    assert found[-1].label == "num_shots=4 +seed=1 +draw=2"
    assert found[-1].setting_label == "num_shots=4"
    config = compose_config(base)
    config.sweep.space = {"zero_shot": {"num_shots": [0, 4]}}
    assert [(t.setting, t.draw) for t in trials_of(config, "zero_shot")] == [
        (0, 0),
        (1, 0),
        (1, 1),
        (1, 2),
    ]


def test_labels_are_as_people_write_values() -> None:
    texts = [
        3e-4,
        3.12e-4,
        0.01,
        8,
        1.0,
        123456.0,
        True,
        None,
        Schedule.cosine,
        ["q", "v"],
        "a" * 30 + "b" * 11,
    ]
    want = "3e-4 3.12e-4 0.01 8 1 1.23456e5 true null cosine [q,v]".split()
    want.append("a" * 10 + "..." + "b" * 11)
    assert [shown(value) for value in texts] == want
    assert float(shown(5e-324)) >= 0
    space = ["sweep.space.lora.trainer.batch_size=[4]", "sweep.space.lora.engine.batch_size=[2]"]
    (trial,) = trials("+exp=lora", "sweep=grid", *space)
    assert trial.label == "engine.batch_size=2 trainer.batch_size=4"


@pytest.mark.parametrize(
    ("overrides", "where", "said"),
    [
        (["+exp=lora", "sweep=random"], "sweep.space", "nothing to search"),
        (["+exp=sweep", "sweep=none"], "sweep.space", "sweep=random or sweep=grid"),
        (["+exp=sweep", "sweep=grid"], "learning_rate", "without the number of points"),
        (["+exp=sweep", "sweep.space.nope.lora_rank=[1]"], "space.nope", "no arm of this run"),
        (["+exp=sweep", "sweep.budget.max_trials=7"], "max_trials", "8 settings"),
        (
            ["+exp=sweep", "sweep.replicates.seeds=5", "sweep.budget.max_trials=39"],
            "max_trials",
            "40 trials",
        ),
        (["+exp=sweep", "sweep.replicates.draws=2"], "draws", "no setting has shots"),
        (
            ["+exp=few_shot", "sweep=grid", "sweep.space.few_shot.num_shots=[4,8]"]
            + ["sweep.replicates.seeds=2"],
            "seeds",
            "trains",
        ),
        (
            ["+exp=lora", "sweep=grid", "sweep.space.lora.lora_alpha={uniform:[1,9],grid:2000}"],
            "space.lora",
            "a grid of 2000",
        ),
        (["+exp=sweep", "sweep.trials=1001"], "sweep.trials", "at most 1000"),
        (
            ["+exp=lora", "sweep=grid", "sweep.space.lora.calibration=[none,batch]"]
            + ["sweep.space.lora.normalisation=[sum,token]"],
            "space.lora",
            "calibration=batch normalisation=token",
        ),
        (
            ["+exp=zero_shot", "sweep=grid", "sweep.space.zero_shot.self_consistency=[true]"],
            "self_consistency",
            "sampled",
        ),
    ],
    ids=str,
)
def test_a_sweep_that_cannot_be_is_refused(overrides: list[str], where: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(*overrides)
    assert where in caught.value.where
    assert said in str(caught.value)


def test_what_fits_the_budget_exactly_is_taken() -> None:
    found = checked("+exp=sweep", "sweep.replicates.seeds=5", "sweep.budget.max_trials=40")
    assert {arm: len(of) for arm, of in found.items()} == {"lora": 40}
    assert checked("+exp=lora") == {}
    assert trials("+exp=lora") == ()


def test_a_stored_configuration_gives_the_same_trials() -> None:
    import json

    config = compose_config(["+exp=sweep", "sweep.replicates.seeds=2"])
    stored = json.loads(canonical_json(config))
    again = restore_config(stored)
    assert isinstance(again, RunConfig)
    assert plain(trials_of(again, "lora")) == plain(trials_of(config, "lora"))
