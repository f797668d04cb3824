"""A sweep as Ray Tune runs it: a process a trial, with transformers and peft.

`python -m tests.benchmarks.sweep_peer MESSAGE.json` trains and scores every trial of the message
and leaves <output_dir>/trial-<number>.json. Nothing of ours is imported. Its choices are
fast ones: the head sees target rows only, no gradient checkpointing, fused AdamW, sdpa attention,
no dashboard, no logger and no checkpoints of Tune's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # input_ids, target_mask; of an item's label also item_id, is_reference
SCORED_ROWS = 16  # label rows of a pass without gradients


def sweep(message: dict[str, Any]) -> None:
    """Run all trials, `concurrency` at a time, and note when it began and ended."""
    import ray
    from ray import tune

    cores = message["threads"] * message["concurrency"]
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    trainable = tune.with_resources(
        lambda config: tune.report(run_trial(message, config["trial"])),
        {"cpu": message["threads"]},
    )
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(message["trials"])},
        tune_config=tune.TuneConfig(max_concurrent_trials=message["concurrency"]),
        run_config=tune.RunConfig(storage_path=message["output_dir"], name="tune", verbose=0),
    )
    found = tuner.fit()
    for error in found.errors:
        raise error
    ray.shutdown()


def run_trial(message: dict[str, Any], trial: dict[str, Any]) -> dict[str, Any]:
    """Train and score one trial in this process; what it leaves is told and written."""
    marks = [time.time()]
    import torch

    torch.set_num_threads(message["threads"])
    model = load(message["model_dir"], trial)
    marks.append(time.time())
    rows, items = read(message["rows"]), read(message["items"])
    losses, counts = train(model, trial, rows=rows, message=message)
    marks.append(time.time())
    right, scored = score(model, items)
    model.save_pretrained(str(Path(message["output_dir"]) / f"weights-{trial['number']}"))
    marks.append(time.time())
    found = {
        "trial": trial["number"],
        "losses": losses,
        "right": right,
        "tokens": counts[0],
        "padding_tokens": counts[1],
        "scored_tokens": scored,
        "marks": marks,  # started, loaded, trained, scored: seconds since the epoch
    }
    path = Path(message["output_dir"]) / f"trial-{trial['number']}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return {"accuracy": sum(right) / len(right)}


def load(model_dir: str, trial: dict[str, Any]) -> Any:
    """The base model in fp32 under the trial's new adapters on all linear layers but the head."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    config = LoraConfig(
        r=trial["lora_rank"], lora_alpha=trial["lora_alpha"], target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(trial["seed"])
    return get_peft_model(base, config)


def train(
    model: Any, trial: dict[str, Any], *, rows: Sequence[Row], message: dict[str, Any]
) -> tuple[list[float], tuple[int, int]]:
    """A step for each of the trial's batches: mean losses, and tokens (real, padding)."""
    import torch

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0, fused=True)
    losses, real, padded = [], 0, 0
    for indices, rate in zip(trial["batches"], trial["rates"], strict=True):
        batch = sorted((rows[k] for k in indices), key=lambda row: -len(row["input_ids"]))
        targets = sum(sum(row["target_mask"][1:]) for row in batch)
        total = 0.0
        for start in range(0, len(batch), message["micro_batch"]):
            part = batch[start : start + message["micro_batch"]]
            loss = target_losses(model, part).sum() / targets
            loss.backward()
            total += float(loss.detach())
            lengths = [len(row["input_ids"]) for row in part]
            real += sum(lengths)
            padded += max(lengths) * len(lengths) - sum(lengths)
        torch.nn.utils.clip_grad_norm_(parameters, message["clip_norm"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, (real, padded)


def target_losses(model: Any, rows: Sequence[Row]) -> Any:
    """-log p of each target token, row by row, of rows that are padded at the right."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    padding = [longest - len(row["input_ids"]) for row in rows]
    ids = torch.tensor([row["input_ids"] + [0] * n for row, n in zip(rows, padding, strict=True)])
    mask = torch.tensor([[1] * (longest - n) + [0] * n for n in padding])
    is_target = torch.tensor(
        [row["target_mask"] + [0] * n for row, n in zip(rows, padding, strict=True)]
    ).bool()
    is_target[:, 0] = False  # the first token has no predecessor
    decoder = model.get_base_model()
    hidden = decoder.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    logits = decoder.lm_head(hidden[:, :-1][is_target[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, ids[is_target], reduction="none")


def score(model: Any, items: Sequence[Row]) -> tuple[list[float], int]:
    """Whether each item is right, by sums or batch-calibrated ones, and the tokens forwarded."""
    import torch

    model.eval()
    order = sorted(range(len(items)), key=lambda k: -len(items[k]["input_ids"]))
    logprobs = [0.0] * len(items)
    with torch.no_grad():
        for start in range(0, len(order), SCORED_ROWS):
            part = order[start : start + SCORED_ROWS]
            counts = [sum(items[k]["target_mask"][1:]) for k in part]
            losses = target_losses(model, [items[k] for k in part]).split(counts)
            for k, loss in zip(part, losses, strict=True):
                logprobs[k] = -float(loss.sum())
    labels: dict[str, list[int]] = {}
    for k, row in enumerate(items):
        labels.setdefault(row["item_id"], []).append(k)
    sums = torch.tensor([[logprobs[k] for k in own] for own in labels.values()])
    hits = torch.tensor([[items[k]["is_reference"] for k in own] for own in labels.values()])
    calibrated = sums - sums.softmax(1).mean(0).log()  # all items have the same labels
    ways = [hits.gather(1, way.argmax(1, keepdim=True)) for way in (sums, calibrated)]
    right = max(ways, key=lambda way: int(way.sum())).flatten().double().tolist()
    return right, sum(len(row["input_ids"]) for row in items)


def read(path: str) -> list[Row]:
    """The rows of a JSONL file."""
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


if __name__ == "__main__":
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    sweep(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
