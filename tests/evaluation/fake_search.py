"""Adds searches to a run directory that fake_run.py wrote, without running anything."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conf.hashing import plain
from conf.records import JournalEvent, LedgerLine, TrainRecord
from conf.sweep_records import SEARCH_EVENTS, RungDecision, RungRecord, SweepChoice, TrialRecord
from evaluation.statistics import mean_interval
from tests.evaluation import fake_run

NUM_ITEMS = 48
STEPS = (4, 7, 21, 50)  # of the rungs of a training
ITEMS = (3, 5, 16, NUM_ITEMS)  # of the rungs of a prompt
KEPT = (1.0, 1 / 3, 1 / 3, 1.0)  # share of the settings that go on after each rung
STEP_TOKENS, STEP_SECONDS, SCORE_TOKENS, SCORE_SECONDS = 400, 0.5, 900, 0.75
WORDINGS = ("Is it spam?", f"Decide whether this is spam. {fake_run.NASTY}", "Ham or spam?")

LORA_SPACE = {
    "lora_rank": [4, 16],
    "trainer": {"learning_rate": {"log_uniform": [1e-5, 3e-2]}, "schedule": ["linear", "cosine"]},
}


@dataclass(kw_only=True, slots=True)
class Search:
    """The records of one synthetic search, in the order in which they are written."""

    arm: str
    events: list[object] = field(default_factory=list)
    steps: list[TrainRecord] = field(default_factory=list)

    def of(self, cls: type) -> list[Any]:
        """Its records of a type."""
        return [event for event in self.events if isinstance(event, cls)]


def lora_search(arm: str = "lora", *, seeds: int = 2, num_rates: int = 8) -> Search:
    """Rates on a log scale with two seeds each; the highest rate fails after its first rung."""
    rates = [10 ** (-4.5 + 3 * i / (num_rates - 1)) for i in range(num_rates)]
    settings = [
        {
            "lora_rank": (4, 16)[i % 2],
            "trainer.learning_rate": float(f"{rate:.3g}"),
            "trainer.schedule": ("linear", "cosine")[i // 2 % 2],
        }
        for i, rate in enumerate(rates)
    ]
    levels = [0.95 - 0.12 * (math.log10(rate) + 3.2) ** 2 for rate in rates]
    return _search(arm, settings, levels, seeds=seeds, fails={num_rates - 1: 1}, is_trained=True)


def prompt_search(arm: str = "few_shot") -> Search:
    """Wordings x shots, one draw each."""
    settings = [{"instruction": text, "num_shots": k} for text in WORDINGS for k in (2, 8)]
    levels = [0.55, 0.6, 0.62, 0.75, 0.5, 0.58]
    return _search(arm, settings, levels, seeds=1, fails={}, is_trained=False)


def _search(
    arm: str,
    settings: Sequence[dict[str, Any]],
    levels: Sequence[float],
    *,
    seeds: int,
    fails: dict[int, int],
    is_trained: bool,
) -> Search:
    """Halves synchronously. fails: setting -> the rung that its seed 0 does not come to."""
    made, rng = Search(arm=arm), random.Random(arm)
    trials = [(s, seed) for s in range(len(settings)) for seed in range(seeds)]
    live = list(range(len(trials)))
    reached: dict[int, tuple[int, int]] = {}  # trial -> last rung, steps
    ended: dict[int, tuple[str, str]] = {}
    records: dict[tuple[int, int], RungRecord] = {}
    for rung in range(len(STEPS)):
        before = STEPS[rung - 1] if rung else 0
        failed = [t for t in live if trials[t][1] == 0 and fails.get(trials[t][0]) == rung]
        for t in live:
            to = before + 2 if t in failed else STEPS[rung]
            if is_trained:
                rate = settings[trials[t][0]]["trainer.learning_rate"]
                made.steps += [
                    _step(arm, t, trials[t][1], s, rate) for s in range(before + 1, to + 1)
                ]
            reached[t] = (rung - 1, to) if t in failed else (rung, to)
            if t not in failed:
                scores = _scores(rng, levels[trials[t][0]], rung, is_trained=is_trained)
                records[t, rung] = _rung(arm, t, rung, scores, is_trained=is_trained)
                made.events.append(records[t, rung])
        means: dict[int, float] = {}
        for s in sorted({trials[t][0] for t in live} - {trials[t][0] for t in failed}):
            own = [records[t, rung].value.value or 0.0 for t in live if trials[t][0] == s]
            means[s] = sum(own) / len(own)
        ranked = sorted(means, key=lambda s: (-means[s], s))
        kept = set(ranked[: math.ceil(KEPT[rung] * len(means))])
        gone = [t for t in live if trials[t][0] not in kept and t not in failed]
        ended |= {t: ("failed", "the loss is not finite") for t in failed}
        ended |= {t: ("dropped", f"rung {rung}: left") for t in gone}
        made.events.append(
            RungDecision(
                arm=arm,
                rung=rung,
                keep=tuple(t for t in live if trials[t][0] in kept),
                drop=tuple(gone),
                failed=tuple(failed),
                reasons={str(t): ended[t][1] for t in (*gone, *failed)},
                correlation=0.25 if rung else None,
                num_ranked=len(means) if rung else 0,
                is_grace=False,
            )
        )
        live = [t for t in live if trials[t][0] in kept]
    made.events += _rows(made, settings, trials, reached, ended)
    best = max({trials[t][0] for t in live}, key=lambda s: (means[s], -s))
    made.events.append(_choice(made, best, trials, live, settings))
    return made


def _rows(
    made: Search,
    settings: Sequence[dict[str, Any]],
    trials: Sequence[tuple[int, int]],
    reached: dict[int, tuple[int, int]],
    ended: dict[int, tuple[str, str]],
) -> list[TrialRecord]:
    """The row of each trial: setting and seed, what it reached, how it ended, what it spent."""
    rows = []
    for t, (s, seed) in enumerate(trials):
        steps = [step for step in made.steps if step.trial == t]
        spent = [*(r for r in made.of(RungRecord) if r.trial == t), *steps]
        status, reason = ended.get(t, ("done", ""))
        rows.append(
            TrialRecord(
                arm=made.arm,
                trial=t,
                setting=s,
                seed=seed,
                draw=0,
                label=f"setting {s}" + (f" +seed={seed}" if seed else ""),
                values=settings[s],
                status=status,
                reason=reason,
                rung=reached[t][0],
                steps=len(steps),
                tokens=sum(r.tokens for r in spent),
                device_seconds=sum(r.device_seconds for r in spent),
                usd=None,
                trained_parameters=300_000 * settings[s].get("lora_rank", 0) or None,
            )
        )
    return rows


def _choice(
    made: Search,
    best: int,
    trials: Sequence[tuple[int, int]],
    live: Sequence[int],
    settings: Sequence[dict[str, Any]],
) -> SweepChoice:
    last = len(STEPS) - 1
    own = [t for t in live if trials[t][0] == best]
    at = [r for r in made.of(RungRecord) if r.rung == last and r.trial in own]
    pooled = [sum(v) / len(v) for v in zip(*(r.per_item for r in at), strict=True)]
    return SweepChoice(
        arm=made.arm,
        setting=best,
        trials=tuple(own),
        rung=last,
        metric="accuracy",
        value=mean_interval(pooled, is_share=True),
        trained_parameters=300_000 * settings[best].get("lora_rank", 0),
        not_told_apart=tuple(sorted({trials[t][0] for t in live} - {best})),
    )


def _scores(rng: random.Random, level: float, rung: int, *, is_trained: bool) -> list[float]:
    share = level * (1 - math.exp(-STEPS[rung] / 8)) if is_trained else level
    num_items = NUM_ITEMS if is_trained else ITEMS[rung]
    return [float(rng.random() < share) for _ in range(num_items)]


def _rung(arm: str, trial: int, rung: int, scores: list[float], *, is_trained: bool) -> RungRecord:
    return RungRecord(
        arm=arm,
        trial=trial,
        rung=rung,
        step=STEPS[rung] if is_trained else 0,
        metric="accuracy",
        value=mean_interval(scores, is_share=True),
        per_item=tuple(scores),
        tokens=SCORE_TOKENS,
        device_seconds=SCORE_SECONDS,
    )


def _step(arm: str, trial: int, seed: int, step: int, rate: float) -> TrainRecord:
    return TrainRecord(
        arm=arm,
        trial=trial,
        train_seed=seed,
        step=step,
        examples=8,
        tokens=STEP_TOKENS,
        target_tokens=16,
        loss=0.1 + 2 * math.exp(-step * min(rate, 1e-3) * 200) + 0.02 * (trial % 5),
        learning_rate=rate,
        grad_norm=1.0,
        step_seconds=STEP_SECONDS,
        device_seconds=STEP_SECONDS,
        usd=None,
    )


def add_search(root: Path, search: Search, *, space: dict[str, Any] | None = None) -> None:
    """Put a search into a run directory, right after its start; its bill is stated too."""
    path = root / "journal.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    started = next(i for i, line in enumerate(lines) if '"run_started"' in line)
    job = f"search:{search.arm}"
    winner = search.of(SweepChoice)[-1].trials[0] if search.of(SweepChoice) else None
    bill: dict[str, list[float]] = {}
    purpose = "sweep" if search.steps else "prompt_search"
    for record in (*search.steps, *search.of(RungRecord)):
        is_own = isinstance(record, TrainRecord) and record.trial == winner
        total = bill.setdefault("train" if is_own else purpose, [0, 0.0])
        total[0] += record.tokens
        total[1] += record.device_seconds
    found: list[object] = [*search.events]
    for name, (tokens, seconds) in bill.items():
        line = LedgerLine(job=job, arm=search.arm, purpose=name, tokens=int(tokens))
        found.append(replace(line, device_seconds=seconds))
    names = {**SEARCH_EVENTS, LedgerLine: "ledger"}
    events = [
        JournalEvent(time=1.8e9, event=names[type(e)], job=job, arm=search.arm, data=plain(e))
        for e in found
    ]
    lines[started + 1 : started + 1] = [json.dumps(plain(event)) for event in events]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if search.steps:
        steps = root / "arms" / search.arm / "train.jsonl"
        own = [step for step in search.steps]
        steps.write_text("".join(json.dumps(plain(s)) + "\n" for s in own), encoding="utf-8")
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    sweep = config["config"].setdefault("sweep", {"name": "random", "space": {}})
    sweep["space"][search.arm] = space or {}
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_searched_run(root: Path, *, text: str = "full", num_test: int = 60) -> Path:
    """Four arms of which a tuned and a prompted one were searched."""
    arms = {n: fake_run.SPAM_ARMS[n] for n in ("zero_shot", "few_shot", "lora", "tfidf")}
    fake_run.write_spam_run(root, arms=arms, num_test=num_test, text=text)
    add_search(root, lora_search(), space=LORA_SPACE)
    add_search(root, prompt_search(), space={"instruction": list(WORDINGS), "num_shots": [2, 8]})
    return root
