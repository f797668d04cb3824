"""Rows on our loop and planner: overhead over bare DeepSpeed, planned against real seconds."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from conf.records import RenderedExample
from tests.benchmarks.comparing import Setup
from tests.benchmarks.harness import SETTLE_SECONDS, Result, ratio_of
from tests.benchmarks.parity import Parity
from tests.benchmarks.training_data import BATCH, banking77, batches
from tests.benchmarks.training_ours import Ours, Quiet, ours
from training import loop
from training.data import Batch, make_batch, num_targets
from training.estimate import model_size
from training.flops import PassShape, train_cost
from training.packing import shared_length
from training.passes import Passes
from training.rate import fit
from training.telemetry import Telemetry

MAX_OVERHEAD = 0.03  # of our loop over bare DeepSpeed, upper end of the interval
MAX_MISS = 0.20  # of planned seconds against measured ones
MAX_LOSS_GAP = 1e-5  # between the two ways to take the same step
PLANNER = ("planner_seconds_lora", "planner_seconds_full")
# Lengths of the rows of a step: the rate is measured on the first, the others are planned.
PROBED = ((24,) * 8, (120,) * 8)
PLANNED = ((48,) * 8, (80,) * 8, (200,) * 8, (30, 40, 50, 60, 70, 80, 90, 100), (300,) * 4)


def loop_overhead(setup: Setup) -> list[Result]:
    """A step of our loop against DeepSpeed's own three calls on ready batches, in turns."""
    steps, rounds = setup.cap(12, 5)
    data = banking77(setup.model_dir, setup.data, rows=BATCH * (steps + 1), chunks=rounds)
    scratch = Path(tempfile.mkdtemp())
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    with ours(setup.model_dir, kind="lora", threads=setup.threads, output_dir=scratch) as mine:
        gaps = [_loss_gap(mine, rows) for rows in batches(data.chunks[0])[:3]]
        for rows in data.chunks:
            _interleaved(mine, rows, seconds)
            line = ", ".join(f"{k} {statistics.median(v):.4f} s" for k, v in seconds.items())
            print(f"  medians so far: {line}", flush=True)
    is_equal = max(gaps) < MAX_LOSS_GAP
    ratio = ratio_of(seconds["ours"], seconds["bare"])
    result = Result(
        name="loop_overhead",
        work=f"one LoRA step of {BATCH} rows of {data.mean_tokens:.0f} tokens: our loop against "
        "bare DeepSpeed on batches that are ready",
        ours=statistics.median(seconds["ours"]),
        peer=statistics.median(seconds["bare"]),
        peer_version="deepspeed",
        ratio=ratio,
        floor=1 / (1 + MAX_OVERHEAD),
        aim=None,
        bound=1.0,
        unit="seconds a step",
        parity=Parity(
            checked=len(gaps), ok=is_equal, worst=max(gaps), why="" if is_equal else "losses"
        ),
        more={
            "overhead": 1 / ratio.median - 1,
            "overhead_upper": 1 / ratio.low - 1,
            "steps": len(seconds["ours"]),
            "data": data.source,
        },
    )
    result.judge()
    if 1 / ratio.low - 1 > MAX_OVERHEAD:
        result.failures.append(f"overhead of up to {1 / ratio.low - 1:.1%} over {MAX_OVERHEAD:.0%}")
    return [result]


def _interleaved(
    mine: Ours, rows: Sequence[RenderedExample], seconds: dict[str, list[float]]
) -> None:
    """Each step both ways, the first of them in turns; the first step warms up."""
    training = loop._Training(
        job=mine.job, runtime=Quiet(), rows=tuple(rows), total_steps=len(rows) // BATCH
    )
    passes = Passes(
        job=mine.job, runtime=Quiet(), rows=rows, engine=mine.engine, note=lambda text: None
    )
    telemetry = Telemetry(mine.job, rows=rows, device=mine.engine.device)
    for step in passes.steps(first=1, last=len(rows) // BATCH):
        ready = [_ready(mine, [rows[k] for k in part]) for part in step.shares[0]]
        targets = sum(num_targets(rows[k]) for k in step.rows)

        def take(step: Any = step) -> None:
            loop._take_step(
                step, training=training, engine=mine.engine, passes=passes, telemetry=telemetry
            )

        def bare(ready: list[Batch] = ready, targets: int = targets) -> None:
            _bare_step(mine, ready, targets=targets)

        sides: list[tuple[str, Callable[[], None]]] = [("ours", take), ("bare", bare)]
        for name, run in sides if step.step % 2 else sides[::-1]:
            started = time.perf_counter()
            run()
            if step.step > 1:
                seconds[name].append(time.perf_counter() - started)


def _ready(mine: Ours, rows: Sequence[RenderedExample]) -> Batch:
    return make_batch(rows, layout=mine.engine.trainee.layout, pad_id=mine.job.pad_id)


def _bare_step(mine: Ours, ready: Sequence[Batch], *, targets: int) -> float:
    """What a script on DeepSpeed alone would do: forward, backward, clip, step."""
    engine = mine.engine._engine
    total = 0.0
    for number, batch in enumerate(ready, start=1):
        engine.set_gradient_accumulation_boundary(number == len(ready))
        loss = engine(batch)
        engine.backward(loss / targets, scale_wrt_gas=False)
        total += float(loss.detach())
    trained = [p for p in mine.engine.trainee.model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, mine.job.trainer.clip_norm)
    engine.step()
    return total / targets


def _loss_gap(mine: Ours, rows: Sequence[RenderedExample]) -> float:
    """Between a batch's loss in our passes and in one bare pass; the weights stay."""
    ready = _ready(mine, rows)
    targets = sum(map(num_targets, rows))
    with torch.no_grad():
        bare = float(mine.engine._engine(ready)) / targets
    return abs(mine.loss_and_norm(rows)[0] - bare)


def planner_seconds(setup: Setup) -> list[Result]:
    """Planned seconds of steps whose shapes the rate was not measured on."""
    steps, rounds = setup.cap(4, 3)
    scratch = Path(tempfile.mkdtemp())
    results = []
    for kind in ("lora", "full"):
        with ours(setup.model_dir, kind=kind, threads=setup.threads, output_dir=scratch) as mine:
            results.append(_planned(mine, kind, steps=steps, rounds=rounds))
        gc.collect()
    return results


def _planned(mine: Ours, kind: str, *, steps: int, rounds: int) -> Result:
    probed = [point for lengths in PROBED for point in _points(mine, lengths, steps=steps)]
    rate = fit([probed[0], *probed])  # the first point is taken for a warm-up
    assert rate is not None, "too few steps"
    measured: dict[str, list[float]] = {}
    planned: dict[str, float] = {}
    for _ in range(rounds):
        for lengths in PLANNED:
            time.sleep(SETTLE_SECONDS)
            points = _points(mine, lengths, steps=steps)
            measured.setdefault(str(lengths), []).extend(s for _, s in points)
            planned[str(lengths)] = rate.seconds(flops=points[0][0], steps=1)
    found = {key: statistics.median(values) for key, values in measured.items()}
    misses = {key: planned[key] / found[key] - 1 for key in found}
    worst = max(misses.values(), key=abs)
    result = Result(
        name=f"planner_seconds_{kind}",
        work=f"seconds of a {kind} step at {len(PLANNED)} shapes, from a rate of 2 other shapes",
        ours=statistics.fmean(planned.values()),
        peer=statistics.fmean(found.values()),
        peer_version="the steps themselves",
        ratio=ratio_of(list(planned.values()), list(found.values())),
        floor=0.0,
        aim=None,
        bound=None,
        unit="seconds a step",
        parity=Parity(checked=len(found), ok=True, worst=0.0),
        more={"misses": misses, "worst_miss": worst, "fixed_seconds": rate.fixed_seconds},
    )
    if abs(worst) > MAX_MISS:
        result.failures.append(f"planned seconds off by {worst:.0%}, allowed {MAX_MISS:.0%}")
    return result


def _points(mine: Ours, lengths: Sequence[int], *, steps: int) -> list[tuple[int, float]]:
    """(operations, seconds) of steps on rows of these lengths, without the first."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = mine.engine.trainee.model.config.get_text_config().vocab_size
    rows = []
    for length in lengths:
        ids = torch.randint(100, vocabulary, (length,), generator=generator).tolist()
        mask = (0,) * (length - 4) + (1,) * 4
        rows.append(RenderedExample(item_id="", input_ids=tuple(ids), target_mask=mask))
    cost = train_cost(mine.job.method, size=model_size(Path(mine.job.model_dir)))
    shape = PassShape.of(lengths, shared=shared_length(rows), targets=4 * len(rows))
    ready = [_ready(mine, rows)]
    found = []
    for number in range(steps + 1):
        started = time.perf_counter()
        _bare_step(mine, ready, targets=4 * len(rows))
        if number:
            found.append((cost.flops(shape), time.perf_counter() - started))
    return found
