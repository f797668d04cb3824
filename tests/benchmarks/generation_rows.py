"""Rows that generate: 8 shots, 32 requests x 16 to 48 new tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.benchmarks import ours
from tests.benchmarks.comparing import (
    Setup,
    add_gate,
    compare_arms,
    count_gates,
    seconds_per_item,
)
from tests.benchmarks.decode_bound import decode_bound
from tests.benchmarks.harness import Result, best_of, measure, timed
from tests.benchmarks.parity import Gap
from tests.benchmarks.workloads import Workload

GENERATION = (
    ("generate_32_static", "generate()", 4.0, 6.0),
    ("generate_32_continuous", "continuous batching", 2.0, 4.0),
    ("generate_32_vllm", "vllm", 1.3, 2.0),
)


def generation(setup: Setup) -> list[Result]:
    """8 shots, 32 requests x 16 to 48 new tokens, against three ways to generate."""
    from tests.benchmarks import generating_peers as peers
    from tests.benchmarks.scoring_peers import load_model

    items, rounds = setup.cap(32, 5)
    # One chunk more, to warm prefix caches with: an evaluation never asks the same item twice.
    *chunks, warming = setup.builder.generation(items=items, chunks=rounds + 1)
    engine = setup.engine_now()
    cold = ours.our_arm(engine, kind="generate")
    warm = replace(
        cold, name="ours, generate, prefix kept", prepare=lambda: keep_prefix(engine, warming)
    )
    model = load_model(setup.model_dir, is_shipped=True)
    static, searched = best_of(
        [peers.static_arm(model, batch=b) for b in peers.GENERATE_BATCHES if b <= max(8, items)],
        chunks[0],
    )
    paged = load_model(setup.model_dir, is_shipped=True)
    continuous, searched_too = _best_continuous(paged, chunks[0])
    vllm = peers.Vllm(setup.model_dir, threads=setup.threads) if peers.has_vllm() else None
    others = [static, continuous.arm(), *([vllm.arm()] if vllm else [])]
    gates = count_gates(engine, {"generate": cold}, chunks[0])
    for other in others[1:]:
        timed(other, warming)
    traces = measure([*others, cold, warm], chunks, rounds=rounds)
    gap = peers.token_gap(model)
    results = []
    for name, peer_name, floor, aim in GENERATION:
        peer = next((other for other in others if other.name == peer_name), None)
        if peer is None:
            continue
        arm = cold if peer is static else warm  # as the peer: generate() keeps no prefix
        result = compare_arms(
            setup, name, f"8 shots, {items} requests x 16 to 48 new tokens", arm, peer, traces,
            chunks, floor=floor, aim=aim, peer_work=None, gap=lambda k: _gap(chunks[k], gap),
        )  # fmt: skip
        tokens = sum(chunks[0].new_tokens)
        result.unit = "seconds per request"
        result.more |= {
            "settings_seconds_searched": searched | searched_too,
            "new_tokens_per_second": {
                side: tokens / statistics.median(traces[a.name].seconds)
                for side, a in (("ours", arm), ("peer", peer))
            },
        }
        add_gate(result, gates["generate"], is_gated=setup.engine == "forest")
        if peer is not static:
            _add_decode_bound(result, setup, chunks[0], rows=gates["generate"].rows)
        results.append(result)
    same_linear = peers.static_arm(load_model(setup.model_dir), batch=static.settings["batch_size"])
    per_request = statistics.median(traces[cold.name].seconds) / items
    results[0].more["ratio_same_linear"] = seconds_per_item(same_linear, chunks) / per_request
    continuous.close()
    if vllm:
        vllm.close()
    return results


def _add_decode_bound(result: Result, setup: Setup, chunk: Workload, *, rows: int) -> None:
    """The ratio if our side spent time on its matrix products alone; rows: a cold run's."""
    decoded = sum(chunk.new_tokens) - len(chunk.new_tokens)
    prompt_rows = rows - chunk.prefix_tokens - decoded
    found = decode_bound(setup.model_dir, new_tokens=chunk.new_tokens, prompt_rows=prompt_rows)
    seconds = result.peer * len(chunk.items)
    result.more["decode_bound"] = found | {
        "ratio_of_products_alone": seconds / found["products_seconds"],
        "ratio_of_memory_alone": seconds / found["memory_seconds"],
    }


def keep_prefix(engine: Any, warming: Workload) -> None:
    """Leave on the engine's stack what all requests begin with."""
    ours.generate(engine, warming.first(2))


def _best_continuous(model: Any, sample: Workload) -> tuple[Any, dict[str, float]]:
    """Continuous batching at its best settings; one manager lives at a time."""
    from tests.benchmarks.generating_peers import CONTINUOUS_SETTINGS, Continuous

    seconds: dict[tuple[int, int], float] = {}
    for page_size, tokens in CONTINUOUS_SETTINGS:
        tried = Continuous(model, page_size=page_size, max_batch_tokens=tokens)
        timed(tried.arm(), sample)
        seconds[page_size, tokens] = timed(tried.arm(), sample)[0]
        tried.close()
    page_size, tokens = min(seconds, key=seconds.__getitem__)
    named = {f"page_size {p}, max_batch_tokens {t}": s for (p, t), s in seconds.items()}
    return Continuous(model, page_size=page_size, max_batch_tokens=tokens), named


def _gap(chunk: Workload, gap: Callable[[tuple[int, ...], int, int], float]) -> Gap:
    return lambda index, ids, a, b: gap(chunk.items[index].prompt_ids + ids, a, b)
