"""The search of LoRA trials as its worker runs it: what it decides, keeps, bills and promotes."""

from __future__ import annotations

import dataclasses
import filecmp
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import JobFailed
from conf.hashing import plain
from conf.records import LedgerLine, TrainRecord, TrainSummary
from conf.resolve import resolve_arms
from conf.sweep_records import RungDecision, RungRecord, SweepChoice, TrialRecord
from evaluation.prepare import training_rows, write_rows
from evaluation.prompts.rendering import Renderer
from evaluation.search.rung_rows import rung_rows
from evaluation.tasks import Task
from launch.attempts import search_ledger
from launch.compose import compose_config
from launch.placement import Machine
from launch.search.messages import RUNG_ROWS, chosen, packed, steps_of
from launch.search.pack_search import PackSearch, run_search
from launch.search.trials import check_space
from launch.train_plan import training_job
from training.job import TrainingStopped, checkpoint_directory

CPU = Machine(devices=1, devices_per_node=1, device="cpu", name="1 x test")
Make = Callable[..., PackSearch]


class Told:
    """A runtime of one worker that keeps all it is told, and may end its process at a record."""

    global_rank = local_rank = 0
    world_size = 1

    def __init__(self, ends_at: Callable[[Any], bool] = lambda record: False) -> None:
        self.records: list[Any] = []
        self.ends_at = ends_at
        self.stops = False

    def report(self, record: object) -> None:
        """Keep a record."""
        self.records.append(record)
        if self.ends_at(record):
            raise Killed

    def should_save(self) -> bool:
        """Whether it was asked to stop."""
        return self.stops

    def of(self, cls: type) -> list[Any]:
        """The records of a type."""
        return [record for record in self.records if isinstance(record, cls)]

    @property
    def trials(self) -> list[TrialRecord]:
        """The last row of each trial."""
        rows = {record.trial: record for record in self.of(TrialRecord)}
        return [rows[number] for number in sorted(rows)]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def make_search(tiny_model_dir: Path, topic_task: Task, tmp_path: Path) -> Make:
    """make_search(*overrides) -> a search of LoRA trials on the topic task."""

    def make(*overrides: str, name: str = "out") -> PackSearch:
        config = compose_config(
            ["+exp=sweep", "model=tiny", "sweep.seed=3", "trainer.epochs=1", *overrides]
        )
        arms = resolve_arms(config)
        arm, trials = arms["lora"], check_space(config, arms)["lora"]
        renderer = Renderer.load(tiny_model_dir, layout="plain")
        rows = training_rows(topic_task, arm, renderer)
        write_rows(rows.rows, tmp_path / "rows.jsonl")
        write_rows(rung_rows(topic_task, arm, renderer), tmp_path / RUNG_ROWS)
        first = training_job(
            arm,
            machine=CPU,
            workers=1,
            device_memory_bytes=None,
            model_dir=str(tiny_model_dir),
        )
        first = dataclasses.replace(
            first,
            rows_path=str(tmp_path / "rows.jsonl"),
            output_dir=str(tmp_path / name),
            usd_per_device_second=0.5,
        )
        return packed(first, trials, rows=tmp_path, sweep=config.sweep)

    return make


def run(search: PackSearch, told: Told | None = None) -> Told:
    told = told or Told()
    run_search(search, told)
    return told


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "adapter_model.safetensors")


def outcome(told: Told) -> tuple[Any, ...]:
    """What a search decided, without seconds and places."""
    decisions = {d.rung: plain(d) for d in told.of(RungDecision)}
    return decisions, [plain(c) for c in told.of(SweepChoice)]


def test_a_search_tells_every_trial_and_promotes_the_choice(make_search: Make) -> None:
    search = make_search("sweep.trials=4")
    told = run(search)
    (choice,) = told.of(SweepChoice)
    trials = told.trials
    assert [t.trial for t in trials] == [0, 1, 2, 3]
    assert {t.status for t in trials} == {"done", "dropped"}
    for trial in trials:
        assert trial.values == search.trials[trial.trial].values
        own = [r for r in told.of(TrainRecord) if r.trial == trial.trial]
        scored = [r for r in told.of(RungRecord) if r.trial == trial.trial]
        assert trial.steps == len(own) and trial.rung == max(r.rung for r in scored)
        seconds = sum(r.device_seconds for r in [*own, *scored])
        assert trial.device_seconds == pytest.approx(seconds)
        assert trial.usd == pytest.approx(0.5 * seconds)
        assert "go on" in trial.reason if trial.status == "dropped" else not trial.reason
    output = Path(search.jobs[0].output_dir)
    final = checkpoint_directory(output, "final")
    own_place = output / "trials" / str(choice.trials[0]) / "final" / "checkpoint"
    names = sorted(p.name for p in final.iterdir())
    assert filecmp.cmpfiles(final, own_place, names, shallow=False) == (names, [], [])
    (summary,) = told.of(TrainSummary)
    assert summary.steps == len(steps_of(told.records)) > 0
    assert told.records[-1] is summary


def test_the_choice_is_the_best_of_the_last_rung(make_search: Make) -> None:
    told = run(make_search("sweep.trials=4", "sweep.halving.enabled=false"))
    last = {r.trial: r for r in told.of(RungRecord)}
    assert {r.rung for r in told.of(RungRecord)} == {0}
    best = max(r.value.value for r in last.values())
    (choice,) = told.of(SweepChoice)
    assert choice.value.value == best == last[choice.trials[0]].value.value
    assert {t.status for t in told.trials} == {"done"}


def test_the_last_value_is_what_the_saved_weights_answer(
    make_search: Make, tiny_model_dir: Path, topic_task: Task
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    search = make_search("sweep.trials=2")
    told = run(search)
    choice = chosen(told.records)
    assert choice is not None
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    final = checkpoint_directory(search.jobs[0].output_dir, "final")
    model = PeftModel.from_pretrained(base, final).eval()
    config = compose_config(["+exp=sweep", "model=tiny"])
    rows = rung_rows(
        topic_task, resolve_arms(config)["lora"], Renderer.load(tiny_model_dir, layout="plain")
    )
    scores: dict[str, list[tuple[float, bool]]] = {}
    for row in rows:
        with torch.no_grad():
            logprobs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        places = [i for i, hit in enumerate(row.target_mask) if hit]
        total = sum(float(logprobs[i - 1, row.input_ids[i]]) for i in places)
        scores.setdefault(row.item_id, []).append((total, row.is_reference))
    sums = torch.tensor([[value for value, _ in labels] for labels in scores.values()])
    right = torch.tensor([[hit for _, hit in labels] for labels in scores.values()])
    assert len(right) == len(topic_task.items["validation"])
    ways = [sums, sums - sums.softmax(1).mean(0).log()]
    found = [float(right.gather(1, w.argmax(1, keepdim=True)).double().mean()) for w in ways]
    assert choice.value.value == pytest.approx(max(found))


@pytest.mark.parametrize(
    "rung", [1, *(pytest.param(rung, marks=pytest.mark.slow) for rung in (0, 2, 3))]
)
@pytest.mark.parametrize("moment", ["scored", "decided", "after"])
def test_killed_at_any_rung_it_decides_again_as_it_did(
    rung: int, moment: str, make_search: Make
) -> None:
    whole = run(make_search("sweep.trials=5", name="whole"))

    def ends_at(record: Any) -> bool:
        if moment == "scored":
            return isinstance(record, RungRecord) and record.rung == rung
        is_it = isinstance(record, RungDecision) and record.rung == rung
        if moment == "decided" or is_it:
            told.is_past = told.is_past or is_it  # type: ignore[attr-defined]
            return moment == "decided" and is_it
        is_later = isinstance(record, TrainRecord) or getattr(record, "status", "") == "done"
        return told.is_past and is_later  # type: ignore[attr-defined]

    told = Told(ends_at)
    told.is_past = False  # type: ignore[attr-defined]
    search = make_search("sweep.trials=5")
    with pytest.raises(Killed):
        run(search, told)
    again = run(search)
    both = Told()
    both.records = [*told.records, *again.records]
    assert outcome(both) == outcome(whole)
    pairs = [checkpoint_directory(s.jobs[0].output_dir, "final") for s in (search,)]
    mine, wanted = weights(pairs[0]), weights(_final(whole, make_search))
    assert mine.keys() == wanted.keys() and all(mine[k].equal(wanted[k]) for k in mine)
    if moment == "after" and rung < 3:  # the rung's state was written: it is not scored again
        assert min(r.rung for r in again.of(RungRecord)) > rung


def _final(whole: Told, make_search: Make) -> Path:
    return checkpoint_directory(
        make_search("sweep.trials=5", name="whole").jobs[0].output_dir, "final"
    )


def test_a_search_that_dies_has_left_a_row_for_each_trial(make_search: Make) -> None:
    """At its second decision: those that are out say why, the others how far they are."""
    told = Told(lambda r: isinstance(r, RungRecord) and r.rung == 2)
    search = make_search("sweep.trials=5")
    with pytest.raises(Killed):
        run(search, told)
    decisions = told.of(RungDecision)
    assert [d.rung for d in decisions] == [0, 1]
    keep, drop = decisions[1].keep, decisions[1].drop
    assert drop and [t.trial for t in told.trials] == [0, 1, 2, 3, 4]
    for row in told.trials:
        assert row.values == search.trials[row.trial].values and row.trained_parameters
        at = next(r for r in told.of(RungRecord) if (r.trial, r.rung) == (row.trial, 1))
        steps = [r for r in told.of(TrainRecord) if r.trial == row.trial and r.step <= at.step]
        scored = [r for r in told.of(RungRecord) if r.trial == row.trial and r.rung <= 1]
        assert (row.rung, row.steps) == (1, at.step)
        assert row.tokens == sum(r.tokens for r in [*steps, *scored])
        assert row.device_seconds == pytest.approx(sum(r.device_seconds for r in [*steps, *scored]))
        assert row.status == ("unfinished" if row.trial in keep else "dropped")
        assert bool(row.reason) == (row.trial in drop)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts all rows that any embedding forwards."""
    count = [0]
    forward = torch.nn.Embedding.forward

    def counting(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        count[0] += ids.numel()
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", counting)
    yield count


def test_the_bill_is_what_the_embedding_forwards(make_search: Make, counted: list[int]) -> None:
    told = run(make_search("sweep.trials=4", "sweep.replicates.seeds=2"))
    winner = chosen(told.records)
    assert winner is not None
    spent = [r for r in told.records if isinstance(r, TrainRecord | RungRecord)]
    lines = search_ledger(spent, winner=winner.trials[0], job="j", arm="lora")
    assert [line.purpose for line in lines] == ["sweep", "train"]
    assert sum(line.tokens for line in [*lines, *told.of(LedgerLine)]) == counted[0]
    assert sum(t.tokens for t in told.trials) == counted[0]
    own = [r.tokens for r in steps_of(told.records)]
    assert lines[1].tokens == sum(own)


def test_a_failed_trial_is_a_row_and_the_others_go_on(make_search: Make) -> None:
    told = run(
        make_search("sweep=grid", "~sweep.space.lora", "+sweep.space.lora={lora_alpha:[16.0,1e30]}")
    )
    good, bad = told.trials
    assert (good.status, bad.status) == ("done", "failed")
    assert "not finite" in bad.reason or "is nan" in bad.reason or "is inf" in bad.reason
    (choice,) = told.of(SweepChoice)
    assert choice.trials == (0,)
    assert any(1 in d.failed for d in told.of(RungDecision))


def test_all_trials_failing_fails_the_search_with_each_reason(make_search: Make) -> None:
    search = make_search(
        "sweep=grid", "~sweep.space.lora", "+sweep.space.lora={lora_alpha:[1e29,1e30]}"
    )
    with pytest.raises(JobFailed, match="all 2 trials failed") as failed:
        run(search)
    for facts in search.trials.values():
        assert facts.label in str(failed.value)


def test_a_budget_ends_with_the_one_that_it_pays_for(make_search: Make) -> None:
    free = run(make_search("sweep.trials=6", "sweep.halving.eta=2", name="free"))
    spent = sum(t.tokens for t in free.trials)
    whole = max(t.tokens for t in free.trials)
    at_first = sum(r.tokens for r in free.of(RungRecord) if r.rung == 0)
    at_first += sum(r.tokens for r in free.of(TrainRecord) if r.step <= 1)
    cap = math.ceil(at_first + 1.5 * whole)
    assert cap < spent
    told = run(
        make_search("sweep.trials=6", "sweep.halving.eta=2", f"sweep.budget.max_tokens={cap}")
    )
    assert sum(t.tokens for t in told.trials) <= cap
    reasons = [r for d in told.of(RungDecision) for r in d.reasons.values()]
    assert any("sweep.budget pays for" in reason for reason in reasons)
    assert [t.status for t in told.trials].count("done") == 1


def test_a_search_that_is_asked_to_stop_goes_on(make_search: Make) -> None:
    whole = run(make_search("sweep.trials=3", name="whole"))
    search = make_search("sweep.trials=3")
    told = Told()
    told.stops = True
    stops = 0
    while True:
        try:
            run(search, told)
            break
        except TrainingStopped:
            stops += 1
    assert stops == max(t.steps for t in told.trials) - 1
    assert outcome(told) == outcome(whole)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_the_halved_choice_is_within_a_standard_error_of_the_grids_best(
    seed: int, make_search: Make
) -> None:
    asked = [f"sweep.seed={seed}", "sweep.trials=9", "trainer.epochs=4"]
    grid = run(make_search(*asked, "sweep.halving.enabled=false", name="grid"))
    halved = run(make_search(*asked))
    last = {r.trial: r.value for r in grid.of(RungRecord)}
    best = max(v.value for v in last.values())
    choice = chosen(halved.records)
    assert choice is not None
    found = last[choice.trials[0]]
    error = math.sqrt(best * (1 - best) / found.n)
    assert found.value >= best - error
    tokens = [sum(t.tokens for t in told.trials) for told in (halved, grid)]
    assert tokens[0] < tokens[1]
