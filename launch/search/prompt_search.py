"""The search of an arm whose trials are prompts: what its evaluator process asks, judges, chooses.

Its rungs are shares of the validation items. They lie at half of where those of a training do: an
item's score has no curve that bends later, only chance. For the same reason ranks that change from
rung to rung give nobody grace: they tell that prompts differ by less than chance, not that the last
may be the first. Few items tell little, so that the first rung that drops has at least MIN_ITEMS.

20 wordings take about 4 times the rows of one, and what their prefixes add. In made searches of 20
prompts on 200 to 400 items, with accuracies 3 to 8 points apart (standard deviation), the choice
was within a standard error of the best in 81 to 94%; with the rungs of trainings in 95 to 99%, for
6.5 times the rows (test_prompt_search_rules.py). sweep.halving.first_rung=0.28 gives
those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.hashing import plain
from conf.sweep_records import RungDecision, RungRecord, SweepChoice
from conf.sweeps import HalvingConfig
from launch.search.budget import affordable_settings, caps_of
from launch.search.halving import choose, decide, limited, rung_shares, scores_of
from launch.search.trials import Trial

if TYPE_CHECKING:
    from evaluation.engines.base import Engine
    from evaluation.prompts.rendering import Renderer
    from evaluation.search.prompt_search import PromptTrial, SearchEvent
    from launch.workers import SearchWork

MIN_ITEMS = 5  # of the first rung that drops
STATE = "answers.jsonl"  # in the directory of a search job


def why_not_together(trials: Sequence[Trial]) -> str | None:
    """Why one engine cannot answer all trials of an arm; None where it can."""
    first = trials[0].arm
    for trial in trials:
        for name in ("model", "engine"):
            if getattr(trial.arm, name) != getattr(first, name):
                return f"{trial.label}: its trials differ in {name}"
    return None


def prompt_halving(halving: HalvingConfig, *, num_items: int) -> HalvingConfig:
    """The rules of a search of prompts: those of trainings, with other rungs."""
    lowest = min(MIN_ITEMS / max(num_items, 1), 0.5)
    first_rung = max(halving.first_rung / 2, lowest)
    return dataclasses.replace(halving, first_rung=first_rung, min_correlation=-1.0)


def searched_prompts(
    work: SearchWork, *, engine: Engine, renderer: Renderer
) -> Iterator[SearchEvent]:
    """Search; the records of conf/sweep_records.py, with ledger lines before what they pay for.

    Raises:
        JobFailed: every trial failed.
    """
    from evaluation.search.prompt_search import SearchJob, search_prompts

    base = work.base
    halving = prompt_halving(work.halving, num_items=len(base.task.items["validation"]))
    rungs = rung_shares(halving)
    job = SearchJob(
        name=base.job,
        arm=base.arm.name,
        trials=tuple(_prompt_trial(trial) for trial in work.trials),
        rungs=rungs,
        num_watched=min(1, len(rungs) - 1),
        seed=work.seed,
        state_path=work.state_path,
        devices=base.devices,
        usd_per_device_second=base.usd_per_device_second,
    )
    settings = {trial.number: trial.setting for trial in work.trials}
    rules = Rules(
        arm=base.arm.name,
        settings=settings,
        halving=halving,
        caps=caps_of(work.budget, usd_per_device_second=base.usd_per_device_second),
    )
    yield from search_prompts(
        job,
        task=base.task,
        engine=engine,
        renderer=renderer,
        judge=rules.judge,
        choose=rules.choose,
        done=work.done,
    )


def _prompt_trial(trial: Trial) -> PromptTrial:
    from evaluation.search.prompt_search import PromptTrial

    return PromptTrial(
        number=trial.number,
        setting=trial.setting,
        arm=trial.arm,
        label=trial.label,
        seed=trial.seed,
        draw=trial.draw,
        values={field: plain(value) for field, value in trial.values},
    )


@dataclass(kw_only=True, slots=True, frozen=True)
class Rules:
    """Halving with a budget. settings: trial -> setting. caps: "tokens" or "device_seconds"."""

    arm: str
    settings: dict[int, int]
    halving: HalvingConfig
    caps: dict[str, float]

    def judge(self, records: Sequence[RungRecord], trials: Sequence[int]) -> RungDecision:
        """Who goes on after the last of the rungs."""
        scores = scores_of(records)
        members = {trial: self.settings[trial] for trial in trials}
        decision = decide(self.arm, scores, members=members, halving=self.halving)
        limit = affordable(records, decision, self)
        if limit is None:
            return decision
        reason = f"rung {decision.rung}: sweep.budget pays for {limit} more"
        return limited(decision, scores, members=members, limit=limit, reason=reason)

    def choose(self, records: Sequence[RungRecord]) -> SweepChoice | None:
        """The best setting that reached the last rung; a prompt trains nothing."""
        parameters = dict.fromkeys(self.settings.values(), 0)
        return choose(self.arm, records, members=self.settings, parameters=parameters)


def affordable(records: Sequence[RungRecord], decision: RungDecision, rules: Rules) -> int | None:
    """How many settings can go to the next rung, and one of them to the end.

    By what the trials that go on took for their items so far. At least 1, for a search without an
    end is of no use; None: no cap, nobody to leave out, or nothing to save, since the next rung was
    asked together with this one.
    """
    settings = {rules.settings[trial] for trial in decision.keep}
    shares = rung_shares(rules.halving)
    if not rules.caps or not settings or not 0 < decision.rung < len(shares) - 1:
        return None
    going = [record for record in records if record.trial in decision.keep]
    return affordable_settings(
        rules.caps,
        spent={kind: sum(getattr(record, kind) for record in records) for kind in rules.caps},
        kept={kind: sum(getattr(record, kind) for record in going) for kind in rules.caps},
        num_settings=len(settings),
        share=shares[decision.rung],
        following=shares[decision.rung + 1],
    )
