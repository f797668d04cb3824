"""Weights & Biases: a mirror of the records, one run per arm, one per trial, one summary run.

The journal is the truth; tracking may never slow, lose or end a run once it has started. Numbers
only: item texts, prompts and completions stay in the run directory.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from conf.choices import WandbMode
from conf.errors import ConfigError
from conf.hashing import sha256_of
from conf.records import CurvePoint, SampleRecord, TrainRecord
from conf.resolve import Arm
from conf.results import Results
from conf.schema import RunConfig
from conf.sweep_records import RungRecord, SweepChoice, TrialRecord
from evaluation.search.values import is_text, last_name
from evaluation.statistics import wilson
from launch.search.trials import Trial
from launch.tracking.rows import (
    Spent,
    WandbRun,
    axes,
    final_row,
    label_rows,
    metric_row,
    train_row,
)
from launch.tracking.trial_runs import TrialRuns

X_AXES = ("progress/usd", "progress/tokens", "progress/labels")
# A prompted arm's running accuracy is logged after every so many test items.
ITEMS_PER_POINT = 10
MAX_WARNINGS = 100


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


FREE_BYTES = 2**20  # with less, what W&B writes at the end of a run may not have found room


@dataclass(kw_only=True, slots=True, frozen=True)
class Alert:
    """What W&B passes on by mail or chat. level: INFO | WARN | ERROR."""

    title: str
    text: str
    level: str


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
        searches: the trials of each arm that is searched.
    """

    config: RunConfig
    name: str
    directory: Path
    arms: Mapping[str, Arm]
    num_train_labels: int
    mode: Literal["online", "offline", "off"]
    group: str
    swept: Mapping[str, object] = field(default_factory=dict)
    searches: Mapping[str, Sequence[Trial]] = field(default_factory=dict)
    attempt: str = field(default_factory=lambda: format(int(time.time()), "x"))
    warnings: list[str] = field(default_factory=list)
    _runs: dict[str, Any] = field(default_factory=dict)
    _spent: dict[str, Spent] = field(default_factory=dict)
    _num_failures: int = 0
    _trials: TrialRuns = field(init=False)
    _has_lost_server: bool = False

    def __post_init__(self) -> None:
        """The runs of trials share everything with those of arms."""
        self._trials = TrialRuns(
            trials=self.searches,
            price=self.config.pricing.usd_per_device_second,
            num_train_labels=self.num_train_labels,
            open=self._start,
            guarded=self._guarded,
            uploads_text=self.config.tracking.upload_text,
        )

    def event(self, arm: str | None, event: Any, *, job_seconds: float, devices: int) -> None:
        """Log what an event adds to the arm's curves.

        job_seconds: wall seconds of the running job so far.
        """
        if self.mode == "off" or arm is None or "@" in arm:  # a label curve's runs come at the end
            return
        if isinstance(event, RungRecord | TrialRecord) or getattr(event, "trial", None) is not None:
            self._trials.event(arm, event)
            return
        price = self.config.pricing.usd_per_device_second
        spent = self._spent.setdefault(arm, Spent())
        if isinstance(event, TrainRecord):
            spent.train(event, num_train_labels=self.num_train_labels)
            self._log(arm, self._axes(spent) | train_row(event, spent, price=price))
        elif isinstance(event, SweepChoice):
            self._chosen(arm, event)
        elif isinstance(event, CurvePoint):
            at = Spent(
                tokens=event.tokens, device_seconds=event.device_seconds, labels=spent.labels
            )
            self._log(arm, self._axes(at) | metric_row(event.value))
        elif isinstance(event, SampleRecord) and event.set == "test" and event.answer is not None:
            spent.tokens += (event.prompt_tokens or 0) + (event.completion_tokens or 0)
            spent.num_items += 1
            spent.score += _score(event)
            if spent.num_items % ITEMS_PER_POINT == 0:
                value = wilson(spent.score, spent.num_items)
                extra = job_seconds * devices
                self._log(arm, self._axes(spent, extra_device_seconds=extra) | metric_row(value))

    def _chosen(self, arm: str, choice: SweepChoice) -> None:
        """Let an arm's run know the setting it answers with."""
        run = self._run(arm)
        if run is not None:
            allows_change = True  # of a key that it was started with
            self._guarded(run.config.update, self._trials.chosen(arm, choice), allows_change)

    def _axes(self, spent: Spent, *, extra_device_seconds: float = 0.0) -> dict[str, float]:
        price = self.config.pricing.usd_per_device_second
        return axes(spent, price=price, extra_device_seconds=extra_device_seconds)

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

    def finish(self, results: Results | None, *, alert: Alert | None = None) -> None:
        """Log the final numbers, one summary run, and close everything within its time limit.

        alert: how the run ended; sent where tracking.alert=true.
        """
        if self.mode == "off":
            return
        self._trials.close()
        if results is not None:
            for arm, row in label_rows(results.label_curve):
                self._log(arm, row)
            for arm, result in results.arms.items():
                spent = self._spent.setdefault(arm, Spent())
                spent.labels = result.labels_used or spent.labels
                self._log(arm, self._final_axes(arm, results) | final_row(result))
            summary = {
                f"{arm}/{k}": v for arm, r in results.arms.items() for k, v in final_row(r).items()
            }
            self._log("summary", summary)
        if alert is not None and self.config.tracking.alert:
            run = self._run("summary")
            if run is not None:
                self._guarded(run.alert, alert.title, alert.text, alert.level)
        for run in self._runs.values():
            if run is None:  # W&B did not start for this arm, and a warning says so
                continue
            before = self._num_failures
            self._guarded(run.finish)
            if self._num_failures > before:  # gone: it is not waited for 20 s once more by each arm
                break
        self._warn_of_a_full_disk()

    def _warn_of_a_full_disk(self) -> None:
        """W&B does not say that it could not write its files; the run's own records are checked."""
        files = self.directory / "wandb"
        free = shutil.disk_usage(files).free if files.is_dir() else FREE_BYTES
        if free < FREE_BYTES:
            self.warnings.insert(
                0,
                f"W&B: {files} is on a disk with {free:,} bytes free: its files may lack rows. "
                "Nothing is missing in the run's own records.",
            )

    def _final_axes(self, arm: str, results: Results) -> dict[str, float]:
        spent = self._spent[arm]
        lines = [line for line in results.ledger if line.arm == arm]
        seconds = sum(line.device_seconds for line in lines)
        spent.device_seconds = max(spent.device_seconds, seconds)
        spent.tokens = max(spent.tokens, sum(line.tokens for line in lines))
        return self._axes(spent)

    def how_to_sync(self) -> str | None:
        """The line that tells how to upload an offline run."""
        if self.mode == "off" or not (self._runs or self.searches):
            return None
        if self.mode == "offline" and not self._has_lost_server:
            return f"W&B offline; upload with: wandb sync {self.directory}/wandb/offline-run-*"
        if self.warnings:
            files = f"{self.directory}/wandb/*run-*"
            return f"W&B did not get all; upload with: wandb sync --no-skip-online {files}"
        return None

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
            self._num_failures += 1
            if len(self.warnings) < MAX_WARNINGS:  # a server that is gone fails with every row
                self.warnings.append(f"W&B: {type(error).__name__}: {error}")

    def _run(self, arm: str) -> Any:
        if arm not in self._runs:
            self._runs[arm] = self._start(self._of_arm(arm))
        return self._runs[arm]

    def _of_arm(self, arm: str) -> WandbRun:
        kind = self.arms[arm].kind if arm in self.arms else "summary"
        is_tuned = arm in self.arms and self.arms[arm].is_tuned
        job_type = "summary" if kind == "summary" else "train" if is_tuned else "prompt"
        name = " ".join([arm, *(f"{k}={v}" for k, v in self._swept().items())])
        return WandbRun(key=arm, name=name, job_type=job_type, config={"arm": arm, "kind": kind})

    def _swept(self) -> dict[str, object]:
        """The values of a run of a sweep as W&B may have them: a prompt text is known by a hash."""
        if self.config.tracking.upload_text:
            return dict(self.swept)
        return {
            k: f"{last_name(k)} {sha256_of(v)[:8]}" if is_text(k, v) else v
            for k, v in self.swept.items()
        }

    def _start(self, asked: WandbRun) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DATA_DIR", str(self.directory / "wandb"))
        import wandb

        try:
            run = wandb.init(
                project=self.config.tracking.project,
                entity=self.config.tracking.entity,
                id=f"{self.name}-{asked.key}-{self.attempt}"[-64:],
                name=asked.name[:128],
                group=self.group,
                job_type=asked.job_type,
                mode="online" if self.mode == "online" else "offline",
                dir=str(self.directory),
                reinit="create_new",
                config={
                    "task": self.config.task.name,
                    "model": self.config.model.name,
                    "run": self.name,
                    **self._swept(),
                    **asked.config,
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
            if self.mode == "offline":
                return None
            # What did not start has no file, and each that does not takes the 10 s again. Its id
            # stays in use.
            self.mode, self._has_lost_server = "offline", True
            self.attempt = f"{self.attempt}o"
            return self._start(asked)
        for axis in X_AXES:
            run.define_metric(axis)
        run.define_metric("train/*", step_metric="progress/tokens")
        run.define_metric("eval/*", step_metric="progress/usd")
        return run


def shut_down() -> None:
    """End W&B's service before Python does: its own exit hook prints a traceback where it is gone.

    Once per process, after the last run.
    """
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        with suppress(Exception):  # a mirror; what did not arrive has been told
            wandb.teardown()


def _score(record: SampleRecord) -> float:
    """An answer's score as the arm's metric counts it: calibrated where the arm calibrates."""
    if record.is_correct_calibrated is not None:
        return float(record.is_correct_calibrated)
    return record.score or 0.0
