"""The real command, real Ray, real processes that are really killed; the scripted engine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import HANG_SECONDS

pytestmark = pytest.mark.all_cores

ROOT = Path(__file__).resolve().parent.parent.parent
SLOW = (
    *("engine.script=sleep:0.1", "task.limit.train=12", "task.limit.validation=6"),
    *("task.limit.test=20", "engine.latency_requests=2"),
)
CONTRACT_ARM_KEYS = """kind status is_same_base labels_used metric accuracy accuracy_calibrated
    macro_f1 format_validity consistency latency tokens cost by_label by_slice variance train"""
CONTRACT_SAMPLE_KEYS = """arm item_id set repeat draw paraphrase train_seed num_shots num_labels
    step call prompt_sha256 prompt_tokens cached_tokens computed_tokens completion_tokens
    label_logprobs completion answer target is_correct calibrated_answer is_correct_calibrated score
    is_format_valid group first_token_seconds total_seconds error"""


def command(root: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "launch.py"),
        "+exp=smoke",
        f"run.root={root}",
        "run.name=r",
        *overrides,
    ]


def launch(root: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(root, *overrides), capture_output=True, text=True, timeout=HANG_SECONDS, cwd=root
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers(root: Path, arm: str) -> list[dict[str, Any]]:
    found = lines(root / f"r/arms/{arm}/samples.jsonl")
    return [s for s in found if s["set"] == "test" and s["answer"] is not None]


test_answers.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smoke")
    first = launch(root)
    assert first.returncode == 0, first.stdout + first.stderr
    (root / "first.txt").write_text(first.stdout)
    return root


def test_the_run_directory_is_as_in_the_contract(done: Path) -> None:
    run = done / "r"
    for name in (
        "config.json plan.json journal.jsonl items.jsonl prompts.jsonl results.json results.csv "
        "report.html report.md arms/zero_shot/samples.jsonl arms/few_shot/samples.jsonl"
    ).split():
        assert (run / name).stat().st_size > 0, name
    assert list((run / "figures").glob("*.svg"))
    results = json.loads((run / "results.json").read_text())
    for key in "schema_version run task model arms pairs break_even recommendation ledger".split():
        assert key in results
    for arm in results["arms"].values():
        assert set(CONTRACT_ARM_KEYS.split()) <= set(arm)
    sample = lines(run / "arms/zero_shot/samples.jsonl")[0]
    assert set(CONTRACT_SAMPLE_KEYS.split()) <= set(sample)


def test_every_test_item_has_one_answer_per_arm(done: Path) -> None:
    items = [i["id"] for i in lines(done / "r/items.jsonl") if i["split"] == "test"]
    for arm in ("zero_shot", "few_shot", "tfidf"):
        assert Counter(s["item_id"] for s in test_answers(done, arm)) == Counter(items)


def test_the_ledger_names_every_arm_and_only_known_purposes(done: Path) -> None:
    from conf.records import PURPOSES

    ledger = json.loads((done / "r/results.json").read_text())["ledger"]
    assert {line["arm"] for line in ledger} >= {"zero_shot", "few_shot", "tfidf"}
    assert {line["purpose"] for line in ledger} <= set(PURPOSES)


def test_the_terminal_ends_with_the_verdict_and_the_command(done: Path) -> None:
    text = (done / "first.txt").read_text()
    assert "accuracy" in text and "Again: python launch.py +exp=smoke" in text
    assert "report.html" in text


def test_the_same_command_again_runs_nothing_and_says_the_same(done: Path) -> None:
    before = json.loads((done / "r/results.json").read_text())
    begun = time.monotonic()
    again = launch(done)
    seconds = time.monotonic() - begun
    assert again.returncode == 0
    assert "0 jobs to run" in again.stdout
    assert seconds < 60, "nothing that is there already was computed"
    after = json.loads((done / "r/results.json").read_text())
    assert after["recommendation"] == before["recommendation"]
    assert after["arms"]["few_shot"]["metric"] == before["arms"]["few_shot"]["metric"]
    cost = {n: a["cost"]["fixed_device_seconds"] for n, a in before["arms"].items()}
    assert cost == {n: a["cost"]["fixed_device_seconds"] for n, a in after["arms"].items()}
    assert all(line["is_reused"] for line in after["ledger"])
    assert all(a["spent_now_device_seconds"] == 0 for a in after["arms"].values())


@pytest.mark.slow
def test_another_run_reuses_what_is_equal(done: Path) -> None:
    other = launch(done, "run.name=other", "arms.few_shot.draw=1")
    assert other.returncode == 0, other.stdout + other.stderr
    events = lines(done / "other/journal.jsonl")
    reused = {e["job"] for e in events if e["event"] == "job_done" and e["data"]["is_reused"]}
    assert "evaluate:zero_shot" in reused and "evaluate:few_shot" not in reused


def test_status_reads_the_files_alone(done: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "launch.status", str(done / "r")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "finished with exit code 0" in shown
    assert "evaluate:zero_shot" in shown


def test_report_decides_again_under_another_volume(done: Path) -> None:
    shown = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.report",
            str(done / "r"),
            "decision.requests_per_month=7",
            "pricing=h100_hour",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    results = json.loads((done / "r/results.json").read_text())
    assert results["decision"]["requests_per_month"] == 7
    assert results["pricing"]["name"] == "h100_hour"
    assert results["pricing"]["source"]


def processes_of(root: Path) -> list[int]:
    """Processes whose command line or environment names this test's directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(root).encode() in text:
                found.append(int(entry.name))
    return found


def start_slow(root: Path) -> subprocess.Popen[str]:
    """A run whose answers take a while; returns when some of them are written."""
    process = subprocess.Popen(
        command(root, *SLOW),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=root,
        env=os.environ | {"CROSSOVER_TEST_ROOT": str(root)},
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    samples = root / "r/arms/zero_shot/samples.jsonl"
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if samples.exists() and samples.read_text().count("\n") >= 5:
            return process
        time.sleep(0.05)
    raise AssertionError(f"no answers in time: {process.communicate(timeout=5)[0]}")


def wait_until_gone(root: Path, seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while (left := processes_of(root)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose driver was killed between its answers, and the same command again."""
    root = tmp_path_factory.mktemp("killed")
    process = start_slow(root)
    process.kill()
    process.communicate()
    kept = {s["item_id"] for s in lines_so_far(root)}
    assert len(kept) >= 5
    assert not wait_until_gone(root, 60)
    again = launch(root, *SLOW)
    assert again.returncode == 0, again.stdout + again.stderr
    return root


def test_a_killed_driver_loses_nothing_and_leaves_no_process(killed: Path) -> None:
    items = [i["id"] for i in lines(killed / "r/items.jsonl") if i["split"] == "test"]
    for arm in ("zero_shot", "few_shot"):
        assert Counter(s["item_id"] for s in test_answers(killed, arm)) == Counter(items)


def test_compare_pairs_two_runs_on_items_of_the_same_content(
    done: Path, killed: Path, tmp_path: Path
) -> None:
    """40 test items of one run, 20 of the other."""
    from launch.compare import compare

    shutil.copytree(killed / "r", tmp_path / "other")
    config = json.loads((killed / "r/config.json").read_text())
    config["config"]["run"]["name"] = "other"  # both were typed with the same name
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    pairs = compare([done / "r", tmp_path / "other"])
    first, second = (
        {i["sha256"] for i in lines(root / "r/items.jsonl") if i["split"] == "test"}
        for root in (done, killed)
    )
    assert len(second) == 20 and first & second
    same = next(p for p in pairs if p.a == "r/zero_shot" and p.b == "other/zero_shot")
    assert same.n == len(first & second)


def lines_so_far(root: Path) -> list[dict[str, Any]]:
    text = (root / "r/arms/zero_shot/samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def test_ctrl_c_ends_with_130_says_how_to_go_on_and_leaves_no_process(tmp_path: Path) -> None:
    process = start_slow(tmp_path)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130, text
    assert "The same command goes on from here" in text
    assert not wait_until_gone(tmp_path, 60)


def test_a_failing_arm_is_a_failed_row_and_the_others_are_reported(tmp_path: Path) -> None:
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
    done = launch(
        tmp_path, f"plugins=[{plugin}]", "arms.few_shot.prompt=broken", "arms.few_shot.num_shots=0"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    results = json.loads((tmp_path / "r/results.json").read_text())
    assert results["arms"]["few_shot"]["status"] == "failed"
    assert "the style is broken" in results["arms"]["few_shot"]["error"]
    assert results["arms"]["few_shot"]["metric"] is None
    assert results["arms"]["zero_shot"]["status"] == "done"
    assert (tmp_path / "r/logs/evaluate-few_shot/error.json").is_file()


def test_a_budget_stops_the_run_with_code_3_and_a_partial_report(tmp_path: Path) -> None:
    done = launch(tmp_path, "budget.max_wall_seconds=0.5", "engine.script=sleep:0.05")
    assert done.returncode == 3, done.stdout + done.stderr
