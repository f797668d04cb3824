"""Every kind of adapter on every ZeRO stage with two workers, against plain torch and peft."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from training.sharding import epoch_order

STEPS, BATCH = 8, 6
RATES = {"lora_plus": 5e-4, "dora": 3e-3, "rslora": 1e-3, "IA3": 3e-2, "VERA": 1e-2}
METHODS: dict[str, dict[str, Any]] = {
    "lora_plus": {"kind": "lora", "lora_rank": 4, "lora_plus_ratio": 16.0},
    "dora": {"kind": "lora", "lora_rank": 4, "use_dora": True},
    "rslora": {"kind": "lora", "lora_rank": 4, "use_rslora": True},
    "IA3": {"kind": "peft", "peft_type": "IA3"},
    "VERA": {"kind": "peft", "peft_type": "VERA", "peft": {"r": 8}},
}
STAGES = (0, 1, 2, 3)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


def config(name: str) -> Any:
    """The peft configuration, written by hand."""
    import peft

    if name == "IA3":
        return peft.IA3Config(task_type="CAUSAL_LM")
    if name == "VERA":
        return peft.VeraConfig(r=8, task_type="CAUSAL_LM")
    return peft.LoraConfig(
        r=4,
        lora_alpha=32,
        target_modules="all-linear",
        use_dora=name == "dora",
        use_rslora=name == "rslora",
        task_type="CAUSAL_LM",
    )


def optimizer_of(name: str, model: Any) -> torch.optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    if name == "lora_plus":
        return create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=RATES[name], loraplus_lr_ratio=16.0
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=RATES[name], weight_decay=0.0)


def batch_loss(model: Any, rows: list[dict[str, Any]], indices: list[int]) -> torch.Tensor:
    """From all logits of one unpadded row at a time."""
    total, count = torch.zeros(()), 0
    for row in (rows[index] for index in indices):
        log_probs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for t, is_target in enumerate(row["target_mask"]):
            if is_target and t:
                total, count = total - log_probs[t - 1, row["input_ids"][t]], count + 1
    return total / count


def plain_losses(name: str, base_dir: Path, rows: list[dict[str, Any]]) -> list[float]:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(model, config(name))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(name, model)
    order = epoch_order(len(rows), seed=0, epoch=0)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = batch_loss(model, rows, list(order[step * BATCH : (step + 1) * BATCH]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module")
def matrix(
    run_workers: Any, base_dir: Path, new_rows: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[tuple[str, int], Any], list[dict[str, Any]]]:
    """(method, stage) -> result of two workers, all from one pair of processes; and the rows."""
    rows = new_rows(STEPS * BATCH)
    random.Random(0).shuffle(rows)
    path = tmp_path_factory.mktemp("stages") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [(name, stage) for name in METHODS for stage in STAGES]
    specs = [
        {
            "method": METHODS[name],
            "trainer": {
                "epochs": 1,
                "batch_size": BATCH,
                "learning_rate": RATES[name],
                "schedule": "constant",
                "warmup_fraction": 0.0,
                "num_points": 1,
            },
            "zero": {"stage": stage},
            "job": {"model_dir": str(base_dir), "rows_path": str(path)},
        }
        for name, stage in keys
    ]
    return dict(zip(keys, run_workers(specs, world_size=2), strict=True)), rows


@pytest.mark.parametrize("name", METHODS)
def test_losses_equal_plain_torch_on_every_stage(
    name: str, matrix: tuple[dict[tuple[str, int], Any], list[dict[str, Any]]], base_dir: Path
) -> None:
    results, rows = matrix
    wanted = plain_losses(name, base_dir, rows)
    assert max(wanted) - min(wanted) > 0.02, "it moved, so equality says something"
    for stage in STAGES:
        result = results[name, stage]
        assert "error" not in result, (stage, result["error"])
        found = [record["loss"] for record in result["records"]]
        assert found == pytest.approx(wanted, abs=2e-5), stage
