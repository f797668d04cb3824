"""The row of a pack's memory: 8 adapters against one, at equal tokens of a step.

Memory is the high-water mark of the resident memory of the process that trains, all of it: the base
model, adapters, Adam's moments and what a step holds. Each side is a fresh process, which prints
one line of JSON: `python -m tests.benchmarks.pack_memory '{"side": "ours", ...}'`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.benchmarks.comparing import Setup
from tests.benchmarks.harness import ROOT, Result, ratio_of
from tests.benchmarks.memory import peak_bytes, resident_bytes
from tests.benchmarks.parity import Parity

ADAPTERS = 8
LONGEST = 64  # tokens of a row at most
MAX_RATIO, AIMED_RATIO = 1.4, 1.25  # of ours over the peer's
MAX_LOSS_GAP = 1e-4


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Case:
    """What a child measures. side: ours | peer. steps: that it takes."""

    side: str
    model_dir: str
    data: str | None
    threads: int
    steps: int


def pack_memory(setup: Setup) -> list[Result]:
    """8 adapters with a row each in a pass, against one adapter with 8 rows in a pass."""
    steps, rounds = setup.cap(4, 3)
    case = Case(
        side="", steps=steps, model_dir=str(setup.model_dir),
        data=str(setup.data) if setup.data else None, threads=setup.threads,
    )  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for _ in range(rounds):
        for side, of in found.items():
            of.append(measure_in_child(dataclasses.replace(case, side=side)))
            print(f"  {side}: {of[-1]['peak_bytes'] / 1e6:.0f} MB", flush=True)
    peaks = {side: [float(one["peak_bytes"]) for one in of] for side, of in found.items()}
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(*found.values(), strict=True))
    is_same = worst <= MAX_LOSS_GAP
    result = Result(
        name="pack_memory",
        work=f"peak resident memory of the training process: {ADAPTERS} LoRA adapters r=16 with a "
        f"row of at most {LONGEST} tokens each in a step, against one with {ADAPTERS} rows",
        ours=statistics.median(peaks["ours"]),
        peer=statistics.median(peaks["peer"]),
        peer_version=f"peft {metadata.version('peft')}",
        ratio=ratio_of(peaks["ours"], peaks["peer"]),
        floor=1 / MAX_RATIO,
        aim=1 / AIMED_RATIO,
        bound=None,
        unit="bytes",
        parity=Parity(
            checked=rounds, ok=is_same, worst=worst, why="" if is_same else f"loss off by {worst}"
        ),
        more={
            "times_the_peer": statistics.median(peaks["ours"]) / statistics.median(peaks["peer"]),
            "loaded_bytes": {side: of[0]["loaded_bytes"] for side, of in found.items()},
            "tokens_a_step": {side: of[0]["tokens"] for side, of in found.items()},
            "peaks": peaks,
            "steps": steps,
            "rounds": rounds,
            "data": found["ours"][0]["data"],
        },
    )
    result.judge()
    return [result]


def measure_in_child(case: Case) -> dict[str, Any]:
    """Peak and loaded bytes, tokens of a step, and the loss of the first one over all its rows."""
    text = json.dumps(dataclasses.asdict(case))
    command = [sys.executable, "-m", "tests.benchmarks.pack_memory", text]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(case: Case) -> None:
    """Load, take the steps, print."""
    import torch

    from tests.benchmarks.pack_rows import Packed, Solo, cut
    from tests.benchmarks.training_data import banking77
    from training.data import num_targets

    torch.set_num_threads(case.threads)
    data = Path(case.data) if case.data else None
    setup = Setup(model_dir=Path(case.model_dir), data=data, engine="", threads=case.threads)
    made = banking77(setup.model_dir, data, rows=ADAPTERS, chunks=case.steps)
    chunks = [cut(rows, longest=LONGEST) for rows in made.chunks]
    model = Packed.load(setup) if case.side == "ours" else Solo.load(setup, adapters=1)
    loaded = resident_bytes()
    losses = []
    for rows in chunks:
        batches = [[row] for row in rows] if case.side == "ours" else [rows]
        losses.append(model.step(batches))
    weights = [num_targets(row) for row in chunks[0]] if case.side == "ours" else [1]
    mean = sum(a * b for a, b in zip(losses[0], weights, strict=True)) / sum(weights)
    tokens = sum(len(row.input_ids) for row in chunks[-1])
    found = {"peak_bytes": peak_bytes(), "loaded_bytes": loaded, "tokens": tokens, "loss": mean}
    print(json.dumps(found | {"data": made.source}))


if __name__ == "__main__":
    main(Case(**json.loads(sys.argv[1])))
