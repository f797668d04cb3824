"""Room on the disk: asked for before the first step, and named where there is none."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from conf.errors import ClusterError
from training.saver import free_bytes, no_room, require_room

Usage = namedtuple("Usage", "total used free")
CHECKPOINT, STATE = 1_000, 3_000  # bytes


@pytest.fixture
def disk(monkeypatch):
    """Sets what is free, on whatever disk; keeps the directories that were asked about."""
    asked = []

    def set_free(count):
        def usage(path):
            asked.append(Path(path))
            return Usage(10**9, 10**9 - count, count)

        monkeypatch.setattr(shutil, "disk_usage", usage)
        return asked

    return set_free


def room(make_job, tmp_path, *, points=2, keep_states=2):
    job = make_job(tmp_path / "job" / "points", keep_states=keep_states)
    return require_room(job, trainee_bytes=CHECKPOINT, state_bytes=STATE, points=points)


@pytest.fixture
def make_job():
    from conf.groups import TrainerConfig, ZeroConfig
    from conf.methods import LoraMethod
    from training.job import TrainJob

    def make(output_dir, **trainer):
        return TrainJob(
            arm_name="a",
            method=LoraMethod(),
            trainer=TrainerConfig(**trainer),
            zero=ZeroConfig(),
            model_dir="",
            base_model="",
            base_model_sha256="",
            renderer_sha256="",
            prompt_sha256="",
            rows_path="",
            output_dir=str(output_dir),
            dtype="float32",
            device="cpu",
            threads=1,
            world_size=1,
            pad_id=0,
            usd_per_device_second=None,
        )

    return make


@pytest.mark.parametrize(("points", "free"), [(2, 1_999), (1, 0), (5, 4_999)])
def test_checkpoints_that_do_not_fit_are_refused(make_job, tmp_path, disk, points, free):
    disk(free)
    with pytest.raises(ClusterError) as caught:
        room(make_job, tmp_path, points=points)
    error = caught.value
    assert error.where == str(tmp_path / "job" / "points")
    assert error.found == f"{free:,} bytes free"
    assert error.expected == f"{points * 1_000:,} bytes for {points} checkpoints"
    assert error.remedy == "free some space, or write trainer.num_points=1"


def test_states_that_may_not_fit_are_a_remark_and_no_refusal(make_job, tmp_path, disk):
    # Two checkpoints, two states that are kept, and the one that is being written.
    needed = 2 * CHECKPOINT + 3 * STATE
    for free in (2 * CHECKPOINT, needed - 1):
        disk(free)
        text = room(make_job, tmp_path)
        assert text == (
            f"{free:,} bytes are free at {tmp_path / 'job' / 'points'}, states and checkpoints take"
            f" about {needed:,}: states may fail to be saved"
        )
    disk(needed)
    assert room(make_job, tmp_path) == ""
    assert room(make_job, tmp_path, keep_states=3) != ""


def test_a_resumed_training_needs_room_for_the_points_that_are_left(make_job, tmp_path, disk):
    disk(3 * STATE)
    assert room(make_job, tmp_path, points=0) == ""


def test_the_disk_is_that_of_the_directory_which_need_not_be_there_yet(tmp_path, disk):
    asked = disk(5)
    assert free_bytes(tmp_path / "not" / "yet") == 5
    (tmp_path / "there").mkdir()
    free_bytes(tmp_path / "there" / "not")
    assert asked == [tmp_path, tmp_path / "there"]


def test_a_full_disk_is_told_with_what_is_needed_and_what_is_free(tmp_path, disk):
    disk(1_234)
    text = no_room(tmp_path, 5_678, OSError(28, "No space left on device"))
    assert text == (
        f"{tmp_path} takes about 5,678 bytes, 1,234 are free there "
        "(OSError: [Errno 28] No space left on device)"
    )
