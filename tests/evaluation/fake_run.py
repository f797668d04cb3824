"""Writes realistic run directories for tests and screenshots, without running anything."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

from conf.hashing import plain, sha256_of
from conf.records import (
    AnswerRule,
    CurvePoint,
    Item,
    JournalEvent,
    LedgerLine,
    Measured,
    PromptText,
    SampleRecord,
    TrainRecord,
    TrainSummary,
)
from conf.run_groups import DecisionConfig, PriceConfig, PricingConfig
from evaluation.probes.general_set import general_items
from evaluation.statistics import wilson

# arm: accuracy, prompt tokens, seconds a request, kind
SPAM_ARMS = {
    "zero_shot": (0.52, 96, 0.110, "prompt"),
    "few_shot": (0.66, 480, 0.150, "prompt"),
    "chain_of_thought": (0.58, 130, 1.900, "prompt"),
    "role_play": (0.55, 118, 0.120, "prompt"),
    "lora": (0.94, 96, 0.112, "lora"),
    "full": (0.93, 96, 0.105, "full"),
    "few_shot_on_lora": (0.91, 480, 0.155, "prompt"),
    "tfidf": (0.945, 0, 0.0004, "tfidf"),
}
CHEAP_PRICE = PricingConfig(
    name="cpu_core_hour",
    device_hour=PriceConfig(usd=0.0408),
    source="factualminds.com/blog/amazon-ec2-on-demand-pricing-instance-families-2026",
    date="2026-06-17",
)
NO_PRICE = PricingConfig(name="unknown", source="none", date="none")
NASTY = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'


class Writer:
    """Collects records and writes them as a run directory."""

    def __init__(self, root: Path, *, seed: int = 0) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.events: list[JournalEvent] = []
        self.clock = 1.8e9

    def journal(
        self,
        event: str,
        *,
        job: str | None = None,
        arm: str | None = None,
        record: object = None,
        **data: object,
    ) -> None:
        """An event; a record's fields are its data."""
        self.clock += 1.0
        values = plain(data) if record is None else plain(record)
        self.events.append(
            JournalEvent(time=self.clock, event=event, job=job, arm=arm, data=values)
        )

    def ledger(self, arm: str, job: str, purpose: str, *, tokens: int, seconds: float) -> None:
        line = LedgerLine(job=job, arm=arm, purpose=purpose, tokens=tokens, device_seconds=seconds)
        self.journal("ledger", job=job, arm=arm, record=line)

    def lines(self, name: str, records: list[object]) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(plain(r)) + "\n" for r in records), encoding="utf-8")

    def json(self, name: str, value: object) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(json.dumps(plain(value)), encoding="utf-8")


def config_json(
    arms: dict[str, dict[str, object]],
    *,
    name: str,
    pricing: PricingConfig,
    decision: DecisionConfig,
    task: dict[str, object],
    text: str = "full",
) -> dict[str, object]:
    return {
        "config": {
            "arms": arms,
            "pricing": plain(pricing),
            "decision": plain(decision),
            "run": {"root": "outputs", "name": name},
            "report": {"text": text},
        },
        "exp": "compare",
        "command": f"python launch.py +exp=compare run.name={name}",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "is_dirty": False,
        "versions": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "ray": "2.60.0",
            "transformers": "5.23.0",
        },
        "hardware": {"cpu": "2 x AVX-512", "cores": 2, "memory_bytes": 24 << 30, "devices": 2},
        "task": task,
        "model": {
            "name": "smollm2_135m",
            "note": "weights come from a 4-bit file",
            "num_parameters": 134_515_008,
            "sha256": "ab" * 32,
            "directory": "outputs/.cache/models/" + "ab" * 32,
        },
    }


def spam_items(num_test: int, num_train: int, num_validation: int) -> list[Item]:
    sizes = {"test": num_test, "train": num_train, "validation": num_validation}
    words = {"ham": "see you at lunch, number", "spam": "WIN a prize now, call code"}
    items = []
    for split, n in sizes.items():
        for i in range(n):
            label = ("ham", "spam")[i % 2]
            text = f"{words[label]} {split} {i}"
            if split == "test" and i % 5 == 3:
                text = f"{NASTY} {text}"
            items.append(
                Item(
                    id=f"{split}-{i}",
                    split=split,
                    input=text,
                    sha256=sha256_of(text),
                    label=label,
                    slices={"length": "long" if i % 3 else "short"},
                )
            )
    return items


def write_spam_run(
    root: Path,
    *,
    text: str = "full",
    num_test: int = 200,
    num_train: int = 240,
    pricing: PricingConfig = CHEAP_PRICE,
    decision: DecisionConfig | None = None,
    arms: dict[str, tuple[float, int, float, str]] = SPAM_ARMS,
    num_general: int = 0,
) -> Path:
    """Eight finished arms on a two-label task; tuned ones asked so many general items."""
    writer = Writer(root)
    items = spam_items(num_test, num_train, 60) + list(general_items(num_general))
    specs = {name: spec(name, kind) for name, (_, _, _, kind) in arms.items()}
    labels = ["ham", "spam"]
    task = {
        "name": "sms_spam",
        "kind": "classification",
        "scoring": "exact",
        "labels": labels,
        "instruction": "Is this message spam?",
        "facts": {"near_duplicates": 3},
    }
    writer.json(
        "config.json",
        config_json(
            specs,
            name="compare-sms_spam-demo",
            pricing=pricing,
            decision=decision or DecisionConfig(),
            task=task,
            text=text,
        ),
    )
    writer.json("plan.json", {"jobs": [{"id": f"evaluate:{a}", "arm": a} for a in arms]})
    writer.journal("run_started")
    prompts = []
    for name, facts in arms.items():
        prompts.append(
            PromptText(
                prompt_sha256=name,
                arm=name,
                text=f"<system>Label the message.</system>\nMessage: {NASTY}\nLabel:",
            )
        )
        write_label_arm(writer, name, facts, items)
    writer.journal("run_finished", exit_code=0)
    writer.lines("items.jsonl", list(items))
    writer.lines("prompts.jsonl", list(prompts))
    writer.lines("journal.jsonl", list(writer.events))
    return root


def spec(name: str, kind: str) -> dict[str, object]:
    values: dict[str, object] = {"kind": kind, **({"lora_rank": 16} if kind == "lora" else {})}
    if kind != "tfidf":
        values["prompt"] = name if kind == "prompt" and "_on_" not in name else "zero_shot"
        values["model"] = {"name": None, "path": None}
    if name.startswith("few_shot"):
        values["num_shots"] = 8
    if name == "few_shot_on_lora":
        values["on"] = "lora"
    return values


def write_label_arm(
    writer: Writer, name: str, facts: tuple[float, int, float, str], items: list[Item]
) -> None:
    accuracy, prompt_tokens, seconds, kind = facts
    answer_by = "generate" if name == "chain_of_thought" else "score"
    is_calibrated = kind == "prompt" and answer_by == "score"
    samples = []
    for item in items:
        if item.split == "train":
            continue
        if item.split == "general":
            samples += general_answers(name, item) if kind in ("lora", "full") else []
            continue
        samples += answers(writer, name, item, accuracy, prompt_tokens, answer_by, is_calibrated)
    for i in range(8):
        item = items[i]
        took = seconds * writer.random.uniform(0.93, 1.09)
        samples.append(
            SampleRecord(
                arm=name,
                item_id=item.id,
                set="latency",
                answer_by=answer_by,
                prompt_tokens=prompt_tokens,
                completion_tokens=40 if answer_by == "generate" else 0,
                first_token_seconds=took * 0.9,
                total_seconds=took,
                answer="ham",
                target=item.label,
            )
        )
    job = f"evaluate:{name}"
    writer.journal("job_started", job=job, arm=name)
    if kind in ("lora", "full"):
        train_arm(writer, name, kind)
    writer.ledger(name, job, "validation", tokens=60 * prompt_tokens, seconds=60 * seconds)
    writer.ledger(name, job, "test", tokens=200 * prompt_tokens, seconds=200 * seconds)
    writer.ledger(name, job, "latency", tokens=8 * prompt_tokens, seconds=8 * seconds * 2)
    if name == "tfidf":
        writer.ledger(name, job, "reference", tokens=0, seconds=0.6)
    if kind != "tfidf":
        right = round(60 * accuracy)
        rule = AnswerRule(
            arm=name,
            answer_by=answer_by,
            calibration="batch" if is_calibrated else "none",
            label_offsets={"ham": -1.0, "spam": -0.2} if is_calibrated else None,
            validation={"score": wilson(right - 4, 60), f"{answer_by}+batch": wilson(right, 60)},
        )
        writer.journal("answer_rule", job=job, arm=name, record=rule)
    writer.journal("job_done", job=job, arm=name, is_reused=False, seconds=12.0)
    writer.lines(f"arms/{name}/samples.jsonl", list(samples))


def answers(
    writer: Writer,
    name: str,
    item: Item,
    accuracy: float,
    prompt_tokens: int,
    answer_by: str,
    is_calibrated: bool,
) -> list[SampleRecord]:
    assert item.label is not None
    other = "spam" if item.label == "ham" else "ham"
    # Items share a difficulty, so that arms err on the same ones, as they do in life.
    shared = random.Random(item.id).gauss(0, 1)
    own = writer.random.gauss(0, 1)
    is_right = NormalDist().cdf(0.8 * shared + 0.6 * own) < accuracy
    answer = item.label if is_right else other
    raw = answer if not is_calibrated or writer.random.random() < 0.85 else "spam"
    record = SampleRecord(
        arm=name,
        item_id=item.id,
        set=item.split,
        answer_by=answer_by,
        prompt_sha256=name,
        prompt_tokens=prompt_tokens + item_extra(item),
        cached_tokens=prompt_tokens // 2,
        computed_tokens=prompt_tokens // 2 + item_extra(item),
        answer=raw,
        target=item.label,
        is_correct=raw == item.label,
        score=float(raw == item.label),
        calibrated_answer=answer if is_calibrated else None,
        is_correct_calibrated=(answer == item.label) if is_calibrated else None,
        label_logprobs={"ham": -1.2, "spam": -0.4} if answer_by == "score" else None,
    )
    if answer_by == "score":
        return [record]
    thought = replace(
        record,
        call=0,
        answer=None,
        is_correct=None,
        score=None,
        completion="Let me think.",
        completion_tokens=36,
    )
    final = replace(
        record,
        call=1,
        completion=f"Answer: {raw}",
        completion_tokens=4,
        is_format_valid=writer.random.random() < 0.93,
    )
    return [thought, final]


def general_answers(name: str, item: Item) -> list[SampleRecord]:
    """A general item answered by the base model and by the tuned one, which forgets some."""
    difficulty = random.Random(item.id).random()
    lost = 0.12 if name == "full" else 0.03
    return [
        SampleRecord(
            arm=name,
            item_id=item.id,
            set="general",
            step=step,
            answer=item.answer_key if difficulty > limit else "x",
            target=item.answer_key,
            is_correct=difficulty > limit,
        )
        for step, limit in ((None, 0.2), (60, 0.2 + lost))
    ]


def item_extra(item: Item) -> int:
    return len(item.input) // 4


def train_arm(writer: Writer, name: str, kind: str) -> None:
    steps, tokens_per_step = 60, 640
    step_seconds = 1.7 if kind == "lora" else 2.6
    records = [
        TrainRecord(
            arm=name,
            step=s,
            examples=8,
            tokens=tokens_per_step + 7 * (s % 5),
            target_tokens=16,
            loss=2.2 * math.exp(-s / 12) + 0.08 + 0.05 * writer.random.random(),
            learning_rate=1e-3 * (1 - s / 61),
            grad_norm=1.0,
            step_seconds=step_seconds,
            device_seconds=2 * step_seconds,
            usd=None,
        )
        for s in range(1, steps + 1)
    ]
    points = [
        CurvePoint(
            arm=name,
            step=s,
            tokens=s * tokens_per_step,
            device_seconds=s * 2 * step_seconds,
            metric="accuracy",
            value=wilson(round(60 * share), 60),
        )
        for s, share in ((30, 0.85), (60, 0.93))
    ]
    trained = 4_884_480 if kind == "lora" else 134_515_008
    summary = TrainSummary(
        arm=name,
        steps=steps,
        trained_parameters=trained,
        total_parameters=134_515_008 + trained,
        checkpoint_bytes=4 * trained,
        device_seconds=steps * 2 * step_seconds,
        peak_memory_bytes=2_400_000_000,
        examples=480,
        tokens=steps * tokens_per_step,
        target_tokens=steps * 16,
        padding_tokens=900,
        num_truncated=0,
        learning_rate=1e-3,
        world_size=1,
        zero_stage=0,
        shown_row="Message: ... Label:[[ spam<end>]]",
    )
    job = f"train:{name}"
    writer.ledger(
        name, job, "train", tokens=steps * tokens_per_step, seconds=steps * 2 * step_seconds
    )
    writer.ledger(name, job, "padding", tokens=900, seconds=0.0)
    writer.journal("train_summary", job=job, arm=name, record=summary)
    writer.journal("job_done", job=job, arm=name, is_reused=False, seconds=steps * step_seconds)
    writer.lines(f"arms/{name}/train.jsonl", list(records))
    writer.lines(f"arms/{name}/curve.jsonl", list(points))


def write_orders_run(root: Path, *, num_test: int = 60) -> Path:
    """A generation task scored by JSON fields: no price, full failed, two sampled repeats."""
    writer = Writer(root, seed=1)
    arms = {"zero_shot": 0.21, "few_shot": 0.48, "lora": 0.83, "full": 0.0}
    items = [
        Item(
            id=f"test-{i}",
            split="test",
            input=f"two large teas and {i} scones",
            sha256=f"{i:064d}",
            target=json.dumps({"item": "tea", "count": i}),
        )
        for i in range(num_test)
    ]
    specs = {name: spec(name, "prompt" if "shot" in name else name) for name in arms}
    task = {
        "name": "orders",
        "kind": "generation",
        "scoring": "json",
        "labels": [],
        "instruction": "Turn the order into JSON.",
        "facts": {"is_synthetic": True},
    }
    writer.json(
        "config.json",
        config_json(
            specs,
            name="compare-orders-demo",
            pricing=NO_PRICE,
            decision=DecisionConfig(),
            task=task,
        ),
    )
    writer.journal("run_started")
    for name, level in arms.items():
        if name == "full":
            writer.journal("job_started", job="train:full", arm=name)
            writer.ledger(name, "train:full", "train", tokens=900, seconds=41.0)
            writer.journal(
                "job_failed",
                job="train:full",
                arm=name,
                error="the loss is not finite at step 7",
                remedy="write trainer.learning_rate=1e-4",
            )
            continue
        write_generation_arm(writer, name, level, items)
    writer.journal("run_finished", exit_code=1)
    writer.lines("items.jsonl", list(items))
    writer.lines("journal.jsonl", list(writer.events))
    return root


def write_generation_arm(writer: Writer, name: str, level: float, items: list[Item]) -> None:
    job = f"evaluate:{name}"
    writer.journal("job_started", job=job, arm=name)
    samples = []
    for item in items:
        for repeat in range(2):
            score = min(1.0, max(0.0, writer.random.gauss(level, 0.2)))
            samples.append(
                SampleRecord(
                    arm=name,
                    item_id=item.id,
                    set="test",
                    repeat=repeat,
                    answer_by="generate",
                    prompt_tokens=120,
                    computed_tokens=60,
                    cached_tokens=60,
                    completion_tokens=22,
                    completion='{"item": "tea"}',
                    answer=f'{{"item": "tea", "count": {repeat if score < 0.3 else 1}}}',
                    target=item.target,
                    is_correct=score > 0.95,
                    score=score,
                    is_format_valid=score > 0.1,
                )
            )
    for i in range(6):
        samples.append(
            SampleRecord(
                arm=name,
                item_id=items[i].id,
                set="latency",
                answer_by="generate",
                prompt_tokens=120 if name != "few_shot" else 600,
                completion_tokens=22,
                first_token_seconds=0.1,
                total_seconds=(0.9 if name != "few_shot" else 1.6) + 0.05 * i,
                answer="{}",
                target="{}",
            )
        )
    if name == "lora":
        train_arm(writer, name, "lora")
    writer.ledger(name, job, "test", tokens=9000, seconds=30.0)
    rule = AnswerRule(
        arm=name, answer_by="generate", validation={"generate": Measured(value=level, n=20)}
    )
    writer.journal("answer_rule", job=job, arm=name, record=rule)
    writer.journal("job_done", job=job, arm=name, is_reused=True, seconds=9.0)
    writer.lines(f"arms/{name}/samples.jsonl", list(samples))
