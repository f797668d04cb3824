"""Faults in mid-training, done to real processes: what an uninterrupted run leaves is left.

`make faults` runs all of them and prints what happened; one runs with every `make test`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conf.errors import BudgetReached, JobFailed
from conf.records import TrainRecord
from conf.row_meter import announced_rows
from conf.run_groups import BudgetConfig
from launch.scheduler import JobState
from tests.launch.training_bench import (
    STEPS,
    Bench,
    at_step,
    kill_worker,
    private_ray,
    without_times,
    workers_now,
)

pytestmark = pytest.mark.all_cores

Say = Callable[[str, object], None]


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with private_ray():
        yield


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A training that nothing happened to, with one worker."""
    bench = Bench(root=tmp_path_factory.mktemp("plain"), model_dir=tiny_model_dir)
    assert bench.run().status == "done"
    return bench


@pytest.fixture(scope="module")
def plain_pair(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The same with two workers."""
    root = tmp_path_factory.mktemp("pair")
    bench = Bench(root=root, model_dir=tiny_model_dir, workers=2)
    assert bench.run().status == "done"
    return bench


def require_equal(bench: Bench, plain: Bench) -> None:
    """Records and weights are those of the uninterrupted training, and the bill is whole."""
    steps = bench.steps()
    assert [s.step for s in steps] == list(range(1, STEPS + 1))
    assert without_times(steps) == without_times(plain.steps())
    assert bench.weights() == plain.weights()
    assert bench.bill("train")[0] == plain.bill("train")[0] == sum(s.tokens for s in steps)
    done = [s for _, s in bench.seen]
    tokens = {s.step: s.tokens for s in steps}
    repeated = sum(tokens[s] for s in done) - sum(tokens.values())
    # A killed worker had begun a further step: its rows are billed, and no record tells of it.
    assert bench.bill("redone")[0] >= repeated
    assert bench.bill()[0] == announced_rows(bench.directory.rows)
    assert not (bench.directory.points / "state").exists()
    assert not list(bench.directory.points.glob("stream-*"))


def tell(record_property: Say, bench: Bench, state: JobState | None = None) -> None:
    """What happened, for the table of `make faults`."""
    again = len(bench.seen) - len({s for _, s in bench.seen})
    attempts = f"{state.attempts} attempts, " if state else ""
    record_property("what", f"{attempts}resumed after steps {bench.resumed}")
    record_property("recovery_seconds", f"{bench.recovery_seconds():.1f}")
    record_property("steps_redone", again)


def test_a_worker_killed_in_mid_step(
    plain: Bench, tmp_path: Path, record_property: Say, tiny_model_dir: Path
) -> None:
    bench = Bench(root=tmp_path, model_dir=tiny_model_dir)
    state = bench.run(at_step(5, kill_worker(0)))
    assert (state.status, state.attempts) == ("done", 2)
    assert len(bench.seen) - STEPS <= 2  # steps redone
    assert len(bench.resumed) == 1 and bench.resumed[0] >= 4
    require_equal(bench, plain)
    tell(record_property, bench, state)


@pytest.mark.slow
def test_a_killed_worker_is_back_within_30_seconds(
    tmp_path: Path, record_property: Say, tiny_model_dir: Path
) -> None:
    """A promise to users, for a machine that does nothing else; most of it starts a process."""
    bench = Bench(root=tmp_path, model_dir=tiny_model_dir)
    assert bench.run(at_step(5, kill_worker(0))).status == "done"
    seconds = bench.recovered_after_seconds()
    record_property("recovery_seconds", f"{seconds:.1f}")
    assert seconds <= 30


@pytest.mark.slow
def test_a_state_every_two_steps_loses_at_most_two(
    plain: Bench, tmp_path: Path, record_property: Say, tiny_model_dir: Path
) -> None:
    bench = Bench(root=tmp_path, model_dir=tiny_model_dir, state_every_steps=2)
    state = bench.run(at_step(6, kill_worker(0), times=1))
    assert state.status == "done" and len(bench.seen) - STEPS <= 2
    require_equal(bench, plain)
    tell(record_property, bench, state)


@pytest.mark.slow
def test_sigterm_to_a_single_worker(
    plain: Bench, tmp_path: Path, record_property: Say, tiny_model_dir: Path
) -> None:
    """A preemption notice: the state is saved, so that no step is lost."""
    bench = Bench(root=tmp_path, model_dir=tiny_model_dir, state_every_steps=1000)
    state = bench.run(at_step(4, kill_worker(0, signal.SIGTERM)))
    assert (state.status, state.attempts) == ("done", 2)
    assert len(bench.seen) == STEPS and bench.resumed[0] >= 4
    require_equal(bench, plain)
    tell(record_property, bench, state)


@pytest.mark.slow
def test_a_worker_killed_at_every_start(
    tmp_path: Path, record_property: Say, tiny_model_dir: Path
) -> None:
    bench = Bench(root=tmp_path, model_dir=tiny_model_dir, state_every_steps=1000)
    killed: list[int] = []

    def act(bench: Bench, event: object) -> None:
        if not isinstance(event, TrainRecord) and getattr(event, "note", "") == "loading":
            killed.append(workers_now()[0].pid)
            os.kill(killed[-1], signal.SIGKILL)

    state = bench.run(act)
    assert (state.status, len(killed)) == ("failed", 3)
    assert "the last of 3 without progress" in state.reason and "worker 0 was lost" in state.reason
    record_property("what", f"failed: {state.reason[:150]}")


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["budget", "interrupt"])
def test_a_run_that_ends_in_mid_training_and_the_same_command_again(
    limit: str, tmp_path: Path, record_property: Say, tiny_model_dir: Path
) -> None:
    # Steps long enough that the word to stop comes in the middle of them: 12 short ones took less
    # than the quarter of a second in which it is passed on.
    bench, plain = (
        Bench(
            root=tmp_path / name,
            model_dir=tiny_model_dir,
            state_every_steps=1000,
            batch=256,
            length=96,
        )
        for name in ("halted", "plain")
    )
    assert plain.run().status == "done"

    def halt(bench: Bench) -> None:
        bench.runs.halt = KeyboardInterrupt("interrupted")

    def spend(bench: Bench) -> None:
        bench.runs.budget.spend(1e6)

    kind = BudgetReached if limit == "budget" else KeyboardInterrupt
    with pytest.raises(kind):
        bench.run(
            at_step(3, spend if limit == "budget" else halt),
            budget=BudgetConfig(max_device_seconds=1e5),
        )
    so_far = [s.step for s in bench.steps()]
    assert so_far == list(range(1, len(so_far) + 1)) and 3 <= len(so_far) < STEPS
    assert bench.run().status == "done"
    assert bench.resumed == [so_far[-1]] and len(bench.seen) == STEPS
    require_equal(bench, plain)
    tell(record_property, bench)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_one_of_two_workers_killed_in_mid_step(
    index: int, plain_pair: Bench, tmp_path: Path, record_property: Say, tiny_model_dir: Path
) -> None:
    bench = Bench(root=tmp_path, model_dir=tiny_model_dir, workers=2)
    state = bench.run(at_step(5, kill_worker(index)))
    assert (state.status, state.attempts) == ("done", 2)
    assert len(bench.seen) - STEPS <= 2
    require_equal(bench, plain_pair)
    tell(record_property, bench, state)


@pytest.mark.slow
def test_a_hung_worker_ends_by_the_collective_timeout(
    plain_pair: Bench, tmp_path: Path, record_property: Say, tiny_model_dir: Path
) -> None:
    bench = Bench(root=tmp_path, model_dir=tiny_model_dir, workers=2, timeout_seconds=15.0)
    hung: list[int] = []

    def stop(bench: Bench) -> None:
        hung.append(workers_now()[1].pid)
        os.kill(hung[0], signal.SIGSTOP)

    try:
        state = bench.run(at_step(5, stop))
    finally:
        if os.path.exists(f"/proc/{hung[0]}"):
            os.kill(hung[0], signal.SIGKILL)
    assert (state.status, state.attempts) == ("done", 2)
    require_equal(bench, plain_pair)
    tell(record_property, bench, state)


@pytest.mark.slow
def test_stopped_with_two_workers_and_resumed_with_one(
    plain: Bench, tmp_path: Path, record_property: Say, tiny_model_dir: Path
) -> None:
    bench = Bench(root=tmp_path, model_dir=tiny_model_dir, workers=2)

    def halt(bench: Bench) -> None:
        bench.runs.halt = KeyboardInterrupt("interrupted")

    with pytest.raises(KeyboardInterrupt):
        bench.run(at_step(4, halt))
    bench.workers = 1
    assert bench.run().status == "done"
    losses = [s.loss for s in bench.steps()]
    assert losses == pytest.approx([s.loss for s in plain.steps()], abs=1e-5)
    assert [s.step for s in bench.steps()] == list(range(1, STEPS + 1))
    record_property("what", f"resumed after step {bench.resumed[0]}, losses within 1e-5")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_not_tried_again(
    tmp_path: Path, record_property: Say, tiny_model_dir: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "model"
    shutil.copytree(tiny_model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    bench = Bench(root=tmp_path / "run", model_dir=broken)
    state = bench.run()
    assert (state.status, state.attempts) == ("failed", 1)
    assert isinstance(state.error, JobFailed) and "the loss is nan" in state.reason
    assert not (bench.directory.points / "final").exists()
    record_property("what", f"failed, 1 attempt: {state.reason[:60]}")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_is_full(tmp_path: Path, record_property: Say, tiny_model_dir: Path) -> None:
    bench = Bench(root=tmp_path, model_dir=tiny_model_dir)
    bench.directory.points.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(bench.directory.points)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no mounting here")
    try:
        state = bench.run()
        assert (state.status, state.attempts) == ("failed", 1)
        assert str(bench.directory.points) in state.reason
    finally:
        subprocess.run(["umount", "-l", str(bench.directory.points)], check=True)
    record_property("what", f"failed, 1 attempt: {' '.join(state.reason.split())[:150]}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", ["", '{"ray_version": "2.60.0", "checkpo', '{"ray_version": "1"}']
)
def test_damaged_notes_of_ray_train_change_nothing(
    content: str, plain_pair: Bench, tmp_path: Path, tiny_model_dir: Path, record_property: Say
) -> None:
    """Its snapshots are rewritten in place and may be torn; ours are the truth."""
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME as SNAPSHOT

    bench = Bench(root=tmp_path, model_dir=tiny_model_dir, workers=2)
    torn: list[Path] = []

    def tear(bench: Bench) -> None:
        runs = [p for p in (bench.directory.points / "ray").iterdir() if p.is_dir()]
        torn.extend(run / SNAPSHOT for run in runs)
        for path in torn:
            path.write_text(content)
        kill_worker(1)(bench)

    state = bench.run(at_step(5, tear))
    assert (state.status, state.attempts) == ("done", 2) and torn
    require_equal(bench, plain_pair)
    tell(record_property, bench, state)
