"""Packed trials over three workers: losses, weights, scores and tokens are those of one."""

from pathlib import Path

import pytest

from tests.training.pack_cases import (
    load_adapter,
    plain_training,
    plain_weights,
    saved_weights,
    worst_gap,
)

pytestmark = [pytest.mark.all_cores, pytest.mark.usefixtures("exact_norms")]

WORKERS = 3  # into which none of the batches of 4, 6 and 9 goes at the end of an epoch
RUNGS = [0.3, 1.0]
DROP = {"0": [3]}


@pytest.fixture(scope="module")
def groups(run_pack_group):
    cases = [
        {"name": "whole", "trials": [0, 1, 2, 3], "rungs": RUNGS, "drop": DROP},
        {"name": "starved", "trials": [0, 1, 2, 3], "rungs": RUNGS, "drop": DROP, "starved": 1},
        {"name": "stopped", "trials": [0, 1, 2, 3], "rungs": RUNGS, "drop": DROP, "stop_after": 3},
        {"name": "hopeless", "trials": [0, 1], "starved": 1, "memory_for": 0},
        {"name": "full", "trials": [0, 1], "rungs": RUNGS, "full": 0},
    ]
    return run_pack_group(cases, world_size=WORKERS)


@pytest.fixture
def alone(make_trial, run_pack):
    """The same pack with one worker."""
    return run_pack([make_trial(trial) for trial in range(4)], RUNGS, judge=dropped)


def dropped(pack, rung):
    return [trial for trial in DROP.get(str(rung), ()) if trial in pack.live]


def losses(found, trial):
    return [record["loss"] for record in found["records"] if record["trial"] == trial]


@pytest.mark.parametrize("name", ["whole", "starved"])
def test_losses_and_weights_equal_plain_peft_loops(groups, make_trial, name):
    first, *others = groups[name]
    assert {t: o["status"] for t, o in first["outcomes"].items()} == {
        "0": "done",
        "1": "done",
        "2": "done",
        "3": "dropped",
    }
    for trial in range(3):
        wanted, _, model = plain_training(make_trial(trial))
        assert losses(first, trial) == pytest.approx(wanted, abs=1e-9)
        saved = load_adapter(Path(first["outcomes"][str(trial)]["checkpoint"]))
        assert worst_gap(saved, plain_weights(model)) <= 1e-9
    assert not any(other["records"] or other["notes"] for other in others), "one worker tells"


def test_scores_tokens_and_outcomes_are_those_of_one_worker(groups, alone):
    outcomes, told = alone
    first = groups["whole"][0]
    for trial, outcome in outcomes.items():
        found = first["outcomes"][str(trial)]
        assert found["scored_tokens"] == outcome.scored_tokens
        assert len(found["scores"]) == len(outcome.scores) > 0
        for mine, other in zip(found["scores"], outcome.scores, strict=True):
            assert mine["per_item"] == pytest.approx(other.per_item)
            assert mine["tie_break"] == pytest.approx(other.tie_break, abs=1e-9)
            assert mine["tokens"] == other.tokens
        for key in ("steps", "examples", "target_tokens", "probe_tokens", "trained_parameters"):
            assert found["summary"][key] == getattr(outcome.summary, key)
        assert found["summary"]["world_size"] == WORKERS
    for mine, other in zip(first["records"], told.records, strict=True):
        assert (mine["trial"], mine["step"], mine["examples"]) == (
            other.trial,
            other.step,
            other.examples,
        )
        assert mine["tokens"] >= other.tokens, "a common prefix is computed by each worker"
        assert len(mine["peak_memory_bytes"]) == WORKERS


def test_all_workers_know_the_same(groups):
    """What a judge decides by: it is asked on each of them."""
    for found in (groups["whole"], groups["starved"]):
        seen = [
            {
                trial: (
                    o["status"],
                    o["scores"],
                    o["scored_tokens"],
                    o["summary"]["device_seconds"],
                )
                for trial, o in worker["outcomes"].items()
            }
            for worker in found
        ]
        assert seen[0] == seen[1] == seen[2]


def test_memory_that_runs_out_on_one_worker_is_billed_and_told_to_none_else(groups):
    whole, starved = (groups[name][0]["outcomes"] for name in ("whole", "starved"))
    redone = [o["summary"]["redone_tokens"] for o in starved.values()]
    assert sum(redone) > 0 == sum(o["summary"]["redone_tokens"] for o in whole.values())
    assert [w["outcomes"]["0"]["summary"]["redone_tokens"] for w in groups["starved"]] == [
        redone[0]
    ] * WORKERS


def test_stopped_with_three_workers_it_goes_on_with_one(groups, make_trial, run_pack):
    first, *others = groups["stopped"]
    assert [found["error"][0] for found in (first, *others)] == ["TrainingStopped"] * WORKERS
    jobs = [make_trial(trial, output_dir=first["output_dir"]) for trial in range(4)]
    outcomes, told = run_pack(jobs, RUNGS, judge=dropped)
    assert outcomes[3].status == "dropped"
    for trial in range(3):
        wanted, _, model = plain_training(make_trial(trial))
        taken = losses(first, trial) + told.losses(trial)
        assert taken == pytest.approx(wanted, abs=1e-9)
        assert worst_gap(saved_weights(outcomes[trial]), plain_weights(model)) <= 1e-9


def test_what_one_worker_cannot_do_ends_all_of_them(groups):
    """The one says why; a full disk is the first one's alone, and all are told."""
    hopeless = [found["error"] for found in groups["hopeless"]]
    assert [kind for kind, _ in hopeless] == ["PeerLost", "JobFailed", "PeerLost"]
    assert "micro_batch_size=1" in hopeless[1][1]
    full = [found["error"] for found in groups["full"]]
    assert full == [full[0]] * WORKERS
    assert full[0][0] == "MachineFailed" and "No space left" in full[0][1]
