"""Trials in W&B, read back from the .wandb files: runs, configs, keys, sums, and no texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import wandb

from conf.records import CurvePoint, Measured, TrainRecord
from conf.resolve import resolve_arms
from conf.schema import RunConfig
from conf.sweep_records import RungRecord, SweepChoice, TrialRecord
from launch.compose import compose_config
from launch.search.trials import check_space
from launch.tracking import Tracker
from tests.launch.tracking.wandb_log import history, records, run_of

SECRET = "Say whether this is unwanted mail"
SEARCHED = (
    "+exp=lora",
    "+method@arms.few_shot=few_shot",
    "sweep=grid",
    "sweep.space.lora.trainer.learning_rate=[1e-4,1e-3]",
    f"sweep.space.few_shot.instruction=['{SECRET}','Is it spam?']",
    "sweep.space.few_shot.num_shots=[4]",
    "sweep.replicates.seeds=2",
)


def composed(*more: str) -> RunConfig:
    return compose_config([*SEARCHED, *more])


def step(trial: int | None, number: int, rate: float) -> TrainRecord:
    return TrainRecord(
        arm="lora", trial=trial, step=number, examples=8, tokens=100, target_tokens=8,
        loss=1.0 / number, learning_rate=rate, grad_norm=1.0, step_seconds=0.5,
        device_seconds=0.5, usd=None,
    )  # fmt: skip


def rung(arm: str, trial: int, number: int, at: int, value: float) -> RungRecord:
    return RungRecord(
        arm=arm, trial=trial, rung=number, step=at, metric="accuracy", tokens=70,
        device_seconds=0.25, value=Measured(value=value, low=value - 0.1, high=value + 0.1, n=20),
    )  # fmt: skip


def ended(arm: str, trial: int, status: str) -> TrialRecord:
    return TrialRecord(
        arm=arm, trial=trial, setting=trial // 2, seed=0, draw=0, label="", status=status, rung=1,
        steps=3, tokens=440, device_seconds=2.0, usd=0.01,
    )  # fmt: skip


def told(tracker: Tracker, *events: Any) -> None:
    for event in events:
        tracker.event(event.arm, event, job_seconds=1.0, devices=1)


def tracked(directory: Path, *more: str) -> dict[str, Path]:
    """Two trials of lora (one dropped, one that never ends), one prompt; files by name of run."""
    config = composed(*more)
    arms = resolve_arms(config)
    tracker = Tracker(
        config=config, name="r", directory=directory, arms=arms, num_train_labels=20,
        mode="offline", group="g", searches=check_space(config, arms),
    )  # fmt: skip
    told(tracker, *(step(0, s, 1e-4) for s in (1, 2, 3)), rung("lora", 0, 0, 3, 0.6))
    told(tracker, ended("lora", 0, "unfinished"))  # it goes on after the rung
    told(tracker, step(3, 1, 1e-3), rung("lora", 3, 0, 1, 0.7), ended("lora", 3, "unfinished"))
    told(tracker, ended("lora", 0, "dropped"))
    told(tracker, step(0, 4, 1e-4))  # comes too late: its run is over
    told(tracker, rung("few_shot", 0, 0, 0, 0.5), rung("few_shot", 0, 1, 0, 0.55))
    told(tracker, ended("few_shot", 0, "done"))
    choice = SweepChoice(
        arm="lora", setting=1, trials=(2, 3), rung=1, metric="accuracy",
        value=Measured(value=0.7, n=20), trained_parameters=5,
    )  # fmt: skip
    point = CurvePoint(
        arm="lora", step=1, tokens=100, device_seconds=0.5, metric="accuracy",
        value=Measured(value=0.7, low=0.6, high=0.8, n=20),
    )  # fmt: skip
    told(tracker, choice, point)
    tracker.finish(None)
    assert tracker.warnings == []
    wandb.teardown()  # its process writes a file to the end some time after a run was finished
    files = list(directory.glob("wandb/offline-run-*/*.wandb"))
    return {run_of(f).display_name: f for f in files}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tracked(tmp_path_factory.mktemp("tracked"))


def config_of(path: Path) -> dict[str, Any]:
    """The configuration of a run, updates included."""
    found = {item.key: json.loads(item.value_json) for item in run_of(path).config.update}
    for record in records(path):
        if record.WhichOneof("record_type") == "config":
            found |= {i.key: json.loads(i.value_json) for i in record.config.update}
    return found


def summary_of(path: Path) -> dict[str, Any]:
    """The last numbers of a run."""
    found: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found


LOW, HIGH = "lora learning_rate=1e-4", "lora learning_rate=0.001 +seed=1"
PROMPT = 'few_shot instruction="instruction 1" num_shots=4'


def test_only_trials_that_began_have_a_run_and_all_are_one_group(runs: dict[str, Path]) -> None:
    assert set(runs) == {LOW, HIGH, PROMPT, "lora"}
    found = {name: run_of(path) for name, path in runs.items()}
    assert {run.run_group for run in found.values()} == {"g"}
    assert [found[n].job_type for n in (LOW, HIGH, PROMPT, "lora")] == [*["trial"] * 3, "train"]


def test_config_has_the_setting_by_field_with_numbers_as_numbers(runs: dict[str, Path]) -> None:
    low, high, prompt = (config_of(runs[name]) for name in (LOW, HIGH, PROMPT))
    assert (low["trainer.learning_rate"], high["trainer.learning_rate"]) == (1e-4, 1e-3)
    assert (low["arm"], low["kind"], low["trial"], low["setting"]) == ("lora", "lora", 0, 0)
    assert (low["seed"], high["seed"], high["draw"], high["setting"]) == (0, 1, 0, 1)
    assert (prompt["num_shots"], prompt["instruction"]) == (4, "instruction 1")


def test_a_trials_curve_has_the_keys_of_an_arms(runs: dict[str, Path]) -> None:
    rows = history(runs[LOW])
    trained = [r for r in rows if "train/loss" in r]
    assert [r["train/loss"] for r in trained] == [1.0, 1 / 2, 1 / 3]
    assert [r["progress/tokens"] for r in trained] == [100, 200, 300]
    assert [r["progress/labels"] for r in trained] == [8, 16, 20]
    (judged,) = [r for r in rows if "eval/accuracy" in r]
    assert (judged["eval/accuracy_low"], judged["eval/accuracy_high"]) == (0.5, 0.7)
    # As a point of an arm's curve: at what it trained, not at what its scoring took.
    assert judged["progress/tokens"] == 300
    price = composed().pricing.usd_per_device_second
    assert price and judged["progress/usd"] == pytest.approx(1.5 * price)


def test_a_prompts_axes_count_what_its_answers_took(runs: dict[str, Path]) -> None:
    rows = [r for r in history(runs[PROMPT]) if "eval/accuracy" in r]
    assert [r["progress/tokens"] for r in rows] == [70, 140]
    assert [r["search/rung"] for r in rows] == [0, 1]


def test_the_end_of_a_trial_is_its_summary_and_closes_its_run(runs: dict[str, Path]) -> None:
    found = summary_of(runs[LOW])
    assert (found["search/status"], found["search/rung"]) == ("dropped", 1)
    assert (found["search/value"], found["search/num_items"]) == (0.6, 20)
    assert (found["search/tokens"], found["search/usd"]) == (440, 0.01)
    assert "search/status" not in summary_of(runs[HIGH])  # closed, and not over
    for path in runs.values():
        assert any(r.WhichOneof("record_type") == "exit" for r in records(path))


def test_the_arms_own_run_knows_the_chosen_setting_and_lies_over_its_trials(
    runs: dict[str, Path],
) -> None:
    found = config_of(runs["lora"])
    assert (found["trainer.learning_rate"], found["trial"], found["setting"]) == (1e-3, 2, 1)
    (own,) = [r for r in history(runs["lora"]) if "eval/accuracy" in r]
    (trial,) = [r for r in history(runs[HIGH]) if "eval/accuracy" in r]
    keys = ("eval/accuracy", "progress/tokens", "progress/usd")
    assert [own[k] for k in keys] == pytest.approx([trial[k] for k in keys])


def test_no_wording_leaves_unless_it_is_asked_for(runs: dict[str, Path], tmp_path: Path) -> None:
    content = b"".join(path.read_bytes() for path in runs.values())
    assert SECRET.encode() not in content and b"Is it spam" not in content
    sent = tracked(tmp_path, "tracking.upload_text=true")
    assert any(SECRET in name for name in sent)
    assert SECRET.encode() in b"".join(path.read_bytes() for path in sent.values())


def test_a_wording_of_a_run_in_a_sweep_is_known_by_a_hash() -> None:
    config = composed()
    tracker = Tracker(
        config=config, name="r", directory=Path(), arms=resolve_arms(config), num_train_labels=1,
        mode="off", group="g", swept={"arms.few_shot.instruction": SECRET, "task.seed": 3},
    )  # fmt: skip
    asked = tracker._of_arm("few_shot")
    assert SECRET not in asked.name and "task.seed=3" in asked.name
    assert "arms.few_shot.instruction=instruction " in asked.name


def test_nothing_is_started_where_tracking_is_off(tmp_path: Path) -> None:
    config = composed()
    tracker = Tracker(
        config=config, name="r", directory=tmp_path, arms=resolve_arms(config),
        num_train_labels=1, mode="off", group="g",
    )  # fmt: skip
    told(tracker, step(0, 1, 1e-4), rung("lora", 0, 0, 1, 0.5), ended("lora", 0, "done"))
    tracker.finish(None)
    assert list(tmp_path.iterdir()) == []
