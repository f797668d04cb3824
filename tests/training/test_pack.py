"""Packed trials against plain peft loops of their own: losses, weights, who leaves and enters."""

import json
import math
from pathlib import Path

import pytest
import torch

import training.pack_model as pack_model
from conf.choices import Schedule
from conf.errors import MachineFailed
from tests.training.pack_cases import (
    load_adapter,
    plain_rate,
    plain_training,
    plain_weights,
    saved_weights,
    worst_gap,
)

pytestmark = pytest.mark.usefixtures("exact_norms")


def test_mixed_trials_in_float64_equal_plain_peft_loops(make_trial, run_pack):
    jobs = [make_trial(trial) for trial in range(4)]
    outcomes, told = run_pack(jobs)
    for job in jobs:
        losses, norms, model = plain_training(job)
        outcome = outcomes[job.trial]
        assert outcome.status == "done" and outcome.summary.steps == 6
        records = [r for r in told.records if r.trial == job.trial]
        assert [r.loss for r in records] == pytest.approx(losses, abs=1e-9)
        assert [r.grad_norm for r in records] == pytest.approx(norms, rel=1e-8)
        assert [r.learning_rate for r in records] == pytest.approx(
            [plain_rate(job, step) for step in range(1, 7)]
        )
        wanted = plain_weights(model)
        assert worst_gap(saved_weights(outcome), wanted) <= 1e-9
        assert max(float(t.abs().max()) for n, t in wanted.items() if "lora_B" in n) > 1e-3


def test_losses_in_float32_equal_plain_peft_loops(make_trial, run_pack):
    jobs = [make_trial(trial, dtype="float32", steps=10) for trial in range(4)]
    _, told = run_pack(jobs)
    for job in jobs:
        losses, _, _ = plain_training(job)
        assert told.losses(job.trial) == pytest.approx(losses, abs=1e-4)


def test_losses_equal_those_of_the_loop(make_trial, run_pack, run_workers):
    """The same trials by training.loop, each alone on DeepSpeed."""
    jobs = [make_trial(trial, dtype="float32") for trial in (0, 1)]
    specs = [
        {
            "method": {"kind": "lora", "lora_rank": job.method.lora_rank}
            | {"lora_alpha": job.method.lora_alpha}
            | {"target_modules": job.method.target_modules},
            "trainer": {"epochs": 9, "max_steps": 6, "batch_size": job.trainer.batch_size}
            | {"learning_rate": job.learning_rate, "schedule": job.trainer.schedule.name}
            | {"seed": job.trainer.seed, "weight_decay": 0.1, "clip_norm": 0.5, "num_points": 1},
            "job": {"model_dir": job.model_dir, "rows_path": job.rows_path},
        }
        for job in jobs
    ]
    results = run_workers(specs)
    outcomes, told = run_pack(jobs)
    for job, spec, result in zip(jobs, specs, results, strict=True):
        records = [r for r in told.records if r.trial == job.trial]
        for key in ("loss", "grad_norm", "learning_rate"):
            wanted = [r[key] for r in result["records"]]
            assert [getattr(r, key) for r in records] == pytest.approx(wanted, abs=1e-4)
        for key in ("tokens", "target_tokens", "examples", "flops"):
            assert [getattr(r, key) for r in records] == [r[key] for r in result["records"]]
        assert outcomes[job.trial].summary.probe_tokens == result["summary"]["probe_tokens"]
        alone = Path(spec["job"]["output_dir"]) / "final" / "checkpoint"
        packed = Path(outcomes[job.trial].checkpoint)
        names = {path.name for path in alone.iterdir()}
        assert names == {path.name for path in packed.iterdir()}
        settings = [json.loads((d / "adapter_config.json").read_text()) for d in (alone, packed)]
        for setting in settings:
            setting["target_modules"] = sorted(setting["target_modules"])
        assert settings[0] == settings[1]
        # Adam's first updates have the size of the rate, whichever way rounding turned a gradient.
        gap = worst_gap(saved_weights(outcomes[job.trial]), load_adapter(alone))
        assert gap <= 0.1 * job.learning_rate


def test_trials_leave_and_enter(make_trial, run_pack):
    """The others' weights are those of plain loops; the newcomer's too."""

    def judge(pack, rung):
        if rung == 0 and 0 in pack.live:
            assert set(pack.scores[0]) <= {0, 1, 2}
            pack.add(make_trial(3))
            return [0]
        return [2] if rung == 1 and 2 in pack.live else []

    jobs = [make_trial(trial) for trial in range(3)]
    outcomes, told = run_pack(jobs, rungs=(0.3, 0.6), judge=judge)
    assert {k: o.status for k, o in outcomes.items()} == {
        0: "dropped",
        1: "done",
        2: "dropped",
        3: "done",
    }
    assert [len(told.losses(trial)) for trial in range(4)] == [2, 6, 4, 6]
    for trial in (1, 3):
        losses, _, model = plain_training(make_trial(trial))
        assert told.losses(trial) == pytest.approx(losses, abs=1e-9)
        assert worst_gap(saved_weights(outcomes[trial]), plain_weights(model)) <= 1e-9


def test_all_may_leave_before_others_enter(make_trial, run_pack):
    def judge(pack, rung):
        if rung == 0 and 0 in pack.live:
            pack.drop(0)
            pack.drop(1)
            pack.add(make_trial(2))
        return []

    outcomes, told = run_pack([make_trial(0), make_trial(1)], rungs=(0.1,), judge=judge)
    losses, _, model = plain_training(make_trial(2))
    assert told.losses(2) == pytest.approx(losses, abs=1e-9)
    assert worst_gap(saved_weights(outcomes[2]), plain_weights(model)) <= 1e-9


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_diverging_trial_reaches_nobody(dtype, make_trial, run_pack, monkeypatch):
    """Weights of inf from step 3 on: bit for bit what the others are if it is dropped instead."""
    jobs = [make_trial(trial, dtype=dtype) for trial in range(3)]
    backward = pack_model.PackModel.backward
    calls = []

    def poisoned(model, parts):
        calls.append(parts)
        if len(calls) == 3:
            for name, parameter in model.named_parameters("trial_1"):
                if "lora_B" in name:
                    parameter.data.fill_(math.inf)
        return backward(model, parts)

    monkeypatch.setattr(pack_model.PackModel, "backward", poisoned)
    hurt, told = run_pack(jobs)
    monkeypatch.undo()

    assert hurt[1].status == "failed" and "trial 1, step 3: the loss is nan" in hurt[1].reason
    assert "row-" in hurt[1].reason and not hurt[1].checkpoint
    assert hurt[1].summary.steps == len(told.losses(1)) == 2
    assert hurt[1].summary.redone_tokens > 0  # of the step that failed
    whole, _ = run_pack(jobs)
    alone, _ = run_pack([jobs[0], jobs[2]])
    dropped, _ = run_pack(
        jobs, rungs=(0.5,), judge=lambda pack, rung: [1] if 1 in pack.live else []
    )
    for trial in (0, 2):
        assert hurt[trial].status == "done"
        found = saved_weights(hurt[trial])
        assert worst_gap(found, saved_weights(dropped[trial])) == 0.0
        assert worst_gap(found, saved_weights(whole[trial])) <= (
            1e-9 if dtype == "float64" else 1e-4
        )
        assert worst_gap(found, saved_weights(alone[trial])) <= (
            1e-9 if dtype == "float64" else 1e-4
        )


def test_an_absurd_rate_fails_by_itself(make_trial, run_pack):
    wild = (8, 1e30, 9.0, [], 7, 6, 1e8, Schedule.constant)
    jobs = [make_trial(0, dtype="float32"), make_trial(1, wild, dtype="float32")]
    outcomes, told = run_pack(jobs)
    assert outcomes[1].status == "failed" and "trainer.learning_rate" in outcomes[1].reason
    assert outcomes[0].status == "done"
    losses, _, _ = plain_training(jobs[0])
    assert told.losses(0) == pytest.approx(losses, abs=1e-4)


def test_all_trials_failing(make_trial, run_pack):
    wild = (8, 1e30, 9.0, [], 7, 6, 1e8, Schedule.constant)
    outcomes, _ = run_pack([make_trial(k, wild, dtype="float32") for k in (0, 1)])
    assert [outcomes[k].status for k in (0, 1)] == ["failed"] * 2


def test_adapters_of_a_bf16_base_are_kept_in_fp32(make_trial, run_pack):
    """Their steps are smaller than bf16 tells apart, and add up all the same."""
    rate = 1e-5
    setting = (4, 8.0, rate, ["q_proj"], 0, 6, None, Schedule.constant)
    half, _ = run_pack([make_trial(0, setting, dtype="bfloat16", steps=8)])
    full, _ = run_pack([make_trial(1, setting, dtype="float32", steps=8)])
    found, wanted = saved_weights(half[0]), saved_weights(full[1])
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name, weight in wanted.items():
        if "lora_B" in name:  # begins at 0
            moved = weight.abs() > 4 * rate
            assert moved.any()
            gap = (found[name] - weight).abs()[moved] / weight.abs()[moved]
            assert float(gap.median()) < 0.1
        else:
            drawn = (found[name] - weight).abs().max()
            assert float((found[name] - found[name].bfloat16().float()).abs().max()) > 0
            assert float(drawn) < 1e-2


def test_a_full_disk_is_not_a_trials_failure(make_trial, run_pack, monkeypatch):
    """A trial that is called failed is never trained again; a disk can be emptied."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.pack.write_checkpoint", full)
    with pytest.raises(MachineFailed, match="was not saved.*No space left"):
        run_pack([make_trial(0)])
