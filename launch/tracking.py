"""Weights & Biases: a mirror of the records, one run per arm and one summary run.

The journal is the truth; tracking may never slow, lose or end a run once it has started. Numbers
only: item texts, prompts and completions stay in the run directory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from conf.choices import WandbMode
from conf.errors import ConfigError
from conf.records import CurvePoint, Measured, SampleRecord, TrainRecord
from conf.resolve import Arm
from conf.results import Results
from conf.schema import RunConfig
from evaluation.statistics import wilson

X_AXES = ("progress/usd", "progress/tokens", "progress/labels")
# A prompted arm's running accuracy is logged after every so many test items.
ITEMS_PER_POINT = 10


def mode_of(config: RunConfig) -> Literal["online", "offline", "off"]:
    """online, offline or off; auto is online with a key and offline without one.

    Raises:
        ConfigError: online was asked for and there is no key.
    """
    has_key = bool(os.environ.get("WANDB_API_KEY")) or _has_netrc_key()
    match config.tracking.wandb:
        case WandbMode.off:
            return "off"
        case WandbMode.offline:
            return "offline"
        case WandbMode.online if not has_key:
            raise ConfigError(
                "tracking.wandb",
                found="online, without a key",
                expected="a key in WANDB_API_KEY, or another mode",
                remedy="export WANDB_API_KEY, or write tracking.wandb=offline",
            )
        case WandbMode.online:
            return "online"
        case _:
            return "online" if has_key else "offline"


def _has_netrc_key() -> bool:
    netrc = Path.home() / ".netrc"
    try:
        return netrc.is_file() and "api.wandb.ai" in netrc.read_text(encoding="utf-8")
    except OSError:
        return False


@dataclass(kw_only=True, slots=True)
class _Spent:
    """What an arm has spent and seen so far, for the x-axes."""

    tokens: int = 0
    device_seconds: float = 0.0
    labels: int = 0
    score: float = 0.0
    num_items: int = 0


@dataclass(kw_only=True, slots=True)
class Tracker:
    """Sends records to W&B as they come.

    Args:
        config: the run's configuration.
        name: the run's name.
        directory: the run directory; offline files go below it.
        arms: resolved arms.
        num_train_labels: labelled training examples of the task.
        mode: online, offline or off.
        group: W&B's group: the run's name, or the sweep's.
        swept: the keys in which a run of a sweep differs from the others, and their values.
    """

    config: RunConfig
    name: str
    directory: Path
    arms: Mapping[str, Arm]
    num_train_labels: int
    mode: Literal["online", "offline", "off"]
    group: str
    swept: Mapping[str, object] = field(default_factory=dict)
    attempt: str = field(default_factory=lambda: format(int(time.time()), "x"))
    warnings: list[str] = field(default_factory=list)
    _runs: dict[str, Any] = field(default_factory=dict)
    _spent: dict[str, _Spent] = field(default_factory=dict)

    def event(self, arm: str | None, event: Any, *, job_seconds: float, devices: int) -> None:
        """Log what an event adds to the arm's curves.

        job_seconds: wall seconds of the running job so far.
        """
        if self.mode == "off" or arm is None:
            return
        spent = self._spent.setdefault(arm, _Spent())
        if isinstance(event, TrainRecord):
            self._train(arm, event, spent)
        elif isinstance(event, CurvePoint):
            at = _Spent(
                tokens=event.tokens, device_seconds=event.device_seconds, labels=spent.labels
            )
            self._log(arm, self._axes(at) | _accuracy(event.value))
        elif isinstance(event, SampleRecord) and event.set == "test" and event.answer is not None:
            spent.tokens += event.prompt_tokens + event.completion_tokens
            spent.num_items += 1
            spent.score += _score(event)
            if spent.num_items % ITEMS_PER_POINT == 0:
                value = wilson(spent.score, spent.num_items)
                extra = job_seconds * devices
                self._log(arm, self._axes(spent, extra_device_seconds=extra) | _accuracy(value))

    def _train(self, arm: str, record: TrainRecord, spent: _Spent) -> None:
        spent.tokens += record.tokens
        spent.device_seconds += record.device_seconds
        spent.labels = min(spent.labels + record.examples, self.num_train_labels)
        price = self.config.pricing.usd_per_device_second
        row: dict[str, float] = {
            "train/loss": record.loss,
            "train/learning_rate": record.learning_rate,
            "train/tokens_per_second": record.tokens / max(record.step_seconds, 1e-9),
        }
        row["train/target_tokens_per_second"] = record.target_tokens / max(
            record.step_seconds, 1e-9
        )
        row["train/device_seconds"] = spent.device_seconds
        if record.flops is not None:
            row["train/flops_per_second"] = record.flops / max(record.step_seconds, 1e-9)
        if record.flops_share is not None:
            row["train/flops_share"] = record.flops_share
        if record.peak_memory_bytes:
            row["train/peak_memory_bytes"] = max(record.peak_memory_bytes)
        if price is not None:
            row["train/usd"] = spent.device_seconds * price
        self._log(arm, self._axes(spent) | row)

    def _axes(self, spent: _Spent, *, extra_device_seconds: float = 0.0) -> dict[str, float]:
        price = self.config.pricing.usd_per_device_second
        axes: dict[str, float] = {
            "progress/tokens": spent.tokens,
            "progress/labels": spent.labels,
        }
        if price is not None:
            axes["progress/usd"] = (spent.device_seconds + extra_device_seconds) * price
        return axes

    def upload_text(self, samples: Mapping[str, Sequence[SampleRecord]]) -> None:
        """Log each arm's test answers as a table; only where tracking.upload_text=true."""
        if self.mode == "off" or not self.config.tracking.upload_text:
            return
        import wandb

        columns: list[str | int] = ["item_id", "answer", "target", "completion", "score"]
        for arm, records in samples.items():
            rows: list[Iterable[Any]] = [
                [getattr(r, str(c)) for c in columns] for r in records if r.set == "test"
            ]
            run = self._run(arm)
            if rows and run is not None:
                self._guarded(run.log, {"answers": wandb.Table(columns=columns, data=list(rows))})

    def finish(self, results: Results | None) -> None:
        """Log the final numbers, one summary run, and close everything within its time limit."""
        if self.mode == "off":
            return
        if results is not None:
            for arm, result in results.arms.items():
                spent = self._spent.setdefault(arm, _Spent())
                spent.labels = result.labels_used or spent.labels
                self._log(arm, self._final_axes(arm, results) | _final(result))
            summary = {
                f"{arm}/{k}": v for arm, r in results.arms.items() for k, v in _final(r).items()
            }
            self._log("summary", summary)
        for run in self._runs.values():
            if run is not None:  # None: W&B did not start for this arm, and a warning says so
                self._guarded(run.finish)

    def _final_axes(self, arm: str, results: Results) -> dict[str, float]:
        spent = self._spent[arm]
        lines = [line for line in results.ledger if line.arm == arm]
        seconds = sum(line.device_seconds for line in lines)
        spent.device_seconds = max(spent.device_seconds, seconds)
        spent.tokens = max(spent.tokens, sum(line.tokens for line in lines))
        return self._axes(spent)

    def how_to_sync(self) -> str | None:
        """The line that tells how to upload an offline run."""
        if self.mode != "offline" or not self._runs:
            return None
        return f"W&B offline; upload with: wandb sync {self.directory}/wandb/offline-run-*"

    def _log(self, arm: str, row: dict[str, float]) -> None:
        if row:
            run = self._run(arm)
            if run is not None:
                self._guarded(run.log, row)

    def _guarded(self, call: Any, *arguments: Any) -> None:
        """A mirror that fails later only warns: the run goes on, the journal has everything."""
        try:
            call(*arguments)
        except Exception as error:  # noqa: BLE001 - any failure of a mirror, recorded as a warning
            self.warnings.append(f"W&B: {type(error).__name__}: {error}")

    def _run(self, arm: str) -> Any:
        if arm not in self._runs:
            self._runs[arm] = self._start(arm)
        return self._runs[arm]

    def _start(self, arm: str) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DATA_DIR", str(self.directory / "wandb"))
        import wandb

        kind = self.arms[arm].kind if arm in self.arms else "summary"
        job_type = {"lora": "train", "full": "train", "summary": "summary"}.get(kind, "prompt")
        try:
            run = wandb.init(
                project=self.config.tracking.project,
                entity=self.config.tracking.entity,
                id=f"{self.name}-{arm}-{self.attempt}"[-64:],
                name=" ".join([arm, *(f"{k}={v}" for k, v in self.swept.items())])[:128],
                group=self.group,
                job_type=job_type,
                mode="online" if self.mode == "online" else "offline",
                dir=str(self.directory),
                reinit="create_new",
                config={
                    "arm": arm,
                    "kind": kind,
                    "task": self.config.task.name,
                    "model": self.config.model.name,
                    "run": self.name,
                    **self.swept,
                },
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    disable_git=True,
                    disable_code=True,
                    x_disable_meta=True,
                    x_save_requirements=False,
                    x_disable_stats=True,
                    x_transaction_log_flush_interval=0.5,
                    init_timeout=10,
                    finish_timeout=20,
                ),
            )
        except Exception as error:  # noqa: BLE001 - recorded; the run goes on without this mirror
            self.warnings.append(f"W&B did not start: {type(error).__name__}: {error}")
            return None
        for axis in X_AXES:
            run.define_metric(axis)
        run.define_metric("train/*", step_metric="progress/tokens")
        run.define_metric("eval/*", step_metric="progress/usd")
        return run


def _score(record: SampleRecord) -> float:
    """An answer's score as the arm's metric counts it: calibrated where the arm calibrates."""
    if record.is_correct_calibrated is not None:
        return float(record.is_correct_calibrated)
    return record.score or 0.0


def _accuracy(value: Measured) -> dict[str, float]:
    row = {
        "eval/accuracy": value.value,
        "eval/accuracy_low": value.low,
        "eval/accuracy_high": value.high,
    }
    return {k: v for k, v in row.items() if v is not None}


def _final(result: Any) -> dict[str, float]:
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
