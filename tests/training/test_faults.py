"""Training that is killed, stopped, starved of memory or of disk, against one that is left alone.

Real processes and real signals; see forks.py for what can be made to fail.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.waiting import HANG_SECONDS

pytestmark = pytest.mark.all_cores

ROOT = Path(__file__).parents[2]
STEPS = 8
POINTS_OF_A_SAVE = ("gathering", "written", "manifest synced")


@pytest.fixture(scope="module")
def forker(tmp_path_factory):
    """The process that forks workers, with everything imported."""
    environment = dict(os.environ) | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    errors = tmp_path_factory.mktemp("forker") / "stderr"
    with errors.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forks.py"))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        )
        yield process
        process.stdin.close()
        assert process.wait(timeout=HANG_SECONDS) == 0, errors.read_text()[-4000:]


@pytest.fixture(scope="module")
def run_cases(forker, tmp_path_factory):
    """run_cases(cases) -> {name: {"codes", "ranks": [result or None], "logs"}}."""

    def run(cases):
        directory = tmp_path_factory.mktemp("cases")
        (directory / "cases.json").write_text(json.dumps(cases))
        forker.stdin.write(f"{directory / 'cases.json'}\n")
        forker.stdin.flush()
        assert forker.stdout.readline().strip().endswith("done")
        return {case["name"]: _result(directory / case["name"]) for case in cases}

    return run


def _result(directory):
    codes = {int(k): v for k, v in json.loads((directory / "codes.json").read_text()).items()}
    paths = [directory / f"{rank}.json" for rank in sorted(codes)]
    ranks = [json.loads(p.read_text()) if p.exists() else None for p in paths]
    logs = [(directory / f"{rank}.log").read_text()[-3000:] for rank in sorted(codes)]
    return {"codes": codes, "ranks": ranks, "logs": logs}


@pytest.fixture(scope="module")
def make_spec(base_dir, rows_path, tmp_path_factory):
    """make_spec(name, kind=..., stage=..., ...) -> the job of a case; a name is a directory."""
    root = tmp_path_factory.mktemp("outputs")

    def spec(name, *, kind="full", stage=0, dtype="float32", method=None, **trainer):
        return {
            "method": {"kind": kind, **(method or {})},
            "trainer": {
                "max_steps": STEPS,
                "epochs": 100,
                "batch_size": 6,
                "learning_rate": 3e-3,
                "num_points": 1,
                "state_every_steps": 1,
                **trainer,
            },
            "zero": {"stage": stage},
            "job": {
                "model_dir": str(base_dir),
                "rows_path": str(rows_path),
                "output_dir": str(root / name),
                "dtype": dtype,
            },
        }

    return spec


def case(name, spec, *, workers=2, **faults):
    return {
        "name": name,
        "world_size": workers,
        "job": json.loads(json.dumps(spec)),
        "faults": faults,
    }


def records(result):
    """What must not differ: everything but times."""
    kept = ("step", "examples", "tokens", "target_tokens", "loss", "learning_rate", "grad_norm")
    return [[r[key] for key in kept] for r in result["ranks"][0]["records"]]


def weights(spec):
    directory = Path(spec["job"]["output_dir"]) / "final" / "checkpoint"
    (path,) = directory.glob("*.safetensors")
    return load_file(path)


def assert_same_weights(one, two):
    assert one.keys() == two.keys()
    assert all((one[name] == two[name]).all() for name in one)


def summary(result):
    """The summary without what depends on this attempt's time and process."""
    found = dict(result["ranks"][0]["summary"])
    for key in ("device_seconds", "peak_memory_bytes"):
        found.pop(key)
    return found


def notes(result):
    return [p["note"] for p in result["ranks"][0]["progress"]]


def all_fine(results):
    for name, result in results.items():
        assert set(result["codes"].values()) == {0}, (name, result["codes"], result["logs"])


DROPOUT = {"lora_dropout": 0.3}
KINDS = {
    "full_0": {"stage": 0},
    "full_1": {"stage": 1},
    "full_2": {"stage": 2},
    "full_3": {"stage": 3},
    "lora_dropout_0": {"kind": "lora", "stage": 0, "method": DROPOUT},
    "lora_dropout_3": {"kind": "lora", "stage": 3, "method": DROPOUT},
    "bf16_0": {"stage": 0, "dtype": "bfloat16"},
    "bf16_2": {"stage": 2, "dtype": "bfloat16"},
    "bf16_3": {"stage": 3, "dtype": "bfloat16"},
}


def _check_resume(kinds, run_cases, make_spec):
    cases = []
    for name, options in kinds.items():
        broken = make_spec(f"{name}-broken", **options)
        cases += [
            case(f"{name}-whole", make_spec(f"{name}-whole", **options)),
            case(f"{name}-killed", broken, kill_at=[1, 5], timeout_seconds=5),
            case(f"{name}-resumed", broken, measured=False),  # the state knows better
        ]
    results = run_cases(cases)
    for name, options in kinds.items():
        whole, killed, resumed = (results[f"{name}-{k}"] for k in ("whole", "killed", "resumed"))
        assert killed["codes"][1] == -9, killed["logs"]
        assert killed["ranks"][0] is None or killed["ranks"][0]["error"][0] == "PeerLost"
        assert set(resumed["codes"].values()) == {0}, resumed["logs"]
        assert "resumed at step 4" in notes(resumed)
        assert records(resumed) == records(whole)[4:]
        assert summary(resumed) == summary(whole)
        assert_same_weights(
            weights(make_spec(f"{name}-whole", **options)),
            weights(make_spec(f"{name}-broken", **options)),
        )


def test_a_killed_training_goes_on_exactly(run_cases, make_spec):
    _check_resume({"quick": {"kind": "lora", "method": DROPOUT, "stage": 2}}, run_cases, make_spec)


@pytest.mark.slow
def test_a_killed_training_goes_on_exactly_in_every_stage(run_cases, make_spec):
    _check_resume(KINDS, run_cases, make_spec)


@pytest.mark.slow
def test_a_stop_saves_and_the_number_of_workers_may_change(run_cases, make_spec):
    """2 workers, then 1, then 2, on other ZeRO stages: the losses of one that never stopped."""
    whole = make_spec("elastic-whole", stage=0, state_every_steps=None)
    moved = [make_spec("elastic", stage=stage, state_every_steps=None) for stage in (2, 0, 3)]
    results = run_cases(
        [
            case("whole", whole),
            case("first", moved[0], stop_at=3),
            case("second", moved[1], workers=1, stop_at=6),
            case("third", moved[2]),
        ]
    )
    all_fine(results)
    for name, step in (("first", 3), ("second", 6)):
        assert {r["error"][0] for r in results[name]["ranks"]} == {"TrainingStopped"}
        assert f"{step} steps" in results[name]["ranks"][0]["error"][1]
    assert "resumed at step 6" in notes(results["third"])
    found = [r for name in ("first", "second", "third") for r in records(results[name])]
    expected = records(results["whole"])
    assert [(r[0], r[1], r[3]) for r in found] == [(r[0], r[1], r[3]) for r in expected]
    assert [r[4] for r in found] == pytest.approx([r[4] for r in expected], abs=1e-5)
    for key in ("examples", "target_tokens"):  # tokens: a pass shares its prefix, and they differ
        assert summary(results["third"])[key] == summary(results["whole"])[key]
    ours, theirs = weights(moved[0]), weights(whole)
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) < 1e-4


OOM_PLACES = ((1, "backward"), (0, "forward"), (0, "backward"), (1, "forward"))


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_out_of_memory_halves_the_passes_of_all_workers(everything, run_cases, make_spec):
    """One of two workers runs out with 3 rows in a pass: batch, loss and weights stay the same."""
    places = OOM_PLACES[1:] if everything else OOM_PLACES[:1]
    whole = make_spec(f"oom-{everything}-whole")
    cases = [case("whole", whole)]
    for stage, place in places:
        spec = make_spec(f"oom-{stage}-{place}", stage=stage)
        cases.append(case(f"{stage}-{place}", spec, oom=[1, 4, 2, place]))
    results = run_cases(cases)
    all_fine(results)
    expected = records(results["whole"])
    for stage, place in places:
        result = results[f"{stage}-{place}"]
        assert [r[0:2] for r in records(result)] == [r[0:2] for r in expected]
        assert [r[4] for r in records(result)] == pytest.approx([r[4] for r in expected], abs=1e-5)
        assert any("step 4: at most 1 rows" in note for note in notes(result)), notes(result)
        assert summary(result)["redone_tokens"] > 0
        assert summary(result)["examples"] == summary(results["whole"])["examples"]


@pytest.mark.slow
def test_out_of_memory_with_one_row_is_the_end(run_cases, make_spec):
    result = run_cases([case("alone", make_spec("oom-alone"), oom=[1, 4, 0, "forward"])])["alone"]
    for rank in result["ranks"]:
        kind, message = rank["error"]
        assert kind == "JobFailed" and "step 4" in message and "single row" in message


@pytest.mark.slow
def test_out_of_memory_between_collectives_starts_again_with_smaller_passes(run_cases, make_spec):
    whole, spec = make_spec("oom3-whole", stage=3), make_spec("oom3", stage=3)
    results = run_cases(
        [
            case("whole", whole),
            case("starved", spec, oom=[1, 4, 2, "forward"], timeout_seconds=3),
            case("again", spec, oom=[1, 4, 2, "forward"]),
        ]
    )
    kind, message = results["starved"]["ranks"][1]["error"]
    assert kind == "WorkerLost" and "at most 1 rows" in message
    all_fine({"again": results["again"]})
    assert "resumed at step 3" in notes(results["again"])
    expected = [r[4] for r in records(results["whole"])][3:]
    assert [r[4] for r in records(results["again"])] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_full_disk(run_cases, make_spec):
    """States are three times a checkpoint: the limit stops the states, or both."""
    states, both = make_spec("disk-states"), make_spec("disk-both")
    results = run_cases(
        [
            case("whole", make_spec("disk-whole")),
            case("states", states, file_limit=[5, 600_000]),
            case("both", both, file_limit=[STEPS, 50_000]),
            case("freed", both),
        ]
    )
    all_fine(results)
    assert records(results["states"]) == records(results["whole"])
    assert sum("not saved" in note for note in notes(results["states"])) == 3  # steps 5, 6, 7
    kept = sorted(p.name for p in (Path(states["job"]["output_dir"]) / "state").iterdir())
    assert kept == ["step-000003", "step-000004"]
    for rank in results["both"]["ranks"]:
        kind, message = rank["error"]
        assert kind == "JobFailed" and both["job"]["output_dir"] in message
        assert "bytes" in message and "free" in message
    final = Path(both["job"]["output_dir"]) / "final"
    assert [p.name for p in final.iterdir()] == ["checkpoint"]  # from the attempt after
    assert "resumed at step 7" in notes(results["freed"])
    assert records(results["freed"]) == records(results["whole"])[7:]


def test_damaged_states(run_cases, make_spec):
    one, every = make_spec("damaged-one"), make_spec("damaged-all")
    first = [case(f"stop-{i}", spec, workers=1, stop_at=5) for i, spec in enumerate((one, every))]
    all_fine(run_cases(first))
    for spec, count in ((one, 1), (every, 2)):
        states = sorted((Path(spec["job"]["output_dir"]) / "state").glob("step-*"), reverse=True)
        for path in states[:count]:
            _flip(next(path.glob("*.safetensors")), 5000)
    results = run_cases([case("one", one, workers=1), case("every", every, workers=1)])
    assert "resumed at step 4" in notes(results["one"])
    assert any("step-000005" in n and "passed over" in n for n in notes(results["one"]))
    kind, message = results["every"]["ranks"][0]["error"]
    assert kind == "JobFailed" and "no state is whole" in message
    assert results["every"]["ranks"][0]["records"] == []


def _flip(path, place):
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.slow
@pytest.mark.parametrize("stage", (0, 2, 3))
def test_gradients_that_are_not_numbers_are_never_saved(stage, run_cases, make_spec):
    """On one worker alone, with a finite loss: all stop, and the state before goes on without."""
    spec, name = make_spec(f"nan-{stage}", stage=stage), f"nan-{stage}"
    results = run_cases([case(name, spec, nan_at=[1, 4]), case(f"{name}-again", spec)])
    for rank in results[name]["ranks"]:
        kind, message = rank["error"]
        assert kind == "JobFailed" and "step 4: the gradient norm" in message
    assert "resumed at step 3" in notes(results[f"{name}-again"])
    all_fine({name: results[f"{name}-again"]})
    assert all(bool(tensor.isfinite().all()) for tensor in weights(spec).values())


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_inside_a_save(everything, run_cases, make_spec):
    """SIGKILL at 3 points of a save x 3 ZeRO stages x each worker: all go on, all end equal."""
    places = list(itertools.product((1, 2, 3), POINTS_OF_A_SAVE, (0, 1)))
    places = places if everything else [(2, "gathering", 1)]
    stages = sorted({stage for stage, *_ in places})
    kind = "every" if everything else "some"
    wholes = {stage: make_spec(f"{kind}-save-{stage}", stage=stage) for stage in stages}
    cases = [case(f"whole-{stage}", spec) for stage, spec in wholes.items()]
    broken = {}
    for stage, point, victim in places:
        name = f"{kind}-{stage}-{point.replace(' ', '_')}-{victim}"
        broken[name] = make_spec(name, stage=stage)
        fault = {"kill_in_save": [victim, 5, point], "timeout_seconds": 4}
        cases += [case(f"{name}-killed", broken[name], **fault), case(name, broken[name])]
    results = run_cases(cases)
    recovered = 0
    for (stage, point, victim), (name, spec) in zip(places, broken.items(), strict=True):
        assert results[f"{name}-killed"]["codes"][victim] == -9, (name, point)
        result = results[name]
        assert set(result["codes"].values()) == {0}, result["logs"]
        (resumed,) = [n for n in notes(result) if n.startswith("resumed")]
        step = int(resumed.split()[-1])
        assert step in (4, 5)
        assert records(result) == records(results[f"whole-{stage}"])[step:]
        assert_same_weights(weights(spec), weights(wholes[stage]))
        recovered += 1
    assert recovered == (18 if everything else 1)


@pytest.mark.slow
def test_a_hung_worker_ends_the_attempt(run_cases, make_spec):
    spec = make_spec("hung")
    results = run_cases(
        [case("hung", spec, hang_at=[1, 4], timeout_seconds=3), case("after", spec)]
    )
    kind, message = results["hung"]["ranks"][0]["error"]
    assert kind == "PeerLost" and "step 4" in message
    assert results["hung"]["codes"][1] == -9  # a stopped process ends by nothing less
    all_fine({"after": results["after"]})
    assert "resumed at step 3" in notes(results["after"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_worker_that_does_not_come_to_a_collective_ends_the_attempt(stage, run_cases, make_spec):
    """It lives, and is busy elsewhere: the other names the step and ends by its timeout."""
    spec, whole = make_spec(f"away-{stage}", stage=stage), make_spec(f"all-{stage}", stage=stage)
    started = time.monotonic()
    away = run_cases([case("away", spec, stay_away_at=[1, 4], timeout_seconds=3)])["away"]
    seconds = time.monotonic() - started
    assert seconds < 3 + 5 + 20, seconds  # the timeout, what it may add, and a start
    kind, message = away["ranks"][0]["error"]
    assert kind == "PeerLost" and message.startswith("worker 0 of 2 got no answer"), message
    assert "step 4" in message
    results = run_cases([case("after", spec), case("all", whole)])
    all_fine(results)
    assert "resumed at step 3" in notes(results["after"])
    assert records(results["after"]) == records(results["all"])[3:]
    assert_same_weights(weights(spec), weights(whole))
