"""A pack that is stopped or killed goes on where it was, bit for bit."""

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from conf.errors import JobFailed
from tests.training.pack_cases import Told, saved_weights
from training.job import TrainingStopped
from training.state import states_directory

pytestmark = pytest.mark.usefixtures("exact_norms")
RUNGS = (0.34, 0.67, 1.0)


class Killed(Exception):
    """Stands for the end of the process."""


class KilledAt(Told):
    """Ends its process as soon as it is told of a step of the pack."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def report(self, record):
        super().report(record)
        if getattr(record, "step", None) == self.step:
            raise Killed


def drop_worst(pack, rung):
    """At the second rung the worst of the live trials leaves."""
    scores = {t: s.value for t, s in pack.scores[rung].items() if t in pack.live}
    return [min(scores, key=lambda t: (scores[t], t))] if rung == 1 else []


@pytest.fixture
def whole(make_trial, run_pack, tmp_path):
    """An uninterrupted pack of three trials."""
    jobs = [make_trial(n, output_dir=tmp_path / "whole", dtype="float32") for n in range(3)]
    return run_pack(jobs, rungs=RUNGS, judge=drop_worst)


def same(found, wanted):
    """Outcomes agree in all but seconds and places, weights bit for bit."""
    assert found.keys() == wanted.keys()
    for number, outcome in wanted.items():
        mine = found[number]
        assert (mine.status, mine.reason) == (outcome.status, outcome.reason)
        assert [replace(s, device_seconds=0.0) for s in mine.scores] == [
            replace(s, device_seconds=0.0) for s in outcome.scores
        ]
        assert mine.scored_tokens == outcome.scored_tokens
        assert mine.summary.tokens == outcome.summary.tokens
        assert mine.summary.examples == outcome.summary.examples
        if outcome.checkpoint:
            a, b = saved_weights(mine), saved_weights(outcome)
            assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize("stop_after", range(1, 6))
def test_a_stopped_pack_goes_on(stop_after, whole, make_trial, run_pack):
    jobs = [make_trial(n, dtype="float32") for n in range(3)]
    first = Told(stop_after=stop_after - 1)
    with pytest.raises(TrainingStopped) as stopped:
        run_pack(jobs, rungs=RUNGS, judge=drop_worst, told=first)
    assert stopped.value.step == stop_after
    outcomes, told = run_pack(jobs, rungs=RUNGS, judge=drop_worst)
    same(outcomes, whole[0])
    for trial in range(3):
        assert first.losses(trial) + told.losses(trial) == whole[1].losses(trial)


@pytest.mark.parametrize("killed_at", [1, 3, 4, 5, 6])
def test_a_killed_pack_repeats_no_rung(killed_at, whole, make_trial, run_pack):
    jobs = [make_trial(n, dtype="float32") for n in range(3)]
    with pytest.raises(Killed):
        run_pack(jobs, rungs=RUNGS, judge=drop_worst, told=KilledAt(killed_at))
    asked = []

    def judge(pack, rung):
        asked.append(rung)
        return drop_worst(pack, rung)

    outcomes, told = run_pack(jobs, rungs=RUNGS, judge=judge)
    same(outcomes, whole[0])
    steps_at = [3, 5, 6]  # of the rungs, in 6 steps
    done = [rung for rung, step in enumerate(steps_at) if step < killed_at]
    assert set(asked) == {0, 1, 2} - set(done)
    first = min(r.step for r in told.records)
    assert first == max([steps_at[rung] for rung in done], default=0) + 1


def test_the_state_of_another_pack_is_not_used(make_trial, run_pack):
    jobs = [make_trial(n) for n in range(2)]
    with pytest.raises(TrainingStopped):
        run_pack(jobs, rungs=RUNGS, told=Told(stop_after=2))
    _, told = run_pack([make_trial(n) for n in (0, 2)], rungs=RUNGS)
    assert min(r.step for r in told.records) == 1


@pytest.mark.parametrize("name", ["manifest.json", "trial-1.safetensors"])
def test_a_damaged_state_is_a_clear_stop(name, make_trial, run_pack, tmp_path):
    jobs = [make_trial(n) for n in range(2)]
    with pytest.raises(TrainingStopped):
        run_pack(jobs, rungs=RUNGS, told=Told(stop_after=2))
    path = states_directory(tmp_path / "out") / "pack" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(JobFailed, match="is damaged"):
        run_pack(jobs, rungs=RUNGS)


def test_a_state_holds_weights_and_moments_of_those_who_train(make_trial, run_pack, tmp_path):
    jobs = [make_trial(n) for n in range(3)]
    with pytest.raises(TrainingStopped):
        run_pack(jobs, rungs=RUNGS, judge=drop_worst, told=Told(stop_after=4))
    directory = states_directory(tmp_path / "out") / "pack"
    body = json.loads((directory / "manifest.json").read_text())
    dropped = [o["trial"] for o in body["outcomes"]]
    assert len(dropped) == 1 and set(body["totals"]) == {str(n) for n in range(3)} - {
        str(dropped[0])
    }
    for number in body["totals"]:
        names = load_file(directory / f"trial-{number}.safetensors").keys()
        kinds = {name.partition("/")[0] for name in names}
        assert kinds == {"weight", "exp_avg", "exp_avg_sq"}
