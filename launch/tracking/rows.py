"""What records look like in W&B: keys, axes and configurations (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from conf.label_results import LabelCurve
from conf.records import Measured, TrainRecord
from conf.results import ArmResult


@dataclass(kw_only=True, slots=True)
class Spent:
    """What an arm or a trial has spent and seen so far, for the x-axes."""

    tokens: int = 0
    device_seconds: float = 0.0
    labels: int = 0
    score: float = 0.0
    num_items: int = 0

    def train(self, record: TrainRecord, *, num_train_labels: int) -> None:
        """Add a step."""
        self.tokens += record.tokens
        self.device_seconds += record.device_seconds
        self.labels = min(self.labels + record.examples, num_train_labels)


@dataclass(kw_only=True, slots=True, frozen=True)
class WandbRun:
    """A run of W&B to start. key: unique within our run, and part of its id."""

    key: str
    name: str
    job_type: str
    config: Mapping[str, Any] = field(default_factory=dict)


def axes(spent: Spent, *, price: float | None, extra_device_seconds: float = 0.0) -> dict[str, Any]:
    """The x-axes that all curves share. price: USD per device-second."""
    row: dict[str, float] = {"progress/tokens": spent.tokens, "progress/labels": spent.labels}
    if price is not None:
        row["progress/usd"] = (spent.device_seconds + extra_device_seconds) * price
    return row


def train_row(record: TrainRecord, spent: Spent, *, price: float | None) -> dict[str, float]:
    """A step, its arm's or trial's sums so far included."""
    seconds = max(record.step_seconds, 1e-9)
    row: dict[str, float] = {
        "train/loss": record.loss,
        "train/learning_rate": record.learning_rate,
        "train/tokens_per_second": record.tokens / seconds,
        "train/target_tokens_per_second": record.target_tokens / seconds,
        "train/device_seconds": spent.device_seconds,
    }
    if record.flops is not None:
        row["train/flops_per_second"] = record.flops / seconds
    if record.flops_share is not None:
        row["train/flops_share"] = record.flops_share
    if record.peak_memory_bytes:
        row["train/peak_memory_bytes"] = max(record.peak_memory_bytes)
    if price is not None:
        row["train/usd"] = spent.device_seconds * price
    return row


def metric_row(value: Measured, *, metric: str = "accuracy") -> dict[str, float]:
    """A value with its interval; an arm's metric is eval/accuracy, whichever its task scores by."""
    name = "eval/minus_loss" if metric == "minus_loss" else "eval/accuracy"
    row = {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    return {k: v for k, v in row.items() if v is not None}


def label_rows(curve: LabelCurve | None) -> Iterator[tuple[str, dict[str, float]]]:
    """A label curve's points without noise: the arm, and its value against progress/labels."""
    for point in (p for p in curve.points if not p.noise) if curve is not None else ():
        row = {"progress/labels": float(point.num_labels), **metric_row(point.value)}
        if point.fixed_usd is not None:
            row["progress/usd"] = point.fixed_usd
        yield point.arm, row


def final_row(result: ArmResult) -> dict[str, float]:
    """The arm's final numbers under the contract's keys; unknown ones are left out."""
    row: dict[str, float | None] = {}
    if result.metric is not None:
        row |= {
            "eval/accuracy": result.metric.value,
            "eval/accuracy_low": result.metric.low,
            "eval/accuracy_high": result.metric.high,
        }
    if result.cost is not None:
        row["eval/usd_per_million_tokens"] = result.cost.usd_per_million_tokens.value
        row["eval/usd_per_request"] = result.cost.request_usd.value
    return {k: v for k, v in row.items() if v is not None}
