"""The loop of a pack: steps, rungs, who has finished, and the state that it goes on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from conf.trial_records import TrialOutcome
from training.job import Runtime, TrainingStopped, TrainJob
from training.pack import Pack


def train_pack(
    jobs: Sequence[TrainJob],
    runtime: Runtime,
    *,
    rung_rows_path: Path,
    rungs: Sequence[float],
    judge: Callable[[Pack, int], None],
) -> tuple[TrialOutcome, ...]:
    """Train LoRA trials together until each is done, dropped or failed.

    Weights go to <output_dir>/trials/<trial>/final/checkpoint of each trial that ends; a record of
    each trial and step goes to the runtime.

    Args:
        jobs: the trials to begin with; `trial` numbers them, and but for method, trainer and
            output_dir they are alike.
        runtime: of this worker; every one of them makes this call, with torch.distributed
            initialised where there are several.
        rung_rows_path: JSONL of LabelRow, the validation items.
        rungs: shares of a trial's steps, ascending, e.g. 0.11, 0.33, 1.
        judge: is called when trials have reached a rung, with the pack (scores[rung] holds the
            scores of all that ever did) and the rung's index; may `drop` and `add` trials.

    Returns:
        How each trial left, by number.

    Raises:
        DataError, ConfigError, ModelError: bad rows or jobs, before a step is taken.
        JobFailed: no memory for one part alone.
        WorkerLost: another worker died or hangs: start all of them again.
        TrainingStopped: the runtime asked for it; the same call goes on where it stopped.
    """
    torch.set_num_threads(jobs[0].threads)
    if jobs[0].device == "cuda":
        torch.cuda.set_device(runtime.local_rank)
    pack = Pack(jobs, runtime, rung_rows_path=rung_rows_path, rungs=rungs)
    while pack.live:
        with pack.workers.named("a step of the search"):
            _step(pack, runtime, judge)
    return tuple(outcome for _, outcome in sorted(pack.outcomes.items()))


def _step(pack: Pack, runtime: Runtime, judge: Callable[[Pack, int], None]) -> None:
    """One step of all trials, and what follows from it."""
    pack.step()
    is_at_rung = False
    for rung in pack.reached():
        is_at_rung = True
        judge(pack, rung)
    pack.finish()
    is_asked = bool(pack.workers.number_of_first(int(runtime.should_save())))
    if pack.live and (is_at_rung or is_asked):
        pack.save_state()
    if pack.live and is_asked:
        raise TrainingStopped(max(trial.step for trial in pack.live.values()))
