"""From two arms to a row: the set-up, gates without a clock, ratio, parity and bound."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import ours
from tests.benchmarks.bounds import Continued, Shape, Work, needed, peak_flops_per_second
from tests.benchmarks.harness import Arm, Result, Trace, parity_of, ratio_of, timed
from tests.benchmarks.parity import Gap
from tests.benchmarks.workloads import Builder, Workload


@dataclass(kw_only=True, slots=True)
class Setup:
    """What a run of the benchmarks was asked for. items, rounds: caps for a quick look, or None."""

    model_dir: Path
    data: Path | None
    engine: str
    threads: int
    items: int | None = None
    rounds: int | None = None
    builder: Builder = field(init=False)

    def __post_init__(self) -> None:
        """Read the tokenizer."""
        self.builder = Builder(self.model_dir, data=self.data)

    def cap(self, items: int, rounds: int) -> tuple[int, int]:
        """Items and rounds of a benchmark, as capped."""
        return min(items, self.items or items), min(rounds, self.rounds or rounds)

    def engine_now(self) -> Any:
        """Load our engine."""
        return ours.load_engine(self.engine, self.model_dir, self.builder, threads=self.threads)


class Absent(Exception):
    """A peer is not installed: its rows are reported as absent."""


def compare_arms(
    setup: Setup,
    name: str,
    work: str,
    arm: Arm,
    peer: Arm,
    traces: dict[str, Trace],
    chunks: Sequence[Workload],
    *,
    floor: float,
    aim: float | None,
    peer_work: Work | None,
    gap: Callable[[int], Gap] | None = None,
) -> Result:
    """Ratio, parity and bound of two arms, judged."""
    mine, its = traces[arm.name], traces[peer.name]
    shape, items, peer_items = (
        Shape.read(setup.model_dir), len(chunks[0].items), peer.count(chunks[0])
    )  # fmt: skip
    own_seconds = [seconds / items for seconds in mine.seconds]
    peer_seconds = [seconds / peer_items for seconds in its.seconds]
    least = [
        shape.flops(needed(ours.continued(chunk, answers)))
        for chunk, answers in zip(chunks, mine.answers, strict=True)
    ]
    peak = peak_flops_per_second()
    bounds = [s * items * peak / flops for s, flops in zip(peer_seconds, least, strict=True)]
    result = Result(
        name=name,
        work=work,
        ours=statistics.median(own_seconds),
        peer=statistics.median(peer_seconds),
        peer_version=peer.version,
        ratio=ratio_of(own_seconds, peer_seconds),
        floor=floor,
        aim=aim,
        bound=statistics.median(bounds),
        unit="seconds per item",
        parity=parity_of(mine, its, gap=gap),
        more={
            "bound_counts": "peer's seconds x best measured rate / operations of each distinct "
            "prefix once, with attention, and the head where it is read",
            "flops_ratio": shape.flops(peer_work) / sum(least) if peer_work else None,
            "peak_gflops_per_second": peak / 1e9,
            "ours_name": arm.version,
            "peer_settings": peer.settings,
            "seconds": {"ours": mine.seconds, "peer": its.seconds},
            "items": items,
            "peer_items": peer_items,
            "rounds": len(mine.seconds),
            "prefix_tokens": chunks[0].prefix_tokens,
            "data": chunks[0].source,
        },
    )
    result.judge()
    return result


def count_gates(engine: Any, arms: dict[str, Arm], chunk: Workload) -> dict[str, ours.Gate]:
    """Warm our arms up and count their rows."""
    return {kind: ours.gate(engine, arm, chunk) for kind, arm in arms.items()}


def add_gate(result: Result, gate: ours.Gate, *, is_gated: bool) -> None:
    """Rows computed have to be the needed prefixes; a winner-only search may need more."""
    result.more["rows"] = {"computed": gate.rows, "needed": gate.needed.rows}
    is_search = result.name.endswith("_winner")
    if is_gated and (gate.rows < gate.needed.rows if is_search else not gate.is_exact):
        result.failures.append(f"rows: {gate.rows} computed, {gate.needed.rows} needed")


def seconds_per_item(arm: Arm, chunks: Sequence[Workload]) -> float:
    """Seconds per item of one run, after a short warm-up."""
    timed(arm, chunks[0].first(1, labels=2))
    return timed(arm, chunks[0])[0] / arm.count(chunks[0])


def all_pairs(chunks: Sequence[Workload]) -> list[Continued]:
    """(prompt, continuation) of all items and labels."""
    return [pair for chunk in chunks for pair in ours.continued(chunk)]
