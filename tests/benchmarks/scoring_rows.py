"""Rows that score labels: against lm-eval, a replicated prefix cache, and full prompts."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from tests.benchmarks import ours
from tests.benchmarks.bounds import full_runs
from tests.benchmarks.comparing import (
    Absent,
    Setup,
    add_gate,
    all_pairs,
    compare_arms,
    count_gates,
    seconds_per_item,
)
from tests.benchmarks.harness import Result, measure
from tests.benchmarks.workloads import Workload

MIN_REPLICATED_PREFIX = 500  # tokens
MAX_KV_SHARE = 1 / 8  # of the replicated cache's bytes


@dataclass(kw_only=True, slots=True, frozen=True)
class Target:
    """A row: our arm's kind (all | winner), the ratio that must and the one that should be."""

    name: str
    kind: str
    floor: float
    aim: float | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class Scoring:
    """A label-scoring workload. task None: the zero-shot instruction. items: of a round.
    peer_items: those of them that lm-eval gets, which shares nothing between items. sample: items
    and labels on which its batch size is chosen.
    """

    what: str
    task: str | None
    shots: int
    items: int
    targets: tuple[Target, ...]
    peer_items: int
    rounds: int = 5
    sample: tuple[int, int | None] = (8, None)

    def chunks(
        self, setup: Setup, *, items: int, rounds: int, min_prefix: int = 0
    ) -> list[Workload]:
        """One workload per round."""
        sizes = {"items": items, "chunks": rounds, "shots": self.shots, "min_prefix": min_prefix}
        if self.task is None:
            return setup.builder.zero_shot(**sizes)
        return setup.builder.few_shot(self.task, **sizes)


SCORING = {
    "banking77_8shot": Scoring(
        what="77 labels, 8 shots (banking77)",
        task="banking77",
        shots=8,
        items=96,
        peer_items=1,
        sample=(1, 16),
        targets=(
            Target(name="banking77_8shot_all", kind="all", floor=120, aim=165),
            Target(name="banking77_8shot_winner", kind="winner", floor=300, aim=600),
        ),
    ),
    "two_labels_16shot": Scoring(
        what="2 labels, 16 shots (sms_spam)",
        task="sms_spam",
        shots=16,
        items=96,
        peer_items=16,
        targets=(Target(name="two_labels_16shot", kind="all", floor=10, aim=14),),
    ),
    "arc_easy_5shot": Scoring(
        what="4 choices of several tokens, 5 shots (arc_easy)",
        task="arc_easy",
        shots=5,
        items=96,
        peer_items=12,
        targets=(Target(name="arc_easy_5shot", kind="all", floor=6, aim=12),),
    ),
    "zero_shot_5labels": Scoring(
        what="5 labels x 2 tokens, zero-shot, 100-token instruction",
        task=None,
        shots=0,
        items=96,
        peer_items=24,
        targets=(Target(name="zero_shot_5labels", kind="all", floor=10, aim=15),),
    ),
}
REPLICATED_ITEMS = {"banking77_8shot": 16}


def against_evaluator(setup: Setup, key: str) -> list[Result]:
    """Rows of a scoring workload against lm-evaluation-harness."""
    from tests.benchmarks.scoring_peers import Evaluator, best_evaluator, has_evaluator, load_model

    if not has_evaluator():
        raise Absent("lm-eval is not installed here")
    spec = SCORING[key]
    items, rounds = setup.cap(spec.items, spec.rounds)
    chunks = spec.chunks(setup, items=items, rounds=rounds)
    engine = setup.engine_now()
    arms = {t.kind: ours.our_arm(engine, kind=t.kind) for t in spec.targets}
    evaluator = Evaluator(load_model(setup.model_dir, is_shipped=True), setup.model_dir)
    evaluator.check_ids(chunks[0].first(4))
    peer, searched = best_evaluator(
        evaluator, chunks[0].first(spec.sample[0], labels=spec.sample[1])
    )
    peer.items = spec.peer_items
    gates = count_gates(engine, arms, chunks[0])
    traces = measure([peer, *arms.values()], chunks, rounds=rounds)
    swapped = Evaluator(load_model(setup.model_dir), setup.model_dir)
    same_linear = swapped.arm(peer.settings["batch_size"])
    same_linear.items = spec.peer_items
    per_item = seconds_per_item(same_linear, chunks)
    full = full_runs(all_pairs(chunks), is_all_projected=True)
    results = []
    for target in spec.targets:
        arm = arms[target.kind]
        result = compare_arms(
            setup, target.name, f"{spec.what}, {items} items a round", arm, peer, traces, chunks,
            floor=target.floor, aim=target.aim, peer_work=full,
        )  # fmt: skip
        ours_seconds = statistics.median(traces[arm.name].seconds) / items
        result.more |= {
            "ratio_same_linear": per_item / ours_seconds,
            "batch_seconds_searched": searched,
        }
        add_gate(result, gates[target.kind], is_gated=setup.engine == "forest")
        results.append(result)
    return results


def against_replicated(setup: Setup, key: str) -> list[Result]:
    """Rows of a scoring workload with a long prefix against a replicated prefix cache."""
    from tests.benchmarks.scoring_peers import best_plain, load_model

    spec = SCORING[key]
    items, rounds = setup.cap(REPLICATED_ITEMS.get(key, 64), 5)
    chunks = spec.chunks(setup, items=items, rounds=rounds, min_prefix=MIN_REPLICATED_PREFIX)
    engine = setup.engine_now()
    arms = {t.kind: ours.our_arm(engine, kind=t.kind) for t in spec.targets}
    baseline, searched = best_plain(load_model(setup.model_dir), chunks[0], is_cached=True)
    peer = baseline.arm("replicated cache")
    gates = count_gates(engine, arms, chunks[0])
    traces = measure([peer, *arms.values()], chunks, rounds=rounds)
    results = []
    for target in spec.targets:
        name = f"replicated_cache_{target.name}"
        work = f"{spec.what}, prefix of {chunks[0].prefix_tokens} tokens, {items} items a round"
        arm = arms[target.kind]
        result = compare_arms(
            setup, name, work, arm, peer, traces, chunks, floor=1.3, aim=None, peer_work=None
        )
        gate = gates[target.kind]
        result.more |= {
            "batch_seconds_searched": searched,
            "kv_bytes": {"ours": gate.kv_bytes or None, "peer": baseline.kv_bytes},
        }
        add_gate(result, gate, is_gated=setup.engine == "forest")
        if setup.engine == "forest" and not 0 < gate.kv_bytes <= MAX_KV_SHARE * baseline.kv_bytes:
            result.failures.append(f"KV bytes: {gate.kv_bytes} with {baseline.kv_bytes}")
        results.append(result)
    return results


def wordings(setup: Setup) -> list[Result]:
    """20 wordings x all items against plain runs of full prompts."""
    from tests.benchmarks.scoring_peers import best_plain, load_model

    items, rounds = setup.cap(24, 5)
    chunks = setup.builder.wordings(items=items, chunks=rounds, shots=16)
    engine = setup.engine_now()
    arm = ours.our_arm(engine, kind="all")
    baseline, searched = best_plain(
        load_model(setup.model_dir), chunks[0].first(16), is_cached=False
    )
    peer = baseline.arm("full prompts")
    gates = count_gates(engine, {"all": arm}, chunks[0])
    traces = measure([peer, arm], chunks, rounds=rounds)
    result = compare_arms(
        setup, "wordings_20",
        f"20 wordings x {items} items, 16 shots; {20 // rounds} wordings a round, each once",
        arm, peer, traces, chunks, floor=5.0, aim=None,
        peer_work=full_runs(all_pairs(chunks), is_all_projected=False),
    )  # fmt: skip
    result.aim = result.more["flops_ratio"]  # the optimum of the union
    result.more["batch_seconds_searched"] = searched
    add_gate(result, gates["all"], is_gated=setup.engine == "forest")
    return [result]
