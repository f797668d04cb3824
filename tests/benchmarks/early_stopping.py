"""How many answers early stopping spares: a finished run's scores, replayed wave by wave.

`python -m tests.benchmarks.early_stopping RUN` replays a run in its own order of items and in 19
others, and prints for each the answers asked, by how much fewer, and the verdict beside that of all
answers. No model runs.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.decision.closing import Comparison, judge, leaving
from evaluation.decision.rules import total_cost
from evaluation.records.run_records import RunRecords, read_run
from evaluation.results.arm_summary import Settings, summarise_arm
from evaluation.results.item_intervals import ItemRule
from evaluation.results.summary import summarise
from evaluation.statistics.clusters import sources_of
from launch.waves import waves_of

FREE = ("tfidf", "given", "linear_probe")  # reference arms answer all items at once


@dataclass(kw_only=True, slots=True, frozen=True)
class Replay:
    """Answers of the arms that are asked in waves, and what was decided from them."""

    asked: dict[str, int]
    answers: int
    all_answers: int
    arm: str | None
    verdict: str

    @property
    def ratio(self) -> float:
        """By how much fewer answers there were."""
        return self.all_answers / self.answers


def replay(records: RunRecords, *, seed: int) -> Replay:
    """A run of a fixed number of items as it would have gone, had it looked on the way."""
    looking = copy.copy(records.decision)
    looking.stop_early = True
    tests = [item for item in records.items.values() if item.split == "test"]
    settings = Settings(decision=looking, pricing=records.pricing)
    found = {name: summarise_arm(records, name, settings=settings) for name in records.arm_specs}
    arms = {name: arm for name, arm in found.items() if arm.scores}
    sources = sources_of(tests)
    waves = waves_of(tests, seed=seed)
    live, items, frozen = list(arms), list[str](), tuple[Comparison, ...]()
    upto: dict[str, list[str]] = {}
    for number, wave in enumerate(waves):
        items = [*items, *(item.id for item in wave)]
        upto |= dict.fromkeys(live, items)
        rest = [item.id for later in waves[number + 1 :] for item in later]
        pairs = judge(
            {name: {i: arm.scores[i] for i in upto[name]} for name, arm in arms.items()},
            items=items,
            num_left=len(rest if sources is None else {sources[i] for i in rest}),
            num_arms=len(records.arm_specs),
            decision=looking,
            costs={n: total_cost(arm.result, decision=looking) for n, arm in arms.items()},
            sources=sources,
            largest=ItemRule(confidence=looking.confidence, sources=sources).largest,
            frozen=frozen,
        )
        gone = leaving(pairs, live)
        live = [name for name in live if name not in gone]
        frozen = tuple(p for p in pairs if not {p.a, p.b} <= set(live))
    kinds = {name: arm.result.kind for name, arm in arms.items()}
    asked = {name: len(own) for name, own in upto.items() if kinds[name] not in FREE}
    cut = {
        name: replace(
            records.arms[name],
            samples=tuple(
                s for s in records.arms[name].samples if s.set != "test" or s.item_id in set(own)
            ),
        )
        for name, own in upto.items()
        if kinds[name] not in FREE
    }
    left = replace(records, arms={**records.arms, **cut}, decision=looking)
    decided = summarise(left).recommendation
    return Replay(
        asked=asked,
        answers=sum(asked.values()),
        all_answers=len(tests) * len(asked),
        arm=decided.arm,
        verdict=decided.verdict,
    )


def main(run: Path) -> None:
    """Print the replays of a run."""
    records = read_run(run)
    whole = summarise(records).recommendation
    print(f"all answers: {whole.verdict}")
    own = int((records.config.get("task") or {}).get("seed") or 0)
    replays = [replay(records, seed=seed) for seed in (own, *range(1000, 1019))]
    for one in replays:
        print(f"{one.answers} of {one.all_answers}, {one.ratio:.2f}x: {one.verdict} {one.asked}")
    ratios = sorted(one.ratio for one in replays)
    same = sum(one.arm == whole.arm for one in replays)
    print(
        f"its own order {replays[0].ratio:.2f}x; of {len(ratios)} orders the median "
        f"{ratios[len(ratios) // 2]:.2f}x, {ratios[0]:.2f}x to {ratios[-1]:.2f}x; "
        f"{same} take the same arm"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
