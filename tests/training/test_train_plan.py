"""The pure parts: batches, shares, learning rate, save points, DeepSpeed's configuration."""

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.choices import Schedule, ZeroStage
from conf.groups import TrainerConfig, ZeroConfig
from training.job import point_name
from training.schedule import learning_rate_at, num_steps, save_steps, steps_per_epoch
from training.sharding import epoch_order, plan_steps
from training.zero import choose_stage, deepspeed_config

lengths_lists = st.lists(st.integers(1, 90), min_size=1, max_size=70)
small = st.integers(1, 9)


def plan(lengths, *, batch_size, rows_per_pass, world_size, seed=0, epochs=1):
    per_epoch = steps_per_epoch(len(lengths), batch_size=batch_size)
    return list(
        plan_steps(
            lengths,
            batch_size=batch_size,
            fits=lambda part: len(part) <= rows_per_pass,
            world_size=world_size,
            seed=seed,
            total_steps=per_epoch * epochs,
        )
    )


@given(lengths=lengths_lists, batch_size=small, rows_per_pass=small, world_size=small)
def test_each_row_once_per_epoch_for_any_layout(lengths, batch_size, rows_per_pass, world_size):
    steps = plan(
        lengths,
        batch_size=batch_size,
        rows_per_pass=rows_per_pass,
        world_size=world_size,
        epochs=2,
    )
    dealt = [row for step in steps for share in step.shares for rows in share for row in rows]
    assert Counter(dealt) == {row: 2 for row in range(len(lengths))}
    half = len(steps) // 2
    assert sorted(row for step in steps[:half] for row in step.rows) == list(range(len(lengths)))
    for step in steps:
        assert sorted(r for share in step.shares for rows in share for r in rows) == sorted(
            step.rows
        )
        assert len(step.shares) == world_size
        assert len({len(share) for share in step.shares}) == 1  # passes are collective
        assert all(len(rows) <= rows_per_pass for share in step.shares for rows in share)
        sizes = [sum(map(len, share)) for share in step.shares]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) > rows_per_pass * (len(step.shares[0]) - 1)  # no needless pass


@given(lengths=lengths_lists, world_size=small, rows_per_pass=small, seed=st.integers(0, 9))
def test_batches_do_not_depend_on_the_layout(lengths, world_size, rows_per_pass, seed):
    one = plan(lengths, batch_size=8, rows_per_pass=8, world_size=1, seed=seed)
    other = plan(
        lengths, batch_size=8, rows_per_pass=rows_per_pass, world_size=world_size, seed=seed
    )
    assert [step.rows for step in one] == [step.rows for step in other]


@given(lengths=lengths_lists, batch_size=small, budget=st.integers(1, 300), world_size=small)
def test_no_needless_pass_where_tokens_are_limited(lengths, batch_size, budget, world_size):
    def fits(part):
        return len(part) <= 1 or sum(lengths[row] for row in part) <= budget

    steps = plan_steps(
        lengths, batch_size=batch_size, fits=fits, world_size=world_size, seed=0, total_steps=3
    )
    for step in steps:
        assert all(fits(part) for share in step.shares for part in share)
        assert Counter(r for share in step.shares for part in share for r in part) == Counter(
            step.rows
        )
        if sum(lengths[row] for row in step.rows) <= budget:
            assert {len(share) for share in step.shares} == {1}


def test_neighbours_in_length_share_a_pass():
    lengths = [10, 90] * 4
    (step,) = plan(lengths, batch_size=8, rows_per_pass=4, world_size=1)
    assert [{lengths[row] for row in part} for part in step.shares[0]] == [{90}, {10}]


def test_order_is_fixed_for_all_time():
    """A changed order would make a resumed run differ from the one it continues."""
    assert epoch_order(8, seed=0, epoch=0) == (7, 3, 2, 1, 5, 6, 0, 4)
    assert epoch_order(8, seed=0, epoch=1) != epoch_order(8, seed=0, epoch=0)
    assert epoch_order(8, seed=1, epoch=0) != epoch_order(8, seed=0, epoch=0)


@pytest.mark.parametrize(
    ("rows", "epochs", "batch", "limit", "steps"),
    [
        (240, 2.0, 8, None, 60),
        (241, 2.0, 8, None, 62),
        (240, 0.5, 8, None, 15),
        (10, 0.3, 1, None, 3),
        (3, 0.1, 8, None, 1),
        (240, 2.0, 8, 7, 7),
        (240, 2.0, 8, 700, 60),
    ],
)
def test_num_steps(rows, epochs, batch, limit, steps):
    trainer = TrainerConfig(epochs=epochs, batch_size=batch, max_steps=limit)
    assert num_steps(rows, trainer=trainer) == steps


def rates(total, schedule, warmup=0.1):
    trainer = TrainerConfig(schedule=schedule, warmup_fraction=warmup)
    return [
        learning_rate_at(step, total_steps=total, peak=2.0, trainer=trainer)
        for step in range(1, total + 1)
    ]


@given(
    total=st.integers(1, 300),
    schedule=st.sampled_from(Schedule),
    warmup=st.floats(0, 0.99, allow_nan=False),
)
def test_rates_rise_then_fall_and_are_never_zero(total, schedule, warmup):
    found = rates(total, schedule, warmup)
    top = found.index(max(found))
    assert found[top] == 2.0
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert min(found) > 0


def test_rates_by_hand():
    assert rates(5, Schedule.linear, 0.0) == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])
    assert rates(6, Schedule.linear, 0.34) == pytest.approx([2 / 3, 4 / 3, 2.0, 1.5, 1.0, 0.5])
    assert rates(3, Schedule.constant, 0.0) == [2.0, 2.0, 2.0]
    assert rates(2, Schedule.cosine, 0.0) == pytest.approx([2.0, 1.0])


@given(total=st.integers(1, 500), points=st.integers(1, 60))
def test_save_points_are_even_and_end_at_the_end(total, points):
    found = save_steps(total, num_points=points)
    assert found[-1] == total and found[0] >= 1
    assert len(found) == min(points, total)
    gaps = [b - a for a, b in zip((0, *found), found, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_point_names():
    assert point_name(13, total_steps=20) == "step-000013"
    assert point_name(20, total_steps=20) == "final"


SIZES = {0: 70 * 10**9, 1: 48 * 10**9, 2: 32 * 10**9, 3: 20 * 10**9}


def chosen(free, workers, zero=None):
    memory = None if free is None else free * 10**9
    return choose_stage(
        zero or ZeroConfig(),
        bytes_by_stage=SIZES,
        device_memory_bytes=memory,
        world_size=workers,
    )


@pytest.mark.parametrize(
    ("free", "workers", "stage", "fits"),
    [
        (100, 4, 0, True),
        (60, 4, 1, True),
        (40, 4, 2, True),
        (30, 4, 3, True),
        (19, 4, 3, False),
        (1, 1, 0, False),
        (72, 1, 0, True),
        (None, 4, 0, True),
    ],
)
def test_auto_takes_the_smallest_stage_that_fits(free, workers, stage, fits):
    found = chosen(free, workers)
    assert (found.stage, found.fits) == (stage, fits)


def test_the_reason_names_what_is_needed_and_what_the_stage_before_would_take():
    assert chosen(60, 4).reason == "stage 1: 48 GB of 60 GB; stage 0 would take 70 GB"
    assert chosen(100, 4).reason == "stage 0: 70 GB of 100 GB; all fits on each device"
    assert chosen(90, 1).reason == "stage 0: 70 GB of 90 GB; one worker, nothing to shard"
    given_stage = chosen(30, 4, ZeroConfig(stage=ZeroStage.zero2))
    assert given_stage.reason == "stage 2: 32 GB of 30 GB; as given"
    assert not given_stage.fits


def test_a_given_stage_is_kept_and_offload_means_3():
    for stage in (0, 1, 2, 3):
        assert chosen(9, 2, ZeroConfig(stage=ZeroStage(stage))).stage == stage
    assert chosen(9, 2, ZeroConfig(offload=True)).stage == 3


def test_offload_goes_to_the_disk_that_is_named():
    config = deepspeed_config(
        TrainerConfig(),
        stage=3,
        offload=True,
        dtype="bfloat16",
        device="cuda",
        world_size=2,
        nvme_path="/disk",
    )
    zero = config["zero_optimization"]
    place = {"device": "nvme", "nvme_path": "/disk", "pin_memory": True}
    assert zero["offload_param"] == place == zero["offload_optimizer"]


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_deepspeed_accepts_the_configuration(stage, dtype):
    """Unknown keys inside zero_optimization are refused by DeepSpeed's own model."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = deepspeed_config(
        TrainerConfig(clip_norm=0.7),
        stage=stage,
        offload=stage == 3,
        dtype=dtype,
        device="cuda",
        world_size=3,
    )
    parsed = DeepSpeedZeroConfig(**config["zero_optimization"])
    assert parsed.stage == stage
    assert (parsed.offload_optimizer is not None) == (stage == 3)
    assert config["bf16"]["enabled"] == (dtype == "bfloat16")
    clips_itself = stage == 0 and dtype == "float32"
    assert math.isclose(config["gradient_clipping"], 0.0 if clips_itself else 0.7)


def test_planning_needs_no_heavy_library():
    code = (
        "import sys, training.job, training.estimate, training.zero\n"
        "import training.sharding, training.packing\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'peft', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
