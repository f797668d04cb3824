"""A whole run with real weights (tiny ones): training on Ray, checkpoints, W&B, predict, reuse."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.checkpoint_records import CheckpointRecord
from conf.errors import ConfigError, JobFailed, ModelError
from conf.records import LedgerLine, from_dict
from evaluation.prompts.rendering import Renderer, joint_ids
from evaluation.records.run_records import read_run
from evaluation.results.serving import serve_commands
from evaluation.results.summary import summarise
from launch import export, predict
from launch.checkpoints import verified
from launch.finished import find_arm
from launch.workers import Evaluator
from tests.launch.tracking.wandb_log import history, run_of
from tests.waiting import HANG_SECONDS

pytestmark = pytest.mark.all_cores

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
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=root)


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


def test_both_models_answered_the_general_set_and_the_base_was_asked_once(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert [(f["arm"], f["change"]["n"]) for f in results["forgetting"]] == [
        ("lora", 60),
        ("full", 60),
    ]
    bases = [
        {a["item_id"]: a["answer"] for a in answers(run, arm, "general") if a["step"] is None}
        for arm in ("lora", "full")
    ]
    assert bases[0] == bases[1] and len(bases[0]) == 60
    done = [e for e in lines(run / "journal.jsonl") if e["event"] == "job_done"]
    reused = {e["job"]: e["data"]["is_reused"] for e in done}
    assert reused["general_base:full"]
    known = {i["id"] for i in lines(run / "items.jsonl") if i["split"] == "general"}
    assert known == set(bases[0])


def test_probes_and_wordings_fill_the_ten_dimensions_before_and_after_tuning(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    arms = {n: a["probes"] for n, a in results["arms"].items() if n != "tfidf"}
    for name, probes in arms.items():
        assert {"bias", "abstain", "wording", "steering"} <= set(probes), name
        asked = probes["bias"]["asked_of"]
        assert asked == {"zero_shot": "lora", "few_shot_on_lora": "lora"}.get(name, name)
    changes = {(c["arm"], c["measure"]): c for c in results["probe_changes"]}
    for arm in ("lora", "full"):
        for measure in ("group_gap", "unsupported", "obeyed"):
            change = changes[arm, measure]["change"]
            assert change["low"] <= change["value"] <= change["high"] and change["n"] >= 8
    empty = [d for d in results["dimensions"] if not any(d["by_arm"].values())]
    assert {d["measure"] for d in empty} <= {"agreement over repeats", "trials", "format validity"}
    assert all(d["note"].startswith("not measured in this run") for d in empty)
    asked = [answers(run, arm, "bias") for arm in ("lora", "full")]
    bases = [{a["item_id"]: a["answer"] for a in one if a["step"] is None} for one in asked]
    assert bases[0] == bases[1] and len(bases[0]) == 16
    known = {i["id"] for i in lines(run / "items.jsonl") if i["split"] == "bias"}
    assert known == set(bases[0])


def test_each_checkpoint_agreed_before_it_was_evaluated(run: Path) -> None:
    ledger = json.loads((run / "results.json").read_text())["ledger"]
    checked = {e["job"] for e in ledger if e["purpose"] == "agreement" and e["tokens"]}
    arms = {f"{kind}:{arm}" for kind in ("train", "evaluate") for arm in ("lora", "full")}
    curves = {"curve:lora:0", "curve:full:0"}
    assert checked == arms | curves | {"evaluate:few_shot_on_lora"}


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


def prompted_rows(run: Path, path: Path) -> list[dict[str, Any]]:
    items = [i for i in lines(run / "items.jsonl") if i["split"] == "test"]
    path.write_text("".join(json.dumps({"id": i["id"], "input": i["input"]}) + "\n" for i in items))
    return items


def test_a_killed_prediction_goes_on_and_asks_nothing_twice(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = prompted_rows(run, tmp_path / "new.jsonl")
    arguments = [str(run), "arm=few_shot_on_lora", str(tmp_path / "new.jsonl")]
    arguments.append(str(tmp_path / "out.jsonl"))
    append, kept = predict.Kept.append, []

    def dying(self: Any, record: Any) -> None:
        append(self, record)
        kept.append(record.item_id)
        if len(kept) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict.Kept, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            predict.predict(arguments)
    assert not (tmp_path / "out.jsonl").exists()
    with (tmp_path / ".out.jsonl.answers.jsonl").open("a") as stream:
        stream.write('{"arm": "half a li')
    asked: list[str] = []
    monkeypatch.setattr(predict.Kept, "append", lambda self, r: asked.append(r.item_id))
    assert predict.predict(arguments) == 0
    assert sorted(asked + kept) == sorted(i["id"] for i in items)
    found = {r["id"]: r["answer"] for r in lines(tmp_path / "out.jsonl")}
    rule = json.loads((run / "results.json").read_text())["arms"]["few_shot_on_lora"]["answer_rule"]
    for sample in answers(run, "few_shot_on_lora"):
        if sample["answer_by"] == rule["answer_by"]:
            assert found[sample["item_id"]] == (sample["calibrated_answer"] or sample["answer"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.jsonl", "out.jsonl"]


@pytest.mark.parametrize("arm", ["lora", "full", "few_shot_on_lora", "zero_shot"])
def test_an_exported_model_answers_in_plain_transformers_as_it_was_measured(
    run: Path, tmp_path: Path, arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snippet of the report, run as it stands on the directory that the report names."""
    assert (
        export.export([str(run), f"arm={arm}", str(tmp_path / "exported" / arm), "merge=true"]) == 0
    )
    records = read_run(run)
    results = summarise(records)
    wanted = dataclasses.replace(results.recommendation, arm=arm)
    commands = serve_commands(dataclasses.replace(results, recommendation=wanted), records)
    snippet = next(c.text for c in commands if "plain transformers" in c.title)
    rule = records.arms[arm].rule
    assert rule is not None
    items = {i["id"]: i["input"] for i in lines(run / "items.jsonl")}
    checked = [s for s in answers(run, arm) if s["answer_by"] == rule.answer_by][:4]
    monkeypatch.chdir(tmp_path)
    for sample in checked:
        scope: dict[str, Any] = {}
        exec(snippet.replace('"TEXT OF ONE ITEM"', repr(items[sample["item_id"]])), scope)
        if rule.answer_by == "generate":
            said = scope["tokenizer"].decode(scope["ids"][0, len(scope["start"]) :], True)
            assert said.startswith(sample["completion"])
        else:
            expected = sample["calibrated_answer"] or sample["answer"]
            assert max(scope["scores"], key=scope["scores"].get) == expected
            offsets = rule.label_offsets or {}
            found = {k: v + offsets.get(k, 0.0) for k, v in scope["scores"].items()}
            if rule.normalisation == "sum":
                assert found == pytest.approx(sample["label_logprobs"], abs=1e-3)


def test_an_exported_adapter_holds_no_training_text_and_loads(run: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "adapter"
    export.export([str(run), "arm=lora", str(out)])
    assert "checkpoint.json" not in {p.name for p in out.iterdir()}
    manifest = json.loads((out / "export.json").read_text())
    assert manifest["arm"] == "lora" and not manifest["is_merged"] and "probe" not in manifest
    AutoTokenizer.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(base_model(run))
    PeftModel.from_pretrained(base, out)
    with pytest.raises(ConfigError, match="which exists"):
        export.export([str(run), "arm=lora", str(out), "merge=true"])


def test_an_export_that_is_not_the_trained_model_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = export.find_arm

    def scaled(*args: Any, **kwargs: Any) -> Any:
        found = find(*args, **kwargs)
        return dataclasses.replace(found, checkpoint=with_other_scale(found.checkpoint, tmp_path))

    monkeypatch.setattr(export, "find_arm", scaled)
    with pytest.raises(JobFailed, match="not the one that was trained"):
        export.export([str(run), "arm=lora", str(tmp_path / "out" / "merged"), "merge=true"])
    assert list((tmp_path / "out").iterdir()) == []


def with_other_scale(checkpoint: Path, parent: Path) -> Path:
    """A copy of an adapter that is put on with three times its scale, all hashes right."""
    other = parent / "scaled"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "adapter_config.json").read_text())
    config["lora_alpha"] *= 3
    (other / "adapter_config.json").write_text(json.dumps(config))
    return other


def test_an_evaluation_of_another_model_than_was_trained_fails(run: Path, tmp_path: Path) -> None:
    """Hashes that were made anew say nothing; the numbers of the training do."""
    found = find_arm(run, "lora", with_reference=False, usage="")
    assert found.checkpoint is not None and found.checkpoint_record is not None
    task = dataclasses.replace(
        found.task, items={**found.task.items, "test": found.task.items["test"][:2]}
    )
    with contextlib.closing(predict.Kept(tmp_path / "o.csv", key="k")) as kept:
        work = predict._work(found, task, kept)
    assert len(work.probe) == 20
    good = [e for events in Evaluator().answer(work) for e in events]
    purposes = [e.purpose for e in good if isinstance(e, LedgerLine)]
    assert purposes[:2] == ["padding", "agreement"], "loading, then the check"
    bad = dataclasses.replace(work, adapter_dir=with_other_scale(found.checkpoint, tmp_path))
    with pytest.raises(JobFailed, match="scaled: the loaded model is not the one"):
        list(Evaluator().answer(bad))


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
