"""What a step is said to have achieved, against counts of its own rows."""

import pytest
import torch
import torch.distributed as dist

from conf.groups import TrainerConfig, ZeroConfig
from conf.methods import FullMethod, LoraMethod
from conf.records import RenderedExample
from training.estimate import model_size
from training.flops import PassShape, train_cost
from training.job import TrainJob
from training.packing import Layout
from training.sharding import Step
from training.telemetry import Telemetry, product_peak


def row(ids, targets):
    mask = (0,) * (len(ids) - targets) + (1,) * targets
    return RenderedExample(item_id="", input_ids=tuple(ids), target_mask=mask)


ROWS = [row([1, 2, 3, 4, 5], 1), row([1, 2, 3, 9], 1), row([7, 8, 6], 2)]
STEP = Step(step=1, rows=(0, 1, 2), shares=(((0, 1), ()), ((2,), ())))


def layout(*, is_packed, shares_prefix):
    return Layout(
        is_packed=is_packed, shares_prefix=shares_prefix, max_rows=8, max_tokens=99, reason=""
    )


@pytest.fixture(scope="module")
def alone():
    """A group of one worker."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def telemetry_of(base_dir, method):
    job = TrainJob(
        arm_name="a", method=method, trainer=TrainerConfig(), zero=ZeroConfig(),
        model_dir=str(base_dir), base_model="", base_model_sha256="", renderer_sha256="",
        prompt_sha256="", rows_path="", output_dir="", dtype="float32", device="cpu", threads=1,
        world_size=1, pad_id=0, usd_per_device_second=None,
    )  # fmt: skip
    return Telemetry(job, rows=ROWS, device="cpu")


@pytest.mark.parametrize("method", [FullMethod(), LoraMethod(lora_rank=3)])
def test_operations_of_a_step_are_those_of_its_passes(method, base_dir, alone):
    found = telemetry_of(base_dir, method)
    cost = train_cost(method, size=model_size(base_dir))
    # Rows 0 and 1 share [1, 2, 3], but a token that predicts a target stays in its row: 2 shared.
    packed = cost.flops(PassShape(tokens=7, pairs=3 + 3 * 2 + 6 + 2 * 2 + 3, targets=2))
    alone_ = cost.flops(PassShape(tokens=3, pairs=6, targets=2))
    whole = cost.flops(PassShape(tokens=9, pairs=15 + 10, targets=2))
    shared = layout(is_packed=True, shares_prefix=True)
    assert found.flops(STEP, layout=shared) == packed + alone_
    for other in (
        layout(is_packed=True, shares_prefix=False),
        layout(is_packed=False, shares_prefix=False),
    ):
        assert found.flops(STEP, layout=other) == whole + alone_


def test_share_of_the_peak_and_memory(base_dir, alone):
    found = telemetry_of(base_dir, FullMethod())
    flops = int(found.peak_flops_per_second)
    assert found.share_of_peak(flops, seconds=2.0) == pytest.approx(0.5, rel=1e-6)
    assert found.share_of_peak(None, seconds=2.0) is None
    (memory,) = found.peak_memory_bytes()
    assert memory > 50e6  # torch alone is larger


def test_the_peak_is_that_of_a_product(base_dir):
    """A sane processor does between 1 GFLOP/s and 100 TFLOP/s."""
    assert 1e9 < product_peak("cpu", dtype="float32") < 1e14
    assert torch.get_num_threads() >= 1
