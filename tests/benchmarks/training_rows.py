"""Rows that train: LoRA and full fine-tuning of banking77 as chat, against TRL's SFTTrainer."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.linear import choose_linear, swap_linear
from tests.benchmarks.comparing import Absent, Setup
from tests.benchmarks.harness import SETTLE_SECONDS, Result, ratio_of
from tests.benchmarks.parity import Parity
from tests.benchmarks.training_data import BATCH, INSTRUCTION, TrainingData, banking77
from tests.benchmarks.training_ours import Ours, ours
from tests.benchmarks.training_peers import (
    SETTINGS,
    Trl,
    has_trl,
    share_adapters,
    trl_model,
)

MAX_LOSS_GAP = 1e-4  # between the two sides' loss of one batch
MAX_NORM_GAP = 1e-3  # between their gradients' norms, relative
PARITY_BATCHES = 3


@dataclass(kw_only=True, slots=True, frozen=True)
class Case:
    """One row: what trains on what."""

    name: str
    kind: str
    what: str
    instruction: str
    floor: float
    aim: float | None


TRAINING = {
    case.name: case
    for case in (
        Case(
            name="lora_banking77", kind="lora", what="LoRA r=16 on all linear layers",
            instruction="", floor=2.0, aim=2.8,
        ),
        Case(
            name="lora_banking77_instruction", kind="lora",
            what="LoRA r=16 on all linear layers, constant instruction",
            instruction=INSTRUCTION, floor=3.0, aim=6.0,
        ),
        Case(
            name="full_banking77", kind="full", what="full fine-tuning",
            instruction="", floor=1.3, aim=2.0,
        ),
    )
}  # fmt: skip


def against_trl(setup: Setup, key: str) -> list[Result]:
    """One row: real tokens per second of both sides on the same rows, in turns."""
    if not has_trl():
        raise Absent("trl is not installed here")
    case = TRAINING[key]
    steps, rounds = setup.cap(4, 5)
    data = banking77(
        setup.model_dir, setup.data, rows=BATCH * (steps + 1), chunks=rounds,
        instruction=case.instruction,
    )  # fmt: skip
    scratch = Path(tempfile.mkdtemp())
    model, tokenizer = trl_model(setup.model_dir, kind=case.kind)
    with ours(setup.model_dir, kind=case.kind, threads=setup.threads, output_dir=scratch) as mine:
        if case.kind == "lora":
            share_adapters(model, mine.engine.trainee.model)
        parity = parity_of_losses(mine, model, tokenizer, data)
        peer, searched = _best(model, tokenizer, data)
        rates = _rates(mine, peer, data, rounds=rounds)
        same = _same_linear(setup, case, data, settings=peer.settings)
    result = Result(
        name=case.name,
        work=f"{case.what}, banking77 as chat, {data.mean_tokens:.0f} tokens a row "
        f"({data.mean_targets:.1f} targets), batch {BATCH}",
        ours=statistics.median(rates["ours"]),
        peer=statistics.median(rates["peer"]),
        peer_version=peer.version,
        ratio=ratio_of([1 / r for r in rates["ours"]], [1 / r for r in rates["peer"]]),
        floor=case.floor,
        aim=case.aim,
        bound=None,
        unit="real tokens per second",
        parity=parity,
        more={
            "peer_settings": peer.settings,
            "settings_tokens_per_second": searched,
            "tokens_per_second": rates,
            "ratio_same_linear": statistics.median(rates["ours"]) / same,
            "steps_a_round": steps,
            "rounds": rounds,
            "data": data.source,
        },
    )
    result.judge()
    print(f"  {case.name}: {result.ratio.median:.2f}x", flush=True)
    return [result]


def parity_of_losses(mine: Ours, model: Any, tokenizer: Any, data: TrainingData) -> Parity:
    """Losses and gradient norms of the first batches, the weights being the same."""
    settings = SETTINGS[0] | {"train_sampling_strategy": "sequential"}
    peer = Trl(model=model, tokenizer=tokenizer, settings=settings)
    worst, why = 0.0, ""
    for index in range(PARITY_BATCHES):
        rows = data.chunks[0][index * BATCH : (index + 1) * BATCH]
        (loss, norm), (peer_loss, peer_norm) = mine.loss_and_norm(rows), peer.loss_and_norm(rows)
        worst = max(worst, abs(loss - peer_loss))
        if abs(loss - peer_loss) > MAX_LOSS_GAP:
            why = f"batch {index}: loss {loss:.6f} and {peer_loss:.6f}"
        elif abs(norm / peer_norm - 1) > MAX_NORM_GAP:
            why = f"batch {index}: gradient norm {norm:.6f} and {peer_norm:.6f}"
    return Parity(checked=PARITY_BATCHES, ok=not why, worst=worst, why=why)


def _best(model: Any, tokenizer: Any, data: TrainingData) -> tuple[Trl, dict[str, float]]:
    """TRL at the settings with most real tokens per second on a sample, and all that were tried."""
    sample = data.chunks[0][: 3 * BATCH]
    found = {}
    for settings in SETTINGS:
        peer = Trl(model=model, tokenizer=tokenizer, settings=settings)
        seconds = peer.seconds(sample)
        found[str(settings)] = peer.real_tokens / seconds
    best = max(SETTINGS, key=lambda settings: found[str(settings)])
    return Trl(model=model, tokenizer=tokenizer, settings=best), found


def _rates(mine: Ours, peer: Trl, data: TrainingData, *, rounds: int) -> dict[str, list[float]]:
    """Real tokens per second of each side and round, in turns."""
    rates: dict[str, list[float]] = {"ours": [], "peer": []}

    def run_ours(rows: Any) -> float:
        tokens = sum(len(row.input_ids) for row in mine.timed_rows(rows))
        return tokens / mine.seconds(rows)

    def run_peer(rows: Any) -> float:
        seconds = peer.seconds(rows)
        return peer.real_tokens / seconds

    sides: list[tuple[str, Callable[[Any], float]]] = [("ours", run_ours), ("peer", run_peer)]
    for k in range(rounds):
        for name, run in sides if k % 2 == 0 else sides[::-1]:
            gc.collect()
            time.sleep(SETTLE_SECONDS)
            rates[name].append(run(data.chunks[k]))
        line = ", ".join(f"{name} {rates[name][-1]:.0f} tokens/s" for name, _ in sides)
        print(f"  round {k + 1} of {rounds}: {line}", flush=True)
    return rates


def _same_linear(
    setup: Setup, case: Case, data: TrainingData, *, settings: dict[str, Any]
) -> float:
    """The peer's tokens per second with our linear layers, once."""
    model, tokenizer = trl_model(setup.model_dir, kind=case.kind)
    if choose_linear()[0]:
        swap_linear(model, is_packed=False)
    peer = Trl(model=model, tokenizer=tokenizer, settings=settings)
    seconds = peer.seconds(data.chunks[0])
    return peer.real_tokens / seconds
