"""A whole run with real weights (tiny ones): training on Ray, checkpoints, W&B, predict, reuse."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import ModelError
from conf.records import CheckpointRecord, from_dict
from evaluation.rendering import Renderer, joint_ids
from launch.execute import verified
from tests.launch.wandb_log import history, run_of

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = [
    "model=tiny",
    "task.limit.train=48",
    "task.limit.validation=16",
    "task.limit.test=24",
    "trainer.epochs=2",
]


def launch(root: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), f"run.root={root}", *SMALL, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=root)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    done = launch(
        root,
        "+exp=lora",
        "run.name=r",
        "+method@arms.full=full",
        "+method@arms.few_shot_on_lora=few_shot_on_lora",
        "arms.few_shot_on_lora.num_shots=2",
        *(["cluster.workers=2", "zero=1"] if (os.cpu_count() or 1) > 1 else []),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "r"


def base_model(run: Path) -> Path:
    models = [p for p in (run.parent / ".cache/models").iterdir() if p.is_dir()]
    assert len(models) == 1
    return models[0]


def answers(run: Path, arm: str, set_name: str = "test") -> list[dict[str, Any]]:
    return [s for s in lines(run / f"arms/{arm}/samples.jsonl") if s["set"] == set_name]


def logprobs(model: Any, renderer: Renderer, prompt: str, words: list[str]) -> list[float]:
    """Each word's log-probability after the prompt: one plain forward pass per word."""
    joint = joint_ids(renderer, prompt, words)
    found = []
    for ids in joint.completion_ids:
        row = torch.tensor([[*joint.prompt_ids, *ids]])
        with torch.no_grad():
            scores = model(row).logits[0].log_softmax(-1)
        start = len(joint.prompt_ids)
        found.append(sum(float(scores[start + i - 1, t]) for i, t in enumerate(ids)))
    return found


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_plain_libraries_load_the_checkpoint_and_give_the_evaluated_logprobs(
    run: Path, arm: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoint = run / f"arms/{arm}/final/checkpoint"
    if arm == "full":
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    else:
        base = AutoModelForCausalLM.from_pretrained(base_model(run), dtype=torch.float32)
        model = PeftModel.from_pretrained(base, checkpoint)
    renderer = Renderer.load(base_model(run), layout="plain")
    prompts = {p["prompt_sha256"]: p["text"] for p in lines(run / "prompts.jsonl")}
    scored = [s for s in answers(run, arm, "validation") if s["label_logprobs"] and s["step"]]
    final = max(s["step"] for s in scored)
    checked = [s for s in scored if s["step"] == final][:6]
    assert len(checked) == 6
    for sample in checked:
        labels = list(sample["label_logprobs"])
        found = logprobs(model.eval(), renderer, prompts[sample["prompt_sha256"]], labels)
        assert found == pytest.approx(list(sample["label_logprobs"].values()), abs=1e-4)


def test_training_learned_something_and_every_step_is_a_record(run: Path) -> None:
    for arm in ("lora", "full"):
        steps = lines(run / f"arms/{arm}/train.jsonl")
        assert [s["step"] for s in steps] == list(range(1, 13))
        assert sum(s["examples"] for s in steps) == 96
        assert steps[-1]["loss"] < steps[0]["loss"]


def test_the_ledger_holds_the_training_to_the_token(run: Path) -> None:
    ledger = json.loads((run / "results.json").read_text())["ledger"]
    for arm in ("lora", "full"):
        steps = lines(run / f"arms/{arm}/train.jsonl")
        billed = [e for e in ledger if e["job"] == f"train:{arm}" and e["purpose"] == "train"]
        assert sum(e["tokens"] for e in billed) == sum(s["tokens"] for s in steps)
        assert sum(e["device_seconds"] for e in billed) >= sum(s["device_seconds"] for s in steps)


def test_the_curve_has_both_checkpoints_of_each_training(run: Path) -> None:
    for arm in ("lora", "full"):
        points = lines(run / f"arms/{arm}/curve.jsonl")
        assert [p["step"] for p in points] == [6, 12]
        assert points[0]["tokens"] < points[1]["tokens"]


def test_an_arm_on_another_pays_for_it(run: Path) -> None:
    arms = json.loads((run / "results.json").read_text())["arms"]
    assert arms["few_shot_on_lora"]["status"] == "done"
    on_top = arms["few_shot_on_lora"]["cost"]["fixed_device_seconds"]
    assert on_top > arms["lora"]["train"]["device_seconds"]


def test_wandb_has_a_prompted_and_a_tuned_curve_over_the_same_axis(run: Path) -> None:
    files = list(run.glob("wandb/offline-run-*/*.wandb"))
    found = {run_of(f).display_name: f for f in files}
    assert {"zero_shot", "lora", "full", "summary"} <= set(found)
    assert {run_of(f).run_group for f in files} == {"r"}
    kinds = {name: run_of(f).job_type for name, f in found.items()}
    assert kinds["zero_shot"] == "prompt"
    assert kinds["lora"] == "train"
    assert kinds["summary"] == "summary"
    for arm in ("zero_shot", "lora"):
        rows = [r for r in history(found[arm]) if "eval/accuracy" in r]
        spent = [r["progress/usd"] for r in rows]
        assert len(rows) >= 2
        assert spent[-1] > 0
        assert all("eval/accuracy_low" in r and "eval/accuracy_high" in r for r in rows)
    trained = [r for r in history(found["lora"]) if "train/loss" in r]
    assert len(trained) == 12
    tokens = [r["progress/tokens"] for r in trained]
    assert tokens == sorted(tokens) and tokens[0] > 0


def test_no_text_of_the_data_leaves_for_wandb(run: Path) -> None:
    texts = [i["input"] for i in lines(run / "items.jsonl") if len(i["input"]) > 30]
    content = b"".join(f.read_bytes() for f in run.glob("wandb/**/*") if f.is_file())
    assert not [t for t in texts if t.encode() in content]


@pytest.mark.slow
def test_prompts_on_a_checkpoint_directory_answer_as_the_arm_did(run: Path) -> None:
    checkpoint = run / "arms/lora/final/checkpoint"
    done = launch(run.parent, "+exp=zero_shot", "run.name=on", f"arms.zero_shot.on={checkpoint}")
    assert done.returncode == 0, done.stdout + done.stderr
    arms = json.loads((run / "results.json").read_text())["arms"]
    again = json.loads((run.parent / "on/results.json").read_text())["arms"]
    assert again["zero_shot"]["metric"] == arms["lora"]["metric"]


def test_predict_answers_new_rows_as_the_evaluation_did(run: Path, tmp_path: Path) -> None:
    items = [i for i in lines(run / "items.jsonl") if i["split"] == "test"]
    with (tmp_path / "new.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=["id", "input"])
        writer.writeheader()
        writer.writerows({"id": i["id"], "input": i["input"]} for i in items)
    subprocess.run(
        [sys.executable, "-m", "launch.predict", str(run), "arm=lora"]
        + [str(tmp_path / "new.csv"), str(tmp_path / "out.csv")],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    with (tmp_path / "out.csv").open() as stream:
        found = {row["id"]: row["answer"] for row in csv.DictReader(stream)}
    for sample in answers(run, "lora"):
        expected = sample["calibrated_answer"] or sample["answer"]
        assert found[sample["item_id"]] == expected


def test_a_changed_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(run / "arms/lora/final/checkpoint", checkpoint)
    record = from_dict(CheckpointRecord, json.loads((checkpoint / "checkpoint.json").read_text()))
    assert verified(checkpoint, renderer_sha256=record.renderer_sha256) == record
    with pytest.raises(ModelError, match="another tokenizer"):
        verified(checkpoint, renderer_sha256="0" * 64)
    weights = checkpoint / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(ModelError, match="adapter_model.safetensors"):
        verified(checkpoint, renderer_sha256=record.renderer_sha256)
