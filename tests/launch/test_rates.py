"""A training's rate is kept, and the next plan stands on it."""

import dataclasses

import pytest

from conf.groups import TrainerConfig, ZeroConfig
from conf.methods import FullMethod, LoraMethod
from conf.records import Progress, TrainRecord
from launch.placement import Machine
from launch.rates import known_rate, noted, rate_file
from training.job import TrainJob

MACHINE = Machine(devices=2, devices_per_node=2, device="cpu", name="2 x test")
JOB = TrainJob(
    arm_name="a", method=LoraMethod(), trainer=TrainerConfig(), zero=ZeroConfig(),
    model_dir="/m", base_model="", base_model_sha256="", renderer_sha256="", prompt_sha256="",
    rows_path="", output_dir="", dtype="float32", device="cpu", threads=2, world_size=1, pad_id=0,
    usd_per_device_second=None,
)  # fmt: skip


def record(step, flops, seconds):
    return TrainRecord(
        arm="a", step=step, examples=8, tokens=9, target_tokens=1, loss=1.0, learning_rate=1e-3,
        grad_norm=None, step_seconds=seconds, device_seconds=2 * seconds, usd=None, flops=flops,
    )  # fmt: skip


def test_events_pass_and_their_rate_is_found_again(tmp_path):
    path = rate_file(tmp_path, machine=MACHINE, job=JOB)
    events = [Progress(done=0, total=9), *(record(k, 100 * k, 1 + k) for k in range(1, 20))]
    assert list(noted(events, path)) == events
    rate, date = known_rate(path)
    assert rate.seconds(flops=1000, steps=2) == pytest.approx(2 + 10)
    assert len(date) == 10


def test_nothing_is_kept_of_too_few_steps_and_a_broken_file_is_no_rate(tmp_path):
    path = rate_file(tmp_path, machine=MACHINE, job=JOB)
    assert list(noted([record(1, 5, 1.0)], path)) and known_rate(path) is None
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in ("", "[]", "{}", '{"steps": "x"}'):
        path.write_text(text)
        assert known_rate(path) is None


def test_what_changes_the_rate_changes_the_file(tmp_path):
    other = Machine(devices=2, devices_per_node=2, device="cpu", name="another")
    jobs = [
        dataclasses.replace(JOB, method=FullMethod()),
        dataclasses.replace(JOB, model_dir="/n"),
        dataclasses.replace(JOB, threads=1),
        dataclasses.replace(JOB, dtype="bfloat16"),
    ]
    paths = {rate_file(tmp_path, machine=MACHINE, job=job) for job in [JOB, *jobs]}
    assert len(paths | {rate_file(tmp_path, machine=other, job=JOB)}) == 6
    same = dataclasses.replace(JOB, arm_name="b", output_dir="/elsewhere")
    assert rate_file(tmp_path, machine=MACHINE, job=same) in paths
