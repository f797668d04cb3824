"""A loaded checkpoint that is not the trained model is found out, whatever made it another one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from conf.checkpoint_records import ProbeItem
from conf.errors import JobFailed
from conf.groups import EngineConfig
from conf.records import LedgerLine
from evaluation.answering.agreement import TOLERANCE, farthest, require_agreement
from evaluation.answering.bill import Bill
from evaluation.engines import build_engine
from evaluation.engines.base import Engine
from evaluation.prompts.rendering import Renderer, joint_ids
from evaluation.tasks import Task

ENGINES = ("forest", "transformers")


@pytest.fixture(scope="module")
def renderer(tiny_model_dir: Path) -> Renderer:
    return Renderer.load(tiny_model_dir, layout="plain")


@pytest.fixture(scope="module")
def adapter_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA whose B is not zero, as after a training."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    directory = tmp_path_factory.mktemp("adapter") / "checkpoint"
    adapted.save_pretrained(str(directory))
    return directory


def probe_of(model: torch.nn.Module, renderer: Renderer, task: Task) -> tuple[ProbeItem, ...]:
    """What a plain forward pass says of 20 items: the independent reference."""
    found = []
    for item in task.items["train"][:20]:
        joint = joint_ids(renderer, f"{item.input}\n", [item.answer_key], end=True)
        ids = (*joint.prompt_ids, *joint.completion_ids[0])
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        start = len(joint.prompt_ids)
        total = sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))
        found.append(
            ProbeItem(
                item_id=item.id, prompt_ids=ids[:start], target_ids=ids[start:], logprob=total
            )
        )
    return tuple(found)


@pytest.fixture(scope="module")
def probe(
    tiny_model_dir: Path, adapter_dir: Path, renderer: Renderer, topic_task: Task
) -> tuple[ProbeItem, ...]:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    return probe_of(PeftModel.from_pretrained(base, adapter_dir).eval(), renderer, topic_task)


def build(
    name: str, model_dir: Path, adapter: Path | None, renderer: Renderer, dtype: str = "float32"
) -> Engine:
    return build_engine(
        EngineConfig(name=name),
        model_dir=model_dir,
        adapter_dir=adapter,
        renderer=renderer,
        dtype=dtype,
        device="cpu",
        threads=1,
        task=None,
    )


def check(engine: Engine, probe: tuple[ProbeItem, ...], *dtypes: str) -> list[LedgerLine]:
    bill = Bill(job="j", arm="a", engine=engine, devices=1, usd_per_device_second=None)
    lines: list[LedgerLine] = []
    for line in require_agreement(
        engine, probe, dtypes=dtypes or ("float32",), where="here", bill=bill
    ):
        lines.append(line)
    return lines


@pytest.mark.parametrize("name", ENGINES)
def test_the_trained_model_agrees_and_its_rows_are_billed(
    name: str,
    tiny_model_dir: Path,
    adapter_dir: Path,
    renderer: Renderer,
    probe: tuple[ProbeItem, ...],
) -> None:
    engine = build(name, tiny_model_dir, adapter_dir, renderer)
    before = engine.rows_computed
    lines = check(engine, probe)
    assert sum(line.tokens for line in lines) == engine.rows_computed - before > 0
    assert {line.purpose for line in lines} <= {"agreement", "shared", "padding"}
    assert check(engine, ()) == []


@pytest.mark.parametrize("name", ENGINES)
def test_bfloat16_agrees_within_its_own_rounding(
    name: str,
    tiny_model_dir: Path,
    adapter_dir: Path,
    renderer: Renderer,
    probe: tuple[ProbeItem, ...],
) -> None:
    engine = build(name, tiny_model_dir, adapter_dir, renderer, "bfloat16")
    assert check(engine, probe, "float32", "bfloat16")


def scaled(adapter_dir: Path, target: Path, factor: float) -> Path:
    shutil.copytree(adapter_dir, target)
    path = target / "adapter_config.json"
    config = json.loads(path.read_text())
    config["lora_alpha"] *= factor
    path.write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("name", ENGINES)
def test_a_scaled_adapter_is_found_out(
    name: str,
    tiny_model_dir: Path,
    adapter_dir: Path,
    renderer: Renderer,
    probe: tuple[ProbeItem, ...],
    tmp_path: Path,
) -> None:
    other = scaled(adapter_dir, tmp_path / "scaled", 1.1)
    with pytest.raises(JobFailed, match="not the one that was trained"):
        check(build(name, tiny_model_dir, other, renderer), probe)


def test_a_forgotten_adapter_and_another_base_are_found_out(
    tiny_model_dir: Path,
    adapter_dir: Path,
    renderer: Renderer,
    probe: tuple[ProbeItem, ...],
    tmp_path: Path,
) -> None:
    with pytest.raises(JobFailed, match="here: the loaded model"):
        check(build("forest", tiny_model_dir, None, renderer), probe)
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0] += 0.5  # one row of one layer
    model.save_pretrained(other)
    with pytest.raises(JobFailed, match="not the one that was trained"):
        check(build("forest", other, adapter_dir, renderer), probe)


def test_the_coarser_dtype_sets_the_tolerance(
    tiny_model_dir: Path, adapter_dir: Path, renderer: Renderer, probe: tuple[ProbeItem, ...]
) -> None:
    engine = build("transformers", tiny_model_dir, adapter_dir, renderer)
    off = tuple(
        dataclasses.replace(item, logprob=item.logprob + 0.05 * len(item.target_ids))
        for item in probe
    )
    assert check(engine, off, "bfloat16", "float32")
    with pytest.raises(JobFailed):
        check(engine, off, "float32", "float32")


@pytest.mark.parametrize("loaded", [None, float("nan"), float("-inf")])
def test_no_number_is_no_agreement(loaded: float | None) -> None:
    item = ProbeItem(item_id="x", prompt_ids=(1,), target_ids=(2, 3), logprob=-1.0)
    other = dataclasses.replace(item, item_id="y")
    worst = farthest((other, item), {0: -1.0, 1: loaded}, tolerance=TOLERANCE["bfloat16"])
    assert worst.item_id == "x" and worst.excess > 1
