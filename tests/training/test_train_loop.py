"""What one training does: it learns, layout does not matter, bad input and bad numbers stop it.

All jobs run in one worker process whose PATH holds no compiler.
"""

import json
from pathlib import Path

import pytest
import torch

CLASSES = 7
LAYOUTS = ("whole", "one_row", "three_rows", "checkpointed", "offload", "reference")


@pytest.fixture(scope="module")
def nan_dir(base_dir, tmp_path_factory):
    """An untied model in which token 95 alone has an embedding that is not a number."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base_dir)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.model.embed_tokens.weight.data[95] = float("nan")
    directory = tmp_path_factory.mktemp("nan")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def files(new_rows, tmp_path_factory):
    """Row files by name."""
    directory = tmp_path_factory.mktemp("rows")
    poisoned = new_rows(24)
    for row in poisoned:
        row["input_ids"] = [94 if i == 95 else i for i in row["input_ids"]]
    poisoned[17]["input_ids"][0] = 95
    masked = new_rows(6)
    masked[4]["target_mask"] = [0] * len(masked[4]["target_mask"])
    moved = new_rows(210, longest=12)  # each label's word is another one
    for row in moved:
        row["input_ids"][-2] = 3 + (row["input_ids"][-2] - 3 + 1) % CLASSES
    rows = {
        "classes": new_rows(210, longest=12),
        "moved": moved,
        "few": new_rows(21),
        "poisoned": poisoned,
        "masked": masked,
    }
    for name, those in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in those)
        (directory / f"{name}.jsonl").write_text(text)
    return {name: directory / f"{name}.jsonl" for name in rows}


@pytest.fixture(scope="module")
def results(run_workers, base_dir, nan_dir, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    learn = {"epochs": 10, "max_steps": 150, "batch_size": 14, "num_points": 1}
    short = {"epochs": 2, "batch_size": 6, "learning_rate": 3e-3, "num_points": 1}

    def spec(name, rows, *, kind="full", model=base_dir, zero=None, **trainer):
        method = {"kind": kind}
        if name == "wrong_target":
            method["target_modules"] = ["q_proj", "qproj"]
        return {
            "method": method,
            "trainer": trainer,
            "zero": zero or {},
            "job": {
                "model_dir": str(model),
                "rows_path": str(files[rows]),
                "output_dir": str(out / name),
                "usd_per_device_second": 0.5,
                "dtype": "bfloat16" if name.startswith("bf16") else "float32",
                "kernels_impl": "reference" if name == "reference" else "auto",
            },
        }

    learned = out / "learn" / "final" / "checkpoint"
    specs = [
        spec("learn", "classes", learning_rate=3e-3, **learn),
        spec("relearn", "moved", kind="lora", model=learned, learning_rate=1e-2, **learn),
        spec("whole", "few", **short),
        spec("one_row", "few", micro_batch_size=1, **short),
        spec("three_rows", "few", micro_batch_size=3, **short),
        spec("checkpointed", "few", activation_checkpointing=True, **short),
        spec("offload", "few", zero={"stage": 3, "offload": True}, **short),
        spec("reference", "few", **short),
        spec("lora", "few", kind="lora", **short),
        spec("lora_checkpointed", "few", kind="lora", activation_checkpointing=True, **short),
        spec("nan", "poisoned", model=nan_dir, **short),
        spec("masked", "masked", **short),
        spec("wrong_target", "few", kind="lora", **short),
        *(spec(f"bf16_{n}", "few", zero={"stage": n}, **short) for n in (0, 1, 2, 3)),
        spec("auto", "few", zero={"stage": -1}, **short),
    ]
    found = run_workers(specs, search_path="/nonexistent")
    names = [Path(s["job"]["output_dir"]).name for s in specs]
    by_name = dict(zip(names, found, strict=True))
    for name, result in by_name.items():
        result["final"] = out / name / "final" / "checkpoint"
    return by_name


def share_right(model, *, rows, shift):
    """Share of fresh rows whose label word is the likeliest next token."""
    right = 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"][:-2]])).logits[0, -1]
        word = 3 + (row["input_ids"][-2] - 3 + shift) % CLASSES
        right += int(logits.argmax()) == word
    return right / len(rows)


def test_full_learns_seven_classes(results, new_rows):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(results["learn"]["final"]).eval()
    assert share_right(model, rows=new_rows(140, seed=1, longest=12), shift=0) >= 0.9


def test_lora_learns_on_a_saved_checkpoint(results, new_rows):
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(results["relearn"]["final"]).eval()
    assert share_right(model, rows=new_rows(140, seed=1, longest=12), shift=1) >= 0.9


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layout_does_not_matter(layout, results):
    losses = [r["loss"] for r in results["whole"]["records"]]
    assert len(losses) == 8
    assert [r["loss"] for r in results[layout]["records"]] == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_bf16_follows_fp32(stage, results):
    """fp32 master weights in every stage; a wrong first Adam step would be 0.04 off."""
    losses = [r["loss"] for r in results["whole"]["records"]]
    found = results[f"bf16_{stage}"]["records"]
    assert [r["loss"] for r in found] == pytest.approx(losses, abs=0.015)
    assert all(r["grad_norm"] > 0 for r in found)


def test_lora_trains_with_activation_checkpointing(results):
    plain, checkpointed = (
        [r["loss"] for r in results[name]["records"]] for name in ("lora", "lora_checkpointed")
    )
    assert checkpointed == pytest.approx(plain, abs=1e-5)


def test_auto_is_stage_0_on_one_worker(results):
    assert results["auto"]["summary"]["zero_stage"] == 0


def test_money(results):
    for record in results["whole"]["records"]:
        assert record["usd"] == pytest.approx(0.5 * record["step_seconds"])


def test_a_loss_that_is_not_a_number_stops(results):
    result = results["nan"]
    kind, message = result["error"]
    assert kind == "JobFailed"
    assert "loss is nan" in message and "row-17" in message
    step = len(result["records"]) + 1
    assert f"step {step}:" in message and step <= 4
    assert not result["final"].exists()


def test_a_row_without_targets_is_refused(results, files):
    kind, message = results["masked"]["error"]
    assert kind == "DataError"
    assert f"{files['masked']}:5" in message and "row-4" in message
    assert results["masked"]["records"] == []
    assert results["masked"]["embedded_tokens"] == 0


def test_a_partly_wrong_target_list_is_refused(results):
    kind, message = results["wrong_target"]["error"]
    assert kind == "ConfigError"
    assert "arms.lora.target_modules" in message
    assert "found:    qproj" in message and "q_proj" in message.split("expected:")[1]


def test_checkpoint_record(results):
    record = json.loads((results["relearn"]["final"] / "checkpoint.json").read_text())
    assert record["step"] == 150 and record["kind"] == "lora"
    assert record["tokens"] == results["relearn"]["summary"]["tokens"]
    assert record["trained_parameters"] == results["relearn"]["summary"]["trained_parameters"]
