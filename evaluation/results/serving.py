"""What to type to use an arm outside the run: the report ends with it (pure)."""

from __future__ import annotations

import shlex

from conf.records import AnswerRule
from conf.results import Results, ServeCommand
from evaluation.records.run_records import RunRecords

EXPORTED = "exported"
# Ranks that vLLM allots memory for; --max-lora-rank takes no other.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

_HEAD = """import json, pathlib, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

where = "{where}"
prompt = json.loads(pathlib.Path(where, "prompt.json").read_text())
tokenizer = AutoTokenizer.from_pretrained(where)
model = AutoModelForCausalLM.from_pretrained(where, dtype="auto")
opening = prompt["start_token_ids"]
encode = lambda text: opening + tokenizer(text, add_special_tokens=False)["input_ids"]
text = prompt["text"].replace("{{input}}", "TEXT OF ONE ITEM")
start = encode(text)
"""
_GENERATE = """limit = prompt["max_new_tokens"]
with torch.no_grad():
    ids = model.generate(torch.tensor([start]), do_sample=False, max_new_tokens=limit)
print(tokenizer.decode(ids[0, len(start):], skip_special_tokens=True))"""
_SCORE = """close = prompt["closing_token_id"]
scores = {{}}
for label, ending in prompt["endings"].items():
    ids = encode(text + ending) + ([] if close is None else [close])
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    parts = [logprobs[i - 1, ids[i]].item() for i in range(len(start), len(ids))]
    scores[label] = {normalised} - (prompt["label_offsets"] or {{}}).get(label, 0.0)
print(max(scores, key=scores.get))"""
_NORMALISED = {
    "sum": "sum(parts)",
    "token": "sum(parts) / len(parts)",
    "byte": "sum(parts) / len(ending.strip().encode())",
    "first_token": "parts[0]",
    "pmi": "sum(parts)",  # less what the label has without content: the rule's offsets
}


def serve_commands(results: Results, records: RunRecords) -> tuple[ServeCommand, ...]:
    """Commands for the winner; where none is told apart, for the best arm of each sort."""
    names = [results.recommendation.arm]
    if names == [None]:
        names = [results.decision.get(k) for k in ("best_tuned", "best_prompted")]  # type: ignore[misc]
    found: list[ServeCommand] = []
    for name in dict.fromkeys(n for n in names if isinstance(n, str)):
        method = records.arm_specs[name].method
        if method in ("given", "linear_probe"):  # a probe cannot answer new rows yet
            continue
        found.append(_predict(name, records))
        if method != "tfidf":
            found += _directories(name, records)
    return tuple(found)


def _predict(name: str, records: RunRecords) -> ServeCommand:
    run = shlex.quote(str(records.path))
    return ServeCommand(
        arm=name,
        title="Answer a file of new rows",
        text=f"python -m launch.predict {run} arm={name} new.csv answers.csv",
        note="CSV or JSONL with the run's own columns, no labels. Answers are made as they were"
        " measured here; the same command goes on after an interruption.",
    )


def _directories(name: str, records: RunRecords) -> list[ServeCommand]:
    """The exported directory, and what serves it."""
    run, out = shlex.quote(str(records.path)), f"{EXPORTED}/{name}"
    found = [
        ServeCommand(
            arm=name,
            title="Make it a directory of its own",
            text=f"python -m launch.export {run} arm={name} {out} merge=true",
            note="A whole model in safetensors with tokenizer and chat template, and the arm's"
            " prompt as the model sees it, in prompt.json.",
        ),
        ServeCommand(
            arm=name,
            title="Serve that directory with vLLM",
            text=f"vllm serve {out} --served-model-name {name}",
            note="Send the text of prompt.json, with the item in the place of {input}, to"
            ' /v1/completions with "add_special_tokens": false.'
            f" {_served_note(records.arms[name].rule)}",
        ),
    ]
    adapter = _adapter(name, records)
    if adapter is not None:
        found.append(adapter)
    snippet = _snippet(name, records, out)
    return [*found, *([snippet] if snippet is not None else [])]


def _served_note(rule: AnswerRule | None) -> str:
    if rule is None or rule.answer_by == "generate":
        return "The measured answers were generated greedily or as engine.temperature says."
    return (
        "The measured answers are the label with the largest score, not generated text: score the"
        " labels as below, or generate and measure again with answer_by=generate."
    )


def _adapter(name: str, records: RunRecords) -> ServeCommand | None:
    """One base model with this arm's adapter beside others; plain LoRA only."""
    spec = records.arm_specs[name]
    owner = spec.on if spec.on in records.arm_specs else name
    assert owner is not None
    method = (records.config.get("arms") or {}).get(owner) or {}
    directory = records.model.get("directory")
    if method.get("kind") != "lora" or method.get("use_dora") or not directory:
        return None
    rank = int(method.get("lora_rank") or 0)
    allowed = next((r for r in VLLM_RANKS if r >= rank), None)
    if allowed is None or not spec.is_same_base:
        return None
    choice = records.arms[name].checkpoint
    variant = "final" if choice is None else choice.variant
    checkpoint = shlex.quote(f"{records.path}/arms/{owner}/{variant}/checkpoint")
    return ServeCommand(
        arm=name,
        title="Or serve many adapters on one base model",
        text=f"vllm serve {shlex.quote(str(directory))} --enable-lora --max-lora-rank {allowed}"
        f" --lora-modules {owner}={checkpoint}",
        note=f"Ask for model {owner}; the prompt is the same.",
    )


def _snippet(name: str, records: RunRecords, out: str) -> ServeCommand | None:
    """A few lines of plain transformers; None for arms that ask more than once."""
    rule, spec = records.arms[name].rule, records.arm_specs[name]
    is_scored = rule is not None and rule.answer_by == "score"
    has_labels = records.task.get("kind") == "classification"
    several = spec.prompt == "chain_of_thought" or (rule is not None and rule.is_voted)
    if several or is_scored and (rule is None or not has_labels):
        return None
    body = _GENERATE
    if is_scored and rule is not None:
        body = _SCORE.format(normalised=_NORMALISED[rule.normalisation])
    return ServeCommand(
        arm=name,
        title="Or answer one item with plain transformers",
        text=_HEAD.format(where=out) + body,
        note="After the export above.",
    )
