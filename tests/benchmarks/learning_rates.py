"""A learning-rate sweep by hand: the best rate of LoRA beside the best of full fine-tuning.

`python -m tests.benchmarks.learning_rates [--data DIRECTORY]`: banking77 as chat, 30 steps of 8
rows, decay to zero; judged by the loss on held-out rows. The interval is a bootstrap over those
rows: how far apart the best rates are in each draw. It does not cover the seed, of which there is
one.
"LoRA Without Regret" (Schulman et al., Thinking Machines, 2025) finds about 10.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.choices import Schedule
from conf.groups import TrainerConfig
from conf.records import RenderedExample
from tests.benchmarks.harness import commit, hardware, rounded, versions
from tests.benchmarks.run import RESULTS, embedded_model
from tests.benchmarks.training_data import BATCH, banking77
from tests.benchmarks.training_ours import Ours, ours
from training.data import make_batch, num_targets

RATES = {
    "full": (1e-4, 3e-4, 1e-3, 3e-3),
    "lora": (1e-3, 3e-3, 1e-2, 3e-2),
}
SEEDS = (0,)
STEPS = 30
HELD_OUT = 160
RESAMPLES = 10_000
Losses = NDArray[np.float64]


def main() -> None:
    """Train at every rate, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("BENCH_DATA") or None)
    options = parser.parse_args()
    model_dir = embedded_model()
    rows = banking77(model_dir, options.data, rows=STEPS * BATCH + HELD_OUT, chunks=1).chunks[0]
    train, held_out = rows[: STEPS * BATCH], rows[STEPS * BATCH :]
    losses = {
        kind: {rate: _losses(model_dir, kind, rate, train, held_out) for rate in rates}
        for kind, rates in RATES.items()
    }
    found = summary(losses)
    content = {
        "name": "learning_rates",
        "work": f"banking77 as chat, {STEPS} steps of {BATCH} rows, {len(SEEDS)} seeds, "
        f"loss per target token on {len(held_out)} held-out rows",
        **found,
        "hardware": hardware(),
        "versions": versions(),
        **commit(),
        "command": "python -m tests.benchmarks.learning_rates",
    }
    path = RESULTS / "learning_rates.json"
    path.write_text(json.dumps(rounded(content), indent=2) + "\n", encoding="utf-8")
    print(json.dumps(rounded(found), indent=2))


def _losses(
    model_dir: Path,
    kind: str,
    rate: float,
    train: Sequence[RenderedExample],
    held_out: Sequence[RenderedExample],
) -> Losses:
    """Loss per target token of each held-out row, averaged over seeds, (rows,)."""
    found = []
    for seed in SEEDS:
        trainer = TrainerConfig(
            batch_size=BATCH, learning_rate=rate, schedule=Schedule.linear, seed=seed
        )
        threads, scratch = os.cpu_count() or 1, Path(tempfile.mkdtemp())
        with ours(
            model_dir, kind=kind, threads=threads, output_dir=scratch, trainer=trainer
        ) as mine:
            mine.seconds(train)
            found.append([_loss(mine, row) for row in held_out])
        print(f"  {kind} {rate:g} seed {seed}: {np.mean(found[-1]):.4f}", flush=True)
    return np.mean(found, axis=0)  # type: ignore[no-any-return]


def _loss(mine: Ours, row: RenderedExample) -> float:
    batch = make_batch([row], layout=mine.engine.trainee.layout, pad_id=0)
    return float(mine.engine.evaluate_pass(batch)) / num_targets(row)


def summary(losses: dict[str, dict[float, Losses]]) -> dict[str, Any]:
    """The table of losses, the best rates, and how far they are apart in bootstrap draws."""
    draws = np.random.default_rng(0)
    size = len(next(iter(losses["full"].values())))
    picks = draws.integers(0, size, (RESAMPLES, size))
    table: dict[str, dict[str, Any]] = {}
    chosen: dict[str, NDArray[np.float64]] = {}
    best: dict[str, float] = {}
    for kind, by_rate in losses.items():
        rates = np.array(list(by_rate))
        means = np.stack([by_rate[rate][picks].mean(axis=1) for rate in rates])  # (rates, draws)
        chosen[kind] = rates[np.argmin(means, axis=0)]
        best[kind] = min(by_rate, key=lambda rate: float(by_rate[rate].mean()))
        table[kind] = {
            f"{rate:g}": {
                "loss": float(by_rate[rate].mean()),
                "low": float(np.quantile(means[i], 0.025)),
                "high": float(np.quantile(means[i], 0.975)),
                "n": size,
            }
            for i, rate in enumerate(rates)
        }
    apart = chosen["lora"] / chosen["full"]
    return {
        "losses": table,
        "best": best,
        "best_lora_over_best_full": {
            "value": best["lora"] / best["full"],
            "low": float(np.quantile(apart, 0.025)),
            "high": float(np.quantile(apart, 0.975)),
            "n": size,
        },
    }


if __name__ == "__main__":
    main()
