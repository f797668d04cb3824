"""A machine that runs out of memory in mid-training: Ray ends the worker, the training goes on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.training_bench import (
    STEPS,
    Bench,
    at_step,
    private_ray,
    without_times,
    workers_now,
)
from tests.waiting import HANG_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.all_cores]

BALLAST_BYTES = 2 * 2**30
# Ray's monitor acts above this share of the memory; what is in use now stays below it by half of
# the ballast.
HEADROOM_BYTES = BALLAST_BYTES // 2


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    memory = psutil.virtual_memory()
    if memory.available < 4 * BALLAST_BYTES:
        pytest.skip("less than 8 GB free")
    # A training's worker takes about half a GB once it has loaded torch.
    limit = (memory.total - memory.available + 2**30 + HEADROOM_BYTES) / memory.total
    asked = {
        "RAY_memory_usage_threshold": f"{limit:.4f}",
        "RAY_memory_monitor_refresh_ms": "100",
    }
    before = dict(os.environ)
    os.environ.update(asked)
    try:
        with private_ray():
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def hold_until_gone(worker: psutil.Process, freed: list[float]) -> None:
    """Fill memory until the worker is ended for it; at most a minute."""
    ballast = bytearray(BALLAST_BYTES)
    ballast[::4096] = b"1" * len(range(0, BALLAST_BYTES, 4096))  # pages that are really there
    psutil.wait_procs([worker], timeout=HANG_SECONDS)
    freed.append(time.monotonic())


def test_a_worker_ended_for_its_memory_is_started_again(
    tmp_path: Path, tiny_model_dir: Path, record_property: Callable[[str, object], None]
) -> None:
    plain = Bench(root=tmp_path / "plain", model_dir=tiny_model_dir, batch=256, length=96)
    assert plain.run().status == "done"
    bench = Bench(root=tmp_path / "pressed", model_dir=tiny_model_dir, batch=256, length=96)
    freed: list[float] = []

    def press(bench: Bench) -> None:
        (worker,) = workers_now()
        bench.killed_at = time.monotonic()
        threading.Thread(target=hold_until_gone, args=(worker, freed), daemon=True).start()

    state = bench.run(at_step(4, press))
    assert (state.status, state.attempts) == ("done", 2), state.reason
    assert freed and freed[0] - bench.killed_at <= 60
    assert any("memory" in note for note in bench.notes), bench.notes
    assert [s.step for s in bench.steps()] == list(range(1, STEPS + 1))
    assert without_times(bench.steps()) == without_times(plain.steps())
    assert bench.weights() == plain.weights()
    seconds = bench.recovered_after_seconds()
    record_property("recovery_seconds", f"{seconds:.1f}")
