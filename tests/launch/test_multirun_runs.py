"""`-m` as it is typed: the real command, real Ray, the scripted engine, a real Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.launch.test_end_to_end import lines, wait_until_gone
from tests.launch.tracking.wandb_log import run_of
from tests.waiting import HANG_SECONDS

pytestmark = pytest.mark.all_cores

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ("task.limit.train=12", "task.limit.validation=8", "engine.latency_requests=2")
SWEPT = ("arms.few_shot.draw=0,1", "tracking=wandb", "tracking.wandb=offline", "task.limit.test=8")


def command(root: Path, *overrides: str, flag: str = "-m") -> list[str]:
    program = [sys.executable, str(ROOT / "launch.py"), flag, "+exp=smoke"]
    return [*program, f"run.root={root}", *SMALL, *overrides]


def launch(root: Path, *overrides: str, flag: str = "-m") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(root, *overrides, flag=flag),
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        cwd=root,
    )


def sweep_of(root: Path) -> dict[str, Any]:
    (path,) = root.glob("sweep-*/sweep.json")
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["name"] == path.parent.name
    return found


def runs_of(root: Path) -> list[Path]:
    """The directories of a sweep's runs, by their numbers."""
    runs = sweep_of(root)["runs"]
    assert [r["number"] for r in runs] == list(range(1, len(runs) + 1))
    return [root / run["run"] for run in runs]


def started(root: Path) -> Counter[str]:
    """How often each job was started, by what determines it, over all runs.

    A model's job is no part of a plan any more once the model is there, so it is left out.
    """
    counts: Counter[str] = Counter()
    for run in runs_of(root):
        keys = {j["id"]: j["key"] for j in json.loads((run / "plan.json").read_text())["jobs"]}
        events = lines(run / "journal.jsonl")
        names = [e["job"] for e in events if e["event"] == "job_started"]
        counts.update(keys[name] for name in names if not name.startswith("model:"))
    return counts


def all_keys(root: Path) -> set[str]:
    plans = [json.loads((run / "plan.json").read_text()) for run in runs_of(root)]
    return {job["key"] for plan in plans for job in plan["jobs"] if job["kind"] != "model"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    first = launch(root, *SWEPT)
    assert first.returncode == 0, first.stdout + first.stderr
    (root / "first.txt").write_text(first.stdout)
    return root


def test_equal_jobs_of_two_runs_are_computed_once(done: Path) -> None:
    assert started(done) == Counter(dict.fromkeys(all_keys(done), 1))
    events = lines(runs_of(done)[1] / "journal.jsonl")
    reused = {e["job"] for e in events if e["event"] == "job_done" and e["data"]["is_reused"]}
    assert "evaluate:zero_shot" in reused and "evaluate:few_shot" not in reused


def test_each_run_is_whole_and_the_report_has_its_numbers(done: Path) -> None:
    sweep = sweep_of(done)
    assert [r["overrides"] for r in sweep["runs"]] == [
        {"arms.few_shot.draw": "0"},
        {"arms.few_shot.draw": "1"},
    ]
    assert [(r["status"], r["exit_code"]) for r in sweep["runs"]] == [("done", 0)] * 2
    page = (done / sweep["name"] / "report.html").read_text()
    text = (done / sweep["name"] / "report.md").read_text()
    for run in runs_of(done):
        results = json.loads((run / "results.json").read_text())
        assert (run / "report.html").is_file()
        for arm in results["arms"].values():
            assert arm["status"] == "done"
            share = f"{100 * arm['metric']['value']:.1f}%"
            assert share in text and share in page
    # The zero-shot arm is the same in both runs, so it is in pairs once.
    names = {name for pair in sweep["pairs"] for name in (pair["a"], pair["b"])}
    assert names == {"1/zero_shot", "1/few_shot", "1/tfidf", "2/few_shot"}


def test_all_runs_are_one_group_in_wandb_and_tell_their_values(done: Path) -> None:
    files = list(done.glob("smoke-*/wandb/offline-run-*/*.wandb"))
    found = [run_of(path) for path in files]
    # Two runs with three arms and a summary each; what is reused is mirrored with its run.
    assert len(found) == 8
    assert {run.run_group for run in found} == {sweep_of(done)["name"]}
    drawn = Counter()  # type: ignore[var-annotated]
    for run in found:
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        drawn[config["arms.few_shot.draw"]] += 1
    assert drawn == {0: 4, 1: 4}


def test_compare_takes_the_sweeps_directory(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.compare import main

    assert main([done / sweep_of(done)["name"]]) == 0
    assert "p (Holm)" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_command_twice_and_each_run_alone_compute_nothing(done: Path) -> None:
    before = started(done)
    again = launch(done, *SWEPT, flag="--multirun")
    assert again.returncode == 0, again.stderr
    assert "0 different jobs to run" in again.stdout
    alone = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "+exp=smoke", f"run.root={done}", *SMALL]
        + ["arms.few_shot.draw=1", *SWEPT[1:]],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert "0 jobs to run" in alone.stdout and str(runs_of(done)[1]) in alone.stdout
    assert started(done) == before
    assert len(list(done.glob("sweep-*"))) == 1


@pytest.mark.slow
def test_a_run_that_fails_is_a_row_and_the_others_are_whole(tmp_path: Path) -> None:
    plugin = tmp_path / "broken_style.py"
    plugin.write_text(
        "from evaluation.plugins import prompt_style\n"
        "from evaluation.prompts import Ask, Message\n"
        "@prompt_style('broken')\n"
        "def broken(item, context):\n"
        "    if item.split == 'validation':\n"
        "        raise ValueError('the style is broken')\n"
        "    answer = yield Ask((Message('user', item.input),))\n"
        "    return answer\n"
    )
    swept = "arms.few_shot.prompt=zero_shot,broken,chain_of_thought"
    end = launch(
        tmp_path, swept, f"plugins=[{plugin}]", "arms.few_shot.num_shots=0", "task.limit.test=8"
    )
    assert end.returncode == 1, end.stdout + end.stderr
    assert [r["exit_code"] for r in sweep_of(tmp_path)["runs"]] == [0, 1, 0]
    for run, status in zip(runs_of(tmp_path), ("done", "failed", "done"), strict=True):
        arms = json.loads((run / "results.json").read_text())["arms"]
        assert {arms["zero_shot"]["status"], arms["tfidf"]["status"]} == {"done"}
        assert arms["few_shot"]["status"] == status
    text = (tmp_path / sweep_of(tmp_path)["name"] / "report.md").read_text()
    assert "the style is broken" in text and "an arm failed" in text


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path: Path) -> None:
    slow = ("engine.script=sleep:0.1", "task.limit.test=20,24")
    process = subprocess.Popen(
        command(tmp_path, *slow),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"CROSSOVER_TEST_ROOT": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if any(tmp_path.glob("sweep-*/sweep.json")):
            samples = runs_of(tmp_path)[0] / "arms/few_shot/samples.jsonl"
            if samples.exists() and samples.read_text().count("\n") >= 2:
                break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130, text
    assert "The same command goes on from here: python launch.py -m +exp=smoke" in text
    assert not wait_until_gone(tmp_path, 60)
    assert "interrupted" in {r["status"] for r in sweep_of(tmp_path)["runs"]}
    finished = {
        json.loads(path.read_text())["key"] for path in tmp_path.glob(".cache/jobs/*/done.json")
    }
    assert finished, "the first arm was over before the second began"
    before = started(tmp_path)
    again = launch(tmp_path, *slow)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [r["exit_code"] for r in sweep_of(tmp_path)["runs"]] == [0, 0]
    counts = started(tmp_path)
    assert all(counts[key] == before[key] for key in finished)
    for run, size in zip(runs_of(tmp_path), (20, 24), strict=True):
        answers = [
            s["item_id"]
            for s in lines(run / "arms/few_shot/samples.jsonl")
            if s["set"] == "test" and s["answer"] is not None
        ]
        assert len(answers) == len(set(answers)) == size
