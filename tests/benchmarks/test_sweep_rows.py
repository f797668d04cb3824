"""The rows of sweeps: the peer trains what we train, and what is composed of measurements is."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.groups import TrainerConfig
from conf.methods import LoraMethod
from launch.compose import compose_config
from launch.search.trials import trials_of
from tests.benchmarks import pack_memory, sweep_peer
from tests.benchmarks.comparing import Setup
from tests.benchmarks.pack_rows import _job
from tests.benchmarks.sweep_rows import sweep_makespan
from tests.benchmarks.sweep_runs import (
    ONLY_SEARCH,
    OurRun,
    PeerRun,
    compare_trial,
    grouped_batches,
    peer_trial,
)
from tests.benchmarks.training_ours import Quiet
from training.train_pack import train_pack


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_rows(count: int) -> list[dict[str, Any]]:
    """Rows of odd lengths with one to three targets at their end."""
    draw = random.Random(0)
    rows = []
    for index in range(count):
        length, targets = draw.randrange(5, 30), draw.randrange(1, 4)
        ids = [7, 8, *(draw.randrange(9, 90) for _ in range(length))]
        mask = [0] * (len(ids) - targets) + [1] * targets
        rows.append({"item_id": str(index), "input_ids": ids, "target_mask": mask})
    return rows


def make_items(count: int) -> list[dict[str, Any]]:
    """Items of three labels of one or two tokens, one of them right."""
    draw = random.Random(1)
    rows = []
    for item in range(count):
        prompt = [7, 8, *(draw.randrange(9, 90) for _ in range(draw.randrange(4, 15)))]
        for label, ids in enumerate(([11], [12, 13], [14])):
            mask = [0] * len(prompt) + [1] * len(ids)
            row = {"item_id": f"i{item}", "input_ids": prompt + ids, "target_mask": mask}
            rows.append(row | {"label": label, "is_reference": label == item % 3})
    return rows


@dataclasses.dataclass(slots=True)
class Told(Quiet):
    """Keeps what is reported."""

    records: list[Any] = dataclasses.field(default_factory=list)

    def report(self, record: Any) -> None:
        self.records.append(record)


def test_the_peer_trains_and_scores_what_a_pack_does(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", make_rows(21))
    items = write_lines(tmp_path / "items.jsonl", make_items(7))
    typed = [*ONLY_SEARCH, "trainer.batch_size=4", "sweep.trials=3", "trainer.seed=5"]
    trials = trials_of(compose_config(typed), "lora")
    assert len({trial.arm.training.lora_rank for trial in trials}) > 1  # type: ignore[union-attr]
    setup = Setup(model_dir=tiny_model_dir, data=None, engine="", threads=1)
    jobs = []
    for trial in trials:
        assert isinstance(trial.arm.training, LoraMethod)
        made = _job(setup, trial=trial.number, output_dir=tmp_path / "ours")
        own = {"method": trial.arm.training, "trainer": trial.arm.trainer, "rows_path": str(rows)}
        jobs.append(dataclasses.replace(made, **own))  # type: ignore[arg-type]
    told = Told()
    outcomes = train_pack(
        jobs, told, rung_rows_path=items, rungs=(1.0,), judge=lambda pack, rung: None
    )
    message = {
        "model_dir": str(tiny_model_dir), "rows": str(rows), "items": str(items), "threads": 1,
        "micro_batch": 3, "clip_norm": TrainerConfig().clip_norm, "output_dir": str(tmp_path),
    }  # fmt: skip
    lengths = [len(row["input_ids"]) for row in make_rows(21)]
    for trial, outcome in zip(trials, outcomes, strict=True):
        sweep_peer.run_trial(message, peer_trial(trial, lengths, is_grouped=False))
        peer = json.loads((tmp_path / f"trial-{trial.number}.json").read_text())
        losses = [r.loss for r in told.records if getattr(r, "trial", None) == trial.number]
        assert len(losses) == len(peer["losses"]) == 12  # two epochs of 6 batches
        assert losses == pytest.approx(peer["losses"], abs=1e-5)
        assert list(outcome.scores[-1].per_item) == peer["right"]
        assert peer["tokens"] == 2 * sum(lengths)
        assert peer["scored_tokens"] == sum(len(row["input_ids"]) for row in make_items(7))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 7), st.integers(1, 30))
def test_grouped_batches_hold_each_row_once_an_epoch(
    lengths: list[int], size: int, steps: int
) -> None:
    batches = grouped_batches(lengths, size, seed=3, steps=steps)
    assert len(batches) == steps
    per_epoch = -(-len(lengths) // size)
    for start in range(0, steps - per_epoch + 1, per_epoch):
        epoch = batches[start : start + per_epoch]
        assert sorted(row for batch in epoch for row in batch) == list(range(len(lengths)))
        spans = sorted((min(own), max(own)) for own in ([lengths[k] for k in b] for b in epoch))
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


def our_run(
    losses: dict[int, list[float]], *, scored: int = 100, right: tuple[float, ...] = (1.0, 0.0)
) -> OurRun:
    """Trials of steps of 10 tokens, each scored at its last step."""
    records: list[dict[str, Any]] = []
    for trial, of in losses.items():
        records += [
            {"type": "TrainRecord", "trial": trial, "tokens": 10, "loss": loss} for loss in of
        ]
        records.append(
            {"type": "RungRecord", "trial": trial, "step": len(of), "per_item": list(right),
             "tokens": scored}
        )  # fmt: skip
    records += [
        {"type": "LedgerLine", "purpose": "agreement", "tokens": 7},
        {"type": "LedgerLine", "purpose": "sweep", "tokens": 9999},  # the same rows, as a bill
    ]
    return OurRun(seconds=1.0, stages={}, records=tuple(records), rows=Path(), items=Path())


def test_tokens_are_rows_trained_scored_and_probed() -> None:
    run = our_run({0: [1.0] * 5, 1: [1.0] * 2, 2: [1.0] * 2})
    assert run.tokens == 9 * 10 + 3 * 100 + 7
    assert run.grid_tokens == 3 * (5 * 10 + 100)


@pytest.mark.parametrize(
    ("step", "gap", "is_ok"), [(0, 9e-5, True), (9, 2e-4, False), (10, 2e-4, True)]
)
def test_losses_are_judged_while_rounding_is_all_that_differs(
    step: int, gap: float, is_ok: bool
) -> None:
    losses = [1.0] * 12
    theirs = [*losses[:step], 1.0 + gap, *losses[step + 1 :]]
    peer = {"trial": 4, "losses": theirs, "right": [1.0, 1.0]}
    found = compare_trial(our_run({4: losses}), peer)
    assert found.parity.ok is is_ok
    assert found.gaps[step] == pytest.approx(gap) and sum(map(bool, found.gaps)) == 1
    assert found.differing_items == 1


def test_a_trial_that_was_dropped_is_no_parity() -> None:
    run = our_run({0: [1.0] * 3})
    with pytest.raises(ValueError, match="shorter"):
        compare_trial(run, {"trial": 0, "losses": [1.0] * 2, "right": [1.0, 0.0]})


def test_more_trials_take_rays_own_seconds_once() -> None:
    # Ray starts in 5 s and ends in 2; two trials at a time, of 20 s, on a clock that began at 1000
    starts = (1005.0, 1005.0, 1025.0, 1025.0)
    trials = {
        k: {"marks": [t, t + 4, t + 15, t + 20], "tokens": 30, "scored_tokens": 4}
        for k, t in enumerate(starts)
    }
    run = PeerRun(seconds=47.0, trials=trials)
    assert run.seconds_of(4) == 47.0
    assert run.seconds_of(16) == 5 + 8 * 20 + 2
    assert run.stages() == {"load": 4.0, "train": 11.0, "score": 5.0}
    assert run.tokens == 4 * 34


@pytest.mark.slow
def test_both_sides_of_the_memory_row_take_the_same_step(tiny_model_dir: Path) -> None:
    case = pack_memory.Case(
        side="ours", model_dir=str(tiny_model_dir), data=None, threads=1, steps=2
    )
    ours = pack_memory.measure_in_child(case)
    peer = pack_memory.measure_in_child(dataclasses.replace(case, side="peer"))
    assert ours["tokens"] == peer["tokens"] > 0
    assert ours["loss"] == pytest.approx(peer["loss"], abs=1e-5)
    assert all(found["peak_bytes"] >= found["loaded_bytes"] > 0 for found in (ours, peer))


@pytest.mark.slow
def test_the_makespan_row_end_to_end(tiny_model_dir: Path) -> None:
    setup = Setup(
        model_dir=tiny_model_dir, data=None, engine="forest", threads=1, items=2, rounds=1
    )
    (row,) = sweep_makespan(setup)
    assert row.parity.ok and row.parity.checked == 2
    assert row.more["parity_trial"]["items_answered_otherwise"] == 0
    assert len(row.more["accuracy"]["ours"]) == len(row.more["accuracy"]["peer"]) == 8
    stages = row.more["ours_stages"][0]
    assert sum(stages.values()) == pytest.approx(row.more["seconds"]["ours"][0])
    assert min(stages.values()) > 0
