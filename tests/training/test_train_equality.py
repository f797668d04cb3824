"""Two gloo workers on every ZeRO stage against one plain torch process without DeepSpeed."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conf.hashing import sha256_of_file
from training.sharding import epoch_order

pytestmark = pytest.mark.all_cores

STEPS, BATCH, POINTS = 20, 6, 4
LONG = 50  # steps of the slow tests
RATE = 1e-3  # ten times the default; at 3e-3 rounding alone grows to 1.9e-5 in 50 steps
SAVED = 15  # the third of the four points
STAGES = (0, 1, 2, 3)
KINDS = ("full", "lora")
INSTRUCTION_TOKENS = 3  # shared by all rows of conftest.make_rows
NUM_ROWS = 43  # the last batch of an epoch has one row, so one worker has none


@pytest.fixture(scope="module")
def rows(rows_path):
    return [json.loads(line) for line in rows_path.read_text().splitlines()][:NUM_ROWS]


@pytest.fixture(scope="module")
def short_rows_path(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("short") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def batches(rows, steps=STEPS):
    """The row indices of each step, written independently of the loop's planning."""
    epochs = math.ceil(steps / math.ceil(len(rows) / BATCH))
    found = []
    for epoch in range(epochs):
        order = epoch_order(len(rows), seed=0, epoch=epoch)
        found += [order[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    return found[:steps]


def batch_loss(model, rows, indices):
    """Sum over targets / target tokens, from all logits of one unpadded row at a time."""
    total, count = 0.0, 0
    for index in indices:
        row = rows[index]
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].float()
        log_probs = logits.log_softmax(-1)
        for t in range(1, len(row["input_ids"])):
            if row["target_mask"][t]:
                total = total - log_probs[t - 1, row["input_ids"][t]]
                count += 1
    return total / count


def plain_model(kind, base_dir):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    if kind == "lora":
        torch.manual_seed(0)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    return model


@pytest.fixture(scope="module")
def reference(base_dir, rows):
    """kind -> (losses, gradient norms) of plain torch."""
    return {kind: plain_training(kind, base_dir, rows, steps=STEPS) for kind in KINDS}


@pytest.fixture(scope="module")
def long_reference(base_dir, rows):
    return {kind: plain_training(kind, base_dir, rows, steps=LONG) for kind in KINDS}


def plain_training(kind, base_dir, rows, *, steps):
    """(losses, gradient norms) of plain torch."""
    model = plain_model(kind, base_dir)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    losses, norms = [], []
    warm = steps // 10
    for step, indices in enumerate(batches(rows, steps), start=1):
        # Up to the peak in a tenth of the steps, then straight to zero one step after the last.
        left = (steps + 1 - step) / (steps + 1 - warm)
        rate = RATE * step / warm if step < warm else RATE * left
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = batch_loss(model, rows, indices)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms


@pytest.fixture(scope="module")
def matrix(run_workers, base_dir, short_rows_path):
    """(kind, stage) -> result, all from one pair of processes."""
    return _matrix(run_workers, base_dir, short_rows_path, world_size=2, steps=STEPS)


@pytest.fixture(scope="module")
def long_matrices(run_workers, base_dir, short_rows_path):
    """world_size -> the same, of more steps."""
    return {
        size: _matrix(run_workers, base_dir, short_rows_path, world_size=size, steps=LONG)
        for size in (1, 2)
    }


def _matrix(run_workers, base_dir, short_rows_path, *, world_size, steps):
    keys = [(kind, stage) for kind in KINDS for stage in STAGES]
    specs = [
        {
            "method": {"kind": kind},
            "trainer": {
                "epochs": 100,
                "max_steps": steps,
                "batch_size": BATCH,
                "micro_batch_size": 2,
                "learning_rate": RATE,
                "num_points": POINTS,
                "state_every_steps": LONG,  # at the points alone, however slow the disk is
            },
            "zero": {"stage": stage},
            "job": {"model_dir": str(base_dir), "rows_path": str(short_rows_path)},
        }
        for kind, stage in keys
    ]
    results = run_workers(specs, world_size=world_size)
    for spec, result in zip(specs, results, strict=True):
        result["output_dir"] = Path(spec["job"]["output_dir"])
    return dict(zip(keys, results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_equal_plain_torch(kind, stage, matrix, reference):
    records = matrix[kind, stage]["records"]
    losses, norms = reference[kind]
    assert [r["loss"] for r in records] == pytest.approx(losses, abs=1e-5)
    assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-3)
    assert losses[-1] < losses[0] - 0.3  # it moved, so equality says something


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", (1, 2))
def test_fifty_steps_equal_plain_torch(world_size, kind, stage, long_matrices, long_reference):
    found = [r["loss"] for r in long_matrices[world_size][kind, stage]["records"]]
    expected, _ = long_reference[kind]
    assert len(found) == LONG
    assert found == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.5  # it moved


SHARDED = {0: (), 1: ("optimizer",), 2: ("optimizer", "gradients")}
SHARDED[3] = (*SHARDED[2], "weights")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_shards_one_part_more(stage, long_matrices):
    """Full fine-tuning: half of the bytes for each of two workers, but for padding."""
    two, one = (m["full", stage]["held_bytes"] for m in (long_matrices[2], long_matrices[1]))
    for part in ("optimizer", "gradients", "weights"):
        if part in SHARDED[stage]:
            assert 0.49 <= two[part] / one[part] <= 0.55, (part, two, one)
        elif part != "gradients" or stage != 1:  # stage 1 keeps its own part after the reduction
            assert two[part] == one[part] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", (0, 3))
def test_saved_weights_are_the_trained_ones(kind, stage, matrix, rows, base_dir):
    """The loss of a step is that of the weights saved before it, loaded by plain libraries."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = matrix[kind, stage]
    directory = result["output_dir"] / f"step-{SAVED:06d}" / "checkpoint"
    if kind == "full":
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    else:
        base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, directory)
    with torch.no_grad():
        loss = float(batch_loss(model.eval(), rows, batches(rows)[SAVED]))
    assert loss == pytest.approx(result["records"][SAVED]["loss"], abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_are_whole_and_trained(stage, matrix):
    directory = matrix["lora", stage]["output_dir"] / "final" / "checkpoint"
    tensors = load_file(directory / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2  # layers x linear layers x (A, B)
    assert all(tensor.numel() > 0 for tensor in tensors.values())
    assert sum(float(t.abs().sum()) for name, t in tensors.items() if "lora_B" in name) > 0
    assert not any("lm_head" in name for name in tensors)


@pytest.mark.parametrize("stage", STAGES)
def test_full_checkpoints_agree_over_stages(stage, matrix):
    ours, plain = (
        load_file(matrix["full", s]["output_dir"] / "final" / "checkpoint" / "model.safetensors")
        for s in (stage, 0)
    )
    assert ours.keys() == plain.keys()
    assert "lm_head.weight" not in ours  # tied: stored once
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, plain[name], atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_on_disk(kind, matrix):
    output_dir = matrix[kind, 3]["output_dir"]
    names = sorted(path.name for path in output_dir.iterdir() if path.is_dir())
    names.remove("state")
    assert names == ["final", "step-000005", "step-000010", "step-000015"]
    for name in names:
        directory = output_dir / name / "checkpoint"
        record = json.loads((directory / "checkpoint.json").read_text())
        files = {path.name for path in directory.iterdir()} - {"checkpoint.json"}
        assert set(record["files"]) == files
        assert all(record["files"][f] == sha256_of_file(directory / f) for f in files)
        assert not [f for f in files if f.endswith((".bin", ".pt", ".pkl"))]
        assert ("tokenizer.json" in files) == (kind == "full")
        assert record["kind"] == kind
        assert [p.name for p in directory.parent.iterdir()] == ["checkpoint"]
    assert record["step"] == 15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", (0, 3))
def test_every_embedded_token_is_counted(kind, stage, matrix, rows):
    result = matrix[kind, stage]
    summary, records = result["summary"], result["records"]
    trained = [row for indices in batches(rows) for row in indices]
    assert summary["examples"] == sum(r["examples"] for r in records) == len(trained)
    assert summary["tokens"] == sum(r["tokens"] for r in records)
    whole = sum(len(rows[row]["input_ids"]) for row in trained)
    pairs = 2 * sum(len(indices) == BATCH for indices in batches(rows))  # passes of two rows
    assert whole - summary["tokens"] >= INSTRUCTION_TOKENS * pairs
    assert summary["target_tokens"] == 2 * len(trained)
    billed = summary["tokens"] + summary["padding_tokens"] + summary["probe_tokens"]
    assert result["embedded_tokens"] == billed


def test_reports(matrix):
    result = matrix["lora", 2]
    assert [r["step"] for r in result["records"]] == list(range(1, STEPS + 1))
    assert [p["done"] for p in result["progress"]] == [0, *range(STEPS + 1)]
    assert result["progress"][0]["note"] == "loading"
    assert "packed passes" in result["progress"][1]["note"]
    record = result["records"][3]
    assert record["device_seconds"] == pytest.approx(2 * record["step_seconds"])
    assert record["usd"] is None
    summary = result["summary"]
    assert summary["zero_stage"] == 2 and summary["world_size"] == 2
    assert summary["trained_parameters"] < summary["total_parameters"]
    directory = result["output_dir"] / "final" / "checkpoint"
    assert summary["checkpoint_bytes"] == sum(p.stat().st_size for p in directory.iterdir())
