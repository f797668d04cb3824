"""Rows on memory: peak above the weights against lm-eval, each side in a fresh process."""

from __future__ import annotations

import dataclasses
import statistics

from tests.benchmarks import memory
from tests.benchmarks.comparing import Absent, Setup
from tests.benchmarks.harness import Result, Trace, parity_of, ratio_of
from tests.benchmarks.scoring_rows import SCORING

MAX_SHARE = 0.2  # of lm-eval's peak above the weights


def peak_memory(setup: Setup, key: str) -> list[Result]:
    """Peak memory above the weights against lm-evaluation-harness, each side in a fresh process."""
    from tests.benchmarks.scoring_peers import Evaluator, best_evaluator, has_evaluator, load_model

    if not has_evaluator():
        raise Absent("lm-eval is not installed here")
    spec = SCORING[key]
    assert spec.task is not None
    items, repeats = setup.cap(1 if key == "banking77_8shot" else 16, 2)
    (sample,) = setup.builder.few_shot(spec.task, shots=spec.shots, items=items, chunks=1)
    evaluator = Evaluator(load_model(setup.model_dir), setup.model_dir)
    best, searched = best_evaluator(evaluator, sample.first(spec.sample[0], labels=spec.sample[1]))
    case = memory.Case(
        side="ours", task=spec.task, shots=spec.shots, items=items, engine=setup.engine,
        batch=best.settings["batch_size"], model_dir=str(setup.model_dir),
        data=str(setup.data) if setup.data else None, threads=setup.threads,
    )  # fmt: skip
    traces = {"ours": Trace(), "lm-eval": Trace()}
    for _ in range(repeats):
        for side, trace in traces.items():
            found, answers = memory.measure_in_child(dataclasses.replace(case, side=side))
            trace.seconds.append(float(found))
            trace.answers.append(list(answers))
            print(f"  {side}: {found / 1e6:.0f} MB above the weights", flush=True)
    result = Result(
        name=f"memory_{key}",
        work=f"peak memory above the weights: {spec.what}, {items} items",
        ours=statistics.median(traces["ours"].seconds),
        peer=statistics.median(traces["lm-eval"].seconds),
        peer_version=best.version,
        ratio=ratio_of(traces["ours"].seconds, traces["lm-eval"].seconds),
        floor=1 / MAX_SHARE,
        aim=None,
        bound=None,
        unit="bytes above the weights",
        parity=parity_of(traces["ours"], traces["lm-eval"]),
        more={
            "peer_settings": best.settings,
            "batch_seconds_searched": searched,
            "data": sample.source,
            "bound_counts": "none: a bound on memory depends on the batch",
        },
    )
    result.judge()
    return [result]
