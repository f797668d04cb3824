"""What a checkpoint says of its first rows is what plain libraries find in it."""

import json

import pytest
import torch

ROWS = 23  # more than are probed


@pytest.fixture(scope="module")
def gap_rows(new_rows):
    """Rows of which some have targets before the end, and a gap between them."""
    rows = new_rows(ROWS)
    for row in rows[::5]:
        row["target_mask"][4] = 1
    return rows


@pytest.fixture(scope="module")
def results(run_workers, base_dir, gap_rows, tmp_path_factory):
    """One worker process: LoRA with dropout probed once and thrice, full, and full of few rows."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in gap_rows))
    few = path.with_name("few.jsonl")
    few.write_text("".join(json.dumps(row) + "\n" for row in gap_rows[:3]))
    job = {"model_dir": str(base_dir), "rows_path": str(path)}
    lora = {"kind": "lora", "lora_dropout": 0.3}
    short = {"batch_size": 6, "epochs": 2, "learning_rate": 3e-3}
    specs = {
        "lora": {"method": lora, "trainer": {**short, "num_points": 1}, "job": dict(job)},
        "often": {"method": lora, "trainer": {**short, "num_points": 3}, "job": dict(job)},
        "full": {"method": {"kind": "full"}, "trainer": {**short, "num_points": 1}, "job": job},
        "few": {
            "method": {"kind": "full"},
            "trainer": {**short, "num_points": 1},
            "job": {**job, "rows_path": str(few)},
        },
    }
    found = run_workers(list(specs.values()))
    return {
        name: (spec["job"]["output_dir"], result)
        for (name, spec), result in zip(specs.items(), found, strict=True)
    }


def checkpoint(results, name, point="final"):
    directory = f"{results[name][0]}/{point}/checkpoint"
    with open(f"{directory}/checkpoint.json") as stream:
        return directory, json.load(stream)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_plain_libraries_find_the_probe_in_the_checkpoint(name, results, base_dir, gap_rows):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory, record = checkpoint(results, name)
    model = AutoModelForCausalLM.from_pretrained(base_dir if name == "lora" else directory)
    if name == "lora":
        model = PeftModel.from_pretrained(model, directory)
    model.eval()
    assert [item["item_id"] for item in record["probe"]] == [f"row-{i}" for i in range(20)]
    assert record["dtype"] == "float32"
    for item, row in zip(record["probe"], gap_rows, strict=False):
        first = row["target_mask"].index(1)
        assert item["prompt_ids"] == row["input_ids"][:first]
        assert item["target_ids"] == row["input_ids"][first:]
        with torch.no_grad():
            logprobs = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        ids = row["input_ids"]
        expected = sum(float(logprobs[i - 1, ids[i]]) for i in range(first, len(ids)))
        assert item["logprob"] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_fewer_rows_than_are_probed(results):
    assert len(checkpoint(results, "few")[1]["probe"]) == 3


def test_probing_changes_nothing_in_what_is_trained(results):
    """Dropout draws random numbers: a probe between the steps must draw none."""
    losses = {name: [r["loss"] for r in results[name][1]["records"]] for name in ("lora", "often")}
    assert losses["lora"] == losses["often"]
    assert checkpoint(results, "lora")[1]["probe"] == checkpoint(results, "often")[1]["probe"]


def test_probed_tokens_are_counted(results):
    probed = checkpoint(results, "lora")[1]["probe"]
    tokens = sum(len(item["prompt_ids"]) + len(item["target_ids"]) for item in probed)
    assert results["lora"][1]["summary"]["probe_tokens"] == tokens
    assert results["often"][1]["summary"]["probe_tokens"] == 3 * tokens
    embedded = {name: results[name][1]["embedded_tokens"] for name in ("lora", "often")}
    assert embedded["often"] - embedded["lora"] == 2 * tokens
