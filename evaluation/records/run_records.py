"""A run directory as typed records (reads files, computes nothing).

A process that was killed may leave its last line half written: such a line is skipped and counted.
A broken line anywhere else is refused with file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from conf.errors import DataError
from conf.label_results import LabelPlace
from conf.records import (
    AnswerRule,
    CurvePoint,
    Item,
    JournalEvent,
    LedgerLine,
    PromptText,
    SampleRecord,
    TrainingData,
    TrainRecord,
    TrainSummary,
    from_dict,
)
from conf.results import CHECKPOINT_CHOSEN, CheckpointChoice
from conf.run_groups import DecisionConfig, PricingConfig
from evaluation.records.search_records import SearchRecords, search_records

T = TypeVar("T")

ASKED_BESIDES = ("control:", "probes:", "probes_base:")  # jobs whose failure leaves the arm whole


@dataclass(kw_only=True, slots=True, frozen=True)
class ArmSpec:
    """What an arm was asked to be, as far as reports need it."""

    name: str
    method: str  # prompt | lora | full | instruction | tfidf | given
    on: str | None = None  # another arm of the run, or a checkpoint directory
    prompt: str = "zero_shot"
    num_shots: int = 0
    is_same_base: bool = True
    base: str = ""  # its model override as JSON; empty: the model of the run
    is_retrieved: bool = False  # shots come from all training items
    is_rule_fixed: bool = False  # validation labels choose nothing
    hosted_model: str | None = None  # the model's name at its endpoint
    given_request_usd: float | None = None
    given_fixed_usd: float | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class ArmRecords:
    """Everything one arm wrote, in the order it was written; a later answer replaces an earlier.

    train: of a searched arm the steps of the trial that was chosen; search has those of all.
    """

    samples: tuple[SampleRecord, ...] = ()
    train: tuple[TrainRecord, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    rule: AnswerRule | None = None
    train_summary: TrainSummary | None = None
    training_data: TrainingData | None = None
    checkpoint: CheckpointChoice | None = None  # where it is not simply the last
    search: SearchRecords | None = None  # of an arm that was searched
    status: str = "stopped"  # done | failed | refused | stopped
    error: str | None = None
    is_reused: bool = False


@dataclass(kw_only=True, slots=True, frozen=True)
class RunRecords:
    """One run, read back."""

    path: Path
    name: str
    experiment: str
    command: str
    config: Mapping[str, Any]  # the resolved configuration, as written
    task: Mapping[str, Any]
    model: Mapping[str, Any]
    hardware: Mapping[str, Any]
    versions: Mapping[str, Any]
    commit: str | None
    is_dirty: bool | None
    decision: DecisionConfig
    pricing: PricingConfig
    arm_specs: Mapping[str, ArmSpec]
    arms: Mapping[str, ArmRecords]
    items: Mapping[str, Item]
    prompts: tuple[PromptText, ...]
    ledger: tuple[LedgerLine, ...]
    spent_now: tuple[LedgerLine, ...]  # lines of the last invocation that were really paid for
    exit_code: int | None
    num_broken_lines: int = 0
    shows_text: bool = True
    jobs: tuple[Mapping[str, Any], ...] = ()
    label_places: tuple[LabelPlace, ...] = ()  # of a label curve
    label_runs: Mapping[str, ArmRecords] = field(default_factory=dict)  # by name of their records

    def latency_devices(self, arm: str) -> int:
        """Devices reserved while the arm's requests were timed: its job's, else the machine's."""
        for job in self.jobs:
            if job.get("arm") == arm and job.get("kind") == "latency" and job.get("devices"):
                return int(job["devices"])
        return int(self.hardware.get("devices") or 1)

    def base_arms(self, arm: str) -> tuple[str, ...]:
        """The arm and the arms of this run that it stands on, itself first."""
        names = [arm]
        while (on := self.arm_specs[names[-1]].on) in self.arm_specs and on not in names:
            assert on is not None
            names.append(on)
        return tuple(names)


@dataclass(slots=True)
class _Reader:
    """Reads JSON files of one directory and counts half-written last lines."""

    root: Path
    num_broken_lines: int = field(default=0)

    def json(self, name: str) -> dict[str, Any]:
        path = self.root / name
        if not path.is_file():
            raise DataError(
                str(path),
                found="no such file",
                expected="a run directory",
                remedy="give the directory that holds config.json, e.g. outputs/<run>",
            )
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(str(path), found=str(error), expected="a JSON object") from None
        if not isinstance(value, dict):
            raise DataError(str(path), found=type(value).__name__, expected="a JSON object")
        return value

    def lines(self, name: str, cls: type[T]) -> Iterator[T]:
        """Records of a JSONL file; a file that is not there has none."""
        path = self.root / name
        if not path.is_file():
            return
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    yield from_dict(cls, json.loads(line))
                except (ValueError, TypeError, AttributeError) as error:
                    if not any(rest.strip() for rest in stream):
                        self.num_broken_lines += 1
                        return
                    raise DataError(
                        f"{path}:{number}",
                        found=str(error),
                        expected=f"one {cls.__name__} as a JSON object",
                        remedy="a line inside the file is damaged; run the command again in a new "
                        "run",
                    ) from None


def read_run(path: Path | str) -> RunRecords:
    """Read a run directory. Raises DataError where it is not one, or is damaged."""
    reader = _Reader(Path(path))
    head = reader.json("config.json")
    config = head.get("config") or {}
    engine = config.get("engine") or {}
    specs = {
        name: _spec(name, arm or {}, engine) for name, arm in (config.get("arms") or {}).items()
    }
    events = tuple(reader.lines("journal.jsonl", JournalEvent))
    arms = {name: _arm(reader, name, events) for name in specs}
    specs = {name: _chosen_spec(spec, arms[name].search) for name, spec in specs.items()}
    specs = {name: _on_its_base(spec, specs) for name, spec in specs.items()}
    for name, spec in specs.items():
        arms[name] = _inherit_failure(arms, name, on=spec.on)
    ledger, spent_now = _ledger(events)
    exit_codes = [e.data.get("exit_code") for e in events if e.event == "run_finished"]
    items = {item.id: item for item in reader.lines("items.jsonl", Item)}
    prompts = {p.prompt_sha256: p for p in reader.lines("prompts.jsonl", PromptText)}
    places = tuple(from_dict(LabelPlace, place) for place in head.get("label_places") or ())
    runs = {place.records for place in places} - specs.keys()
    plan_path = reader.root / "plan.json"
    return RunRecords(
        path=reader.root,
        name=(config.get("run") or {}).get("name") or reader.root.resolve().name,
        experiment=str(head.get("exp") or ""),
        command=str(head.get("command") or ""),
        config=config,
        task=head.get("task") or {},
        model=head.get("model") or {},
        hardware=head.get("hardware") or {},
        versions=head.get("versions") or {},
        commit=head.get("commit"),
        is_dirty=head.get("is_dirty"),
        decision=from_dict(DecisionConfig, config.get("decision") or {}),
        pricing=_pricing(config.get("pricing") or {}),
        arm_specs=specs,
        arms=arms,
        items=items,
        prompts=tuple(prompts.values()),
        ledger=ledger,
        spent_now=spent_now,
        exit_code=exit_codes[-1] if exit_codes else None,
        num_broken_lines=reader.num_broken_lines,
        shows_text=(config.get("report") or {}).get("text", "full") != "none",
        jobs=tuple(reader.json("plan.json").get("jobs") or ()) if plan_path.is_file() else (),
        label_places=places,
        label_runs={name: _arm(reader, name, events) for name in sorted(runs)},
    )


def _pricing(data: dict[str, Any]) -> PricingConfig:
    unknown = {"name": "unknown", "source": "none", "date": "none"}
    return from_dict(PricingConfig, {**unknown, **data})


def _spec(name: str, arm: Mapping[str, Any], engine: Mapping[str, Any]) -> ArmSpec:
    """An arm's entry of the configuration; a model override or a hosted model is another base.

    engine: the run's, for what the arm does not override.
    """
    override = {k: v for k, v in (arm.get("model") or {}).items() if v is not None and k != "note"}
    own = {k: v for k, v in (arm.get("engine") or {}).items() if v is not None}
    is_hosted = "engine" in arm and {**engine, **own}.get("name") == "openai"
    return ArmSpec(
        name=name,
        method=str(arm.get("kind") or "prompt"),
        on=arm.get("on"),
        prompt=str(arm.get("prompt") or "zero_shot"),
        num_shots=int(arm.get("num_shots") or 0),
        is_same_base=not override and not is_hosted,
        base=json.dumps(override, sort_keys=True) if override else "",
        hosted_model=str({**engine, **own}.get("model")) if is_hosted else None,
        is_retrieved=arm.get("shot_selection") == "retrieved",
        is_rule_fixed=_is_rule_fixed(arm),
        given_request_usd=arm.get("request_usd"),
        given_fixed_usd=arm.get("fixed_usd"),
    )


def _on_its_base(spec: ArmSpec, specs: Mapping[str, ArmSpec]) -> ArmSpec:
    """An arm on another one of the run answers with that arm's model (`conf.resolve`)."""
    under = specs.get(spec.on or "")
    if under is None:
        return spec
    return replace(spec, base=under.base, is_same_base=under.is_same_base)


def _is_rule_fixed(arm: Mapping[str, Any]) -> bool:
    """Whether the user has named how labels are scored, so that validation has one candidate."""
    is_calibrated = arm.get("calibration") in ("contextual", "batch")
    is_normalised = arm.get("normalisation", "auto") not in ("auto", "sum")
    return arm.get("answer_by") == "score" and (is_calibrated or is_normalised)


def _chosen_spec(spec: ArmSpec, search: SearchRecords | None) -> ArmSpec:
    """An arm with the setting that its search has chosen."""
    values = {} if search is None else search.chosen_values()
    return replace(
        spec,
        prompt=str(values.get("prompt", spec.prompt)),
        num_shots=int(values.get("num_shots", spec.num_shots)),
    )


def _arm(reader: _Reader, name: str, events: tuple[JournalEvent, ...]) -> ArmRecords:
    folder = f"arms/{name}"
    mine = [e for e in events if e.arm == name or e.data.get("arm") == name]
    samples = {_answer_key(s): s for s in reader.lines(f"{folder}/samples.jsonl", SampleRecord)}
    train = {
        (t.train_seed, t.trial, t.num_labels, t.step): t
        for t in reader.lines(f"{folder}/train.jsonl", TrainRecord)
    }
    curve = {
        (c.train_seed, c.step, c.metric): c
        for c in reader.lines(f"{folder}/curve.jsonl", CurvePoint)
    }
    rules = [from_dict(AnswerRule, e.data) for e in mine if e.event == "answer_rule"]
    summaries = [from_dict(TrainSummary, e.data) for e in mine if e.event == "train_summary"]
    data = [from_dict(TrainingData, e.data) for e in mine if e.event == "training_data"]
    now = [e for e in _of_last_invocation(events) if e.arm == name]
    chosen = [from_dict(CheckpointChoice, e.data) for e in now if e.event == CHECKPOINT_CHOSEN]
    status, error = _status(mine, has_test=any(s.set == "test" for s in samples.values()))
    done = [e for e in mine if e.event == "job_done"]
    search = search_records(now, steps=train.values())
    return ArmRecords(
        samples=tuple(samples.values()),
        train=tuple(_own_steps(train.values(), search)),
        curve=tuple(curve.values()),
        rule=rules[-1] if rules else None,
        train_summary=summaries[-1] if summaries else None,
        training_data=data[-1] if data else None,
        checkpoint=chosen[-1] if chosen else None,
        search=search,
        status=status,
        error=error,
        is_reused=bool(done) and all(bool(e.data.get("is_reused")) for e in done),
    )


def _own_steps(steps: Iterable[TrainRecord], search: SearchRecords | None) -> Iterator[TrainRecord]:
    """The steps that led to the arm's checkpoint: all of them, or those of the chosen trial."""
    if search is None:
        yield from steps
    elif search.choice is not None:
        yield from (step for step in steps if step.trial == search.choice.trials[0])


def _of_last_invocation(events: tuple[JournalEvent, ...]) -> tuple[JournalEvent, ...]:
    """What the last command said: a run may be typed again under its name with other settings."""
    starts = [i for i, event in enumerate(events) if event.event == "run_started"]
    return events[starts[-1] :] if starts else events


def _answer_key(s: SampleRecord) -> tuple[object, ...]:
    """What makes two records the same answer, so that a redone job does not count twice."""
    return (
        s.item_id,
        s.set,
        s.repeat,
        s.draw,
        s.paraphrase,
        s.train_seed,
        s.num_shots,
        s.num_labels,
        s.step,
        s.call,
        s.answer_by,
    )


def _status(events: list[JournalEvent], *, has_test: bool) -> tuple[str, str | None]:
    """Failed when a job's last word is a failure; done when the arm answered the test items.

    What is asked besides the task decides nothing: without it the arm has its numbers.
    """
    last: dict[str | None, JournalEvent] = {}
    for event in events:
        if (event.job or "").startswith(ASKED_BESIDES):
            continue
        if event.event in ("job_started", "job_done", "job_failed"):
            last[event.job] = event
    for event in last.values():
        if event.event == "job_failed":
            error = str(event.data.get("error") or "no reason recorded")
            remedy = event.data.get("remedy")
            status = "refused" if event.data.get("is_refused") else "failed"
            return status, f"{error}\n{remedy}" if remedy else error
    is_running = any(event.event == "job_started" for event in last.values())
    if has_test and not is_running:
        return "done", None
    return "stopped", "the run ended before this arm was finished"


def _inherit_failure(arms: Mapping[str, ArmRecords], name: str, *, on: str | None) -> ArmRecords:
    """An arm that never started because the arm it stands on failed has failed too."""
    mine, base = arms[name], arms.get(on or "")
    if mine.status == "stopped" and base is not None and base.status in ("failed", "refused"):
        return replace(mine, status="failed", error=f"not run: the arm it stands on, {on}, failed")
    return mine


def _ledger(
    events: tuple[JournalEvent, ...],
) -> tuple[tuple[LedgerLine, ...], tuple[LedgerLine, ...]]:
    """The bill of all jobs, and the lines that the last invocation really paid for.

    Every invocation and every new attempt states the whole bill of a job again: finished jobs
    marked reused, a killed attempt's work as `redone`. So a job's last statement counts, whole.
    """
    bills: dict[str, list[LedgerLine]] = {}
    stated: set[str] = set()  # jobs that the current invocation has stated
    now: list[LedgerLine] = []
    for event in events:
        if event.event == "run_started":
            stated, now = set(), []
        elif event.event == "job_started" and event.job is not None:
            bills.pop(event.job, None)
            now = [line for line in now if line.job != event.job]
            stated.add(event.job)
        elif event.event == "ledger":
            line = from_dict(LedgerLine, event.data)
            if line.job not in stated:
                bills.pop(line.job, None)
                stated.add(line.job)
            bills.setdefault(line.job, []).append(line)
            if not line.is_reused:
                now.append(line)
    return tuple(line for bill in bills.values() for line in bill), tuple(now)
