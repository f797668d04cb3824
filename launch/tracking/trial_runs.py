"""The trials of a search in W&B: a run each, with the same keys as any arm's.

A trial's run starts at its first record and ends with its last, so that a trial that never began
costs nothing. Its config has the setting by field, numbers as numbers: what W&B's parallel
coordinates and field importance read over the group. Its axes count what the trial trained, as
those of an arm do, so that a sweep lies over a single run; what its rungs cost stands in its sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conf.hashing import plain
from conf.records import TrainRecord
from conf.sweep_records import UNFINISHED, RungRecord, SweepChoice, TrialRecord
from evaluation.search.values import is_number, label_of, shown_value, without_texts
from launch.search.trials import Trial
from launch.tracking.rows import Spent, WandbRun, axes, metric_row, train_row

Key = tuple[str, int]
TrialEvent = TrainRecord | RungRecord | TrialRecord


@dataclass(kw_only=True, slots=True)
class TrialRuns:
    """W&B runs of trials.

    trials: of each searched arm. price: USD per device-second. open: starts a run; None where W&B
    did not. guarded: calls, and turns a failure into a warning. uploads_text: prompt texts may
    leave; else an instruction is known by its number.
    """

    trials: Mapping[str, Sequence[Trial]]
    price: float | None
    num_train_labels: int
    open: Callable[[WandbRun], Any]
    guarded: Callable[..., None]
    uploads_text: bool = False
    _runs: dict[Key, Any] = field(default_factory=dict)
    _ended: set[Key] = field(default_factory=set)
    _spent: dict[Key, Spent] = field(default_factory=dict)
    _scored: dict[Key, RungRecord] = field(default_factory=dict)
    _values: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def event(self, arm: str, event: TrialEvent) -> None:
        """Log a step, a rung, or the end of a trial; nothing comes after its end."""
        assert event.trial is not None, "a record of a trial"
        key = (arm, event.trial)
        if key in self._ended:
            return
        spent = self._spent.setdefault(key, Spent())
        if isinstance(event, TrainRecord):
            spent.train(event, num_train_labels=self.num_train_labels)
            self._log(key, train_row(event, spent, price=self.price))
        elif isinstance(event, RungRecord):
            self._rung(key, event, spent)
        elif event.status != UNFINISHED:
            self._end(key, event)

    def _rung(self, key: Key, record: RungRecord, spent: Spent) -> None:
        if not record.step:  # a prompt, which spends on its answers alone
            spent.tokens += record.tokens
            spent.device_seconds += record.device_seconds
            spent.labels = max(spent.labels, record.value.n or 0)
        self._scored[key] = record
        row = metric_row(record.value, metric=record.metric)
        self._log(key, row | {"search/rung": record.rung, "search/step": record.step})

    def _log(self, key: Key, row: Mapping[str, float]) -> None:
        run = self._run(key)
        if run is not None:
            spent = self._spent[key]
            self.guarded(run.log, axes(spent, price=self.price) | dict(row))

    def _end(self, key: Key, record: TrialRecord) -> None:
        """The last numbers of a trial; its run is over."""
        run = self._run(key)
        self._ended.add(key)
        if run is None:
            return
        last = self._scored.get(key)
        row: dict[str, Any] = {
            "search/status": record.status,
            "search/rung": record.rung,
            "search/value": None if last is None else last.value.value,
            "search/value_low": None if last is None else last.value.low,
            "search/value_high": None if last is None else last.value.high,
            "search/num_items": None if last is None else last.value.n,
            "search/metric": None if last is None else last.metric,
            "search/steps": record.steps,
            "search/tokens": record.tokens,
            "search/device_seconds": record.device_seconds,
            "search/usd": record.usd,
            "search/trained_parameters": record.trained_parameters,
        }
        self.guarded(run.summary.update, {k: v for k, v in row.items() if v is not None})
        self.guarded(run.finish)

    def close(self) -> None:
        """End the runs of trials that did not."""
        for key, run in self._runs.items():
            if run is not None and key not in self._ended:
                self._ended.add(key)
                self.guarded(run.finish)

    def chosen(self, arm: str, choice: SweepChoice) -> dict[str, Any]:
        """What the arm's own run is to know of the choice: the setting by field, its trial."""
        return {
            **self._config(arm, choice.trials[0]),
            "trial": choice.trials[0],
            "setting": choice.setting,
        }

    def _run(self, key: Key) -> Any:
        if key not in self._runs:
            arm, number = key
            trial = self._trial(arm, number)
            config = self._config(arm, number)
            replicate = {} if trial is None else _replicate(trial)
            others = [f"+{k}={v}" for k, v in replicate.items() if v]
            name = " ".join([arm, label_of(config), *others])
            self._runs[key] = self.open(
                WandbRun(
                    key=f"{arm}-t{number}",
                    name=name.strip() if config else f"{arm} trial {number}",
                    job_type="trial",
                    config={
                        "arm": arm,
                        "kind": "" if trial is None else trial.arm.kind,
                        **config,
                        **replicate,
                        "trial": number,
                        **({} if trial is None else {"setting": trial.setting}),
                    },
                )
            )
        return self._runs[key]

    def _trial(self, arm: str, number: int) -> Trial | None:
        return next((t for t in self.trials.get(arm, ()) if t.number == number), None)

    def _config(self, arm: str, number: int) -> dict[str, Any]:
        """The setting of a trial as W&B may have it, numbers as numbers."""
        if arm not in self._values:
            every = [{f: plain(v) for f, v in t.values} for t in self.trials.get(arm, ())]
            self._values[arm] = every if self.uploads_text else without_texts(every)
        trials = self.trials.get(arm, ())
        for trial, values in zip(trials, self._values[arm], strict=True):
            if trial.number == number:
                return {f: v if is_number(v) else shown_value(v) for f, v in values.items()}
        return {}


def _replicate(trial: Trial) -> dict[str, int]:
    return {"seed": trial.seed, "draw": trial.draw}
