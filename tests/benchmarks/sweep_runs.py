"""Both sides of a sweep as commands: what they are told, and what they leave.

Ours is the command that a user types; the peer's is sweep_peer.py. Both have the same rows, items,
steps and batch size; the peer is given the prepared rows for nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from conf.methods import LoraMethod
from launch.compose import compose_config
from launch.search.trials import Trial, trials_of
from tests.benchmarks.comparing import Setup
from tests.benchmarks.harness import ROOT
from tests.benchmarks.parity import Parity
from training.job import default_learning_rate
from training.schedule import learning_rate_at, num_steps
from training.sharding import epoch_order, global_batches

ARM = "lora"
# A search and nothing beside it: no other arm, no general set, no latency, no tracking, a test
# split of two items.
ONLY_SEARCH = (
    "+exp=sweep", "~method@arms.zero_shot", "tracking=none", "general.items=0",
    "engine.latency_requests=0", "task.limit.test=2",
)  # fmt: skip
MAX_LOSS_GAP = 1e-4
PARITY_STEPS = 10  # later ones differ by what rounding has grown to; the largest gap is told
PROBED_TRIALS, PROBED_STEPS, PROBED_ROWS = 2, 4, 8


@dataclass(kw_only=True, slots=True, frozen=True)
class OurRun:
    """What our command left. seconds: from start to exit. records: of the search job.

    stages: seconds of its parts. rows, items: what was trained on and scored.
    """

    seconds: float
    stages: dict[str, float]
    records: tuple[dict[str, Any], ...]
    rows: Path
    items: Path

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The records of a type."""
        return [record for record in self.records if record["type"] == kind]

    def steps(self, trial: int) -> list[dict[str, Any]]:
        """A trial's TrainRecords, in order."""
        return [record for record in self.of("TrainRecord") if record["trial"] == trial]

    @property
    def tokens(self) -> int:
        """Rows through the base: trained, scored, and asked of checkpoints."""
        extra = [
            line for line in self.of("LedgerLine") if line["purpose"] in ("agreement", "redone")
        ]
        every = (*self.of("TrainRecord"), *self.of("RungRecord"), *extra)
        return sum(int(record["tokens"]) for record in every)

    @property
    def grid_tokens(self) -> int:
        """The same, if every trial had taken all its steps and were scored once."""
        by_trial = {r["trial"]: len(self.steps(r["trial"])) for r in self.of("TrainRecord")}
        longest = max(by_trial, key=by_trial.__getitem__)
        scored = max(int(record["tokens"]) for record in self.of("RungRecord"))
        trained = sum(int(record["tokens"]) for record in self.steps(longest))
        return len(by_trial) * (trained + scored)


@dataclass(kw_only=True, slots=True, frozen=True)
class PeerRun:
    """What the peer's command left. trials: by number; see sweep_peer.run_trial."""

    seconds: float
    trials: dict[int, dict[str, Any]]

    @property
    def tokens(self) -> int:
        """Real tokens forwarded: trained and scored."""
        return sum(trial["tokens"] + trial["scored_tokens"] for trial in self.trials.values())

    def seconds_of(self, num_trials: int) -> float:
        """Of so many trials like these: Ray's start and end once, what is between by number.

        The processes' start before the first trial is counted once, in the peer's favour.
        """
        marks = [trial["marks"] for trial in self.trials.values()]
        first, last = min(m[0] for m in marks), max(m[-1] for m in marks)
        return self.seconds + (num_trials / len(marks) - 1) * float(last - first)

    def stages(self) -> dict[str, float]:
        """Mean seconds of a trial's parts."""
        names = ("load", "train", "score")
        marks = [trial["marks"] for trial in self.trials.values()]
        return {
            name: statistics.fmean(m[k + 1] - m[k] for m in marks) for k, name in enumerate(names)
        }


@dataclass(slots=True)
class Sweep:
    """A sweep that both sides run.

    overrides: beyond those that leave the search alone. steps: of a trial; None: as configured.
    scratch: where runs are written.
    """

    setup: Setup
    overrides: tuple[str, ...]
    _: KW_ONLY
    steps: int | None
    scratch: Path

    @property
    def typed(self) -> list[str]:
        """The overrides of our command, but for where it writes."""
        model = ["model=hub", f"model.path={self.setup.model_dir}"]
        capped = [] if self.steps is None else [f"trainer.max_steps={self.steps}"]
        return [*ONLY_SEARCH, *self.overrides, *model, *capped]

    def trials(self) -> tuple[Trial, ...]:
        """Its trials, as our command draws them."""
        return trials_of(compose_config(self.typed), ARM)

    def run_ours(self) -> OurRun:
        """Our command, in a fresh directory, so that nothing is reused."""
        root = self._fresh()
        command = [sys.executable, "launch.py", *self.typed, f"run.root={root}", "run.name=run"]
        started = time.time()
        _run(command, log=root / "log.txt", threads=self.setup.threads)
        return read_ours(root, started=started, seconds=time.time() - started)

    def run_peer(
        self,
        ours: OurRun,
        settings: dict[str, int],
        *,
        trials: Sequence[Trial] | None = None,
        has_our_batches: bool = False,
    ) -> PeerRun:
        """The peer's command, on all trials or some; else than ours its batches are grouped."""
        root = self._fresh()
        lengths = [len(row["input_ids"]) for row in lines(ours.rows)]
        trials = self.trials() if trials is None else trials
        message = {
            "model_dir": str(self.setup.model_dir),
            "rows": str(ours.rows),
            "items": str(ours.items),
            "trials": [peer_trial(t, lengths, is_grouped=not has_our_batches) for t in trials],
            "clip_norm": trials[0].arm.trainer.clip_norm,
            "output_dir": str(root),
            **settings,
        }
        path = root / "message.json"
        path.write_text(json.dumps(message), encoding="utf-8")
        started = time.time()
        command = [sys.executable, "-m", "tests.benchmarks.sweep_peer", str(path)]
        _run(command, log=root / "log.txt", threads=settings["threads"])
        seconds = time.time() - started
        found = [json.loads(path.read_text()) for path in root.glob("trial-*.json")]
        return PeerRun(seconds=seconds, trials={trial["trial"]: trial for trial in found})

    def best_settings(self, ours: OurRun) -> tuple[dict[str, int], dict[str, float]]:
        """The peer's fastest settings on a few steps of two trials, and the seconds of all."""
        threads = self.setup.threads
        places = [{"concurrency": 1, "threads": threads}]
        places += [{"concurrency": threads, "threads": 1}] if threads > 1 else []
        steps = min(PROBED_STEPS, self.steps or PROBED_STEPS)
        short = Sweep(self.setup, self.overrides, steps=steps, scratch=self.scratch)
        ours = dataclasses.replace(ours, items=self._few(ours.items))
        seconds: dict[str, float] = {}
        candidates = [place | {"micro_batch": rows} for place in places for rows in (8, 4)]
        for settings in candidates:
            found = short.run_peer(ours, settings, trials=short.trials()[:PROBED_TRIALS])
            seconds[str(settings)] = found.seconds
            print(f"  {settings}: {found.seconds:.1f} s", flush=True)
        return min(candidates, key=lambda own: seconds[str(own)]), seconds

    def parity(self, ours: OurRun, settings: dict[str, int], *, trial: int) -> SweepParity:
        """One trial of ours, on our batches, by the peer's code."""
        alone = settings | {"concurrency": 1, "threads": self.setup.threads}
        own = [self.trials()[trial]]
        peer = self.run_peer(ours, alone, trials=own, has_our_batches=True)
        return compare_trial(ours, peer.trials[trial])

    def _few(self, items: Path) -> Path:
        """The rows of the first items, since what is looked for are steps."""
        found = items.read_text(encoding="utf-8").splitlines(keepends=True)
        path = self._fresh() / items.name
        path.write_text("".join(found[:PROBED_ROWS]), encoding="utf-8")
        return path

    def _fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.scratch))


@dataclass(kw_only=True, slots=True, frozen=True)
class SweepParity:
    """A trial of both sides on the same batches. gaps: of the losses of each step."""

    trial: int
    gaps: tuple[float, ...]
    differing_items: int
    parity: Parity

    def told(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "trial": self.trial,
            "loss_gaps": self.gaps,
            "judged_steps": min(PARITY_STEPS, len(self.gaps)),
            "items_answered_otherwise": self.differing_items,
        }


def compare_trial(ours: OurRun, peer: dict[str, Any]) -> SweepParity:
    """Losses step by step, and how many validation items are answered otherwise at the end."""
    own = ours.steps(peer["trial"])
    gaps = tuple(abs(a["loss"] - b) for a, b in zip(own, peer["losses"], strict=True))
    last = [r for r in ours.of("RungRecord") if r["trial"] == peer["trial"]][-1]
    assert last["step"] == len(gaps), "the trial was not scored after its last step"
    differing = sum(a != b for a, b in zip(last["per_item"], peer["right"], strict=True))
    worst = max(gaps[:PARITY_STEPS])
    why = f"losses differ by {worst:.1e}" if worst > MAX_LOSS_GAP else ""
    parity = Parity(checked=len(gaps[:PARITY_STEPS]), ok=not why, worst=worst, why=why)
    return SweepParity(trial=peer["trial"], gaps=gaps, differing_items=differing, parity=parity)


def peer_trial(trial: Trial, lengths: Sequence[int], *, is_grouped: bool) -> dict[str, Any]:
    """What the peer is told of a trial: setting, batches and rates of all its steps."""
    method, trainer = trial.arm.training, trial.arm.trainer
    total = num_steps(len(lengths), trainer=trainer)
    assert isinstance(method, LoraMethod)
    given = trainer.learning_rate
    peak = default_learning_rate(method) if given is None else given
    if is_grouped:
        batches = grouped_batches(lengths, trainer.batch_size, seed=trainer.seed, steps=total)
    else:
        batches = [
            list(batch)
            for batch in global_batches(
                len(lengths), batch_size=trainer.batch_size, seed=trainer.seed, total_steps=total
            )
        ]
    return {
        "number": trial.number,
        "lora_rank": method.lora_rank,
        "lora_alpha": method.lora_alpha,
        "seed": trainer.seed,
        "batches": batches,
        "rates": [
            learning_rate_at(step, total_steps=total, peak=peak, trainer=trainer)
            for step in range(1, total + 1)
        ],
    }


def grouped_batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, steps: int
) -> list[list[int]]:
    """Batches of rows of near-equal length, in random order, each row once an epoch."""
    by_length = sorted(range(len(lengths)), key=lambda row: lengths[row])
    parts = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    found: list[list[int]] = []
    while len(found) < steps:
        epoch = len(found) // len(parts)
        found += [parts[k] for k in epoch_order(len(parts), seed=seed, epoch=epoch)]
    return found[:steps]


def read_ours(root: Path, *, started: float, seconds: float) -> OurRun:
    """What our command left below its root, where there is one search."""
    (path,) = [p for p in (root / ".cache" / "jobs").glob("*/records.jsonl") if "SweepChoice" in
               p.read_text(encoding="utf-8")]  # fmt: skip
    records = tuple(lines(path))
    (rows,) = (root / ".cache" / "jobs").glob("*/rows.jsonl")
    (items,) = (root / ".cache" / "jobs").glob("*/rung_rows.jsonl")
    return OurRun(
        seconds=seconds,
        stages=_stages(root, records, started=started, seconds=seconds),
        records=records,
        rows=rows,
        items=items,
    )


def _stages(
    root: Path, records: Sequence[dict[str, Any]], *, started: float, seconds: float
) -> dict[str, float]:
    """Where our seconds went: before the search, its steps, scores and the rest, after it."""
    events = [(e["event"], e["job"], e["time"]) for e in lines(root / "run" / "journal.jsonl")]
    search = f"search:{ARM}"
    begin = next(t for event, job, t in events if (event, job) == ("job_started", search))
    end = next(t for event, job, t in events if (event, job) == ("job_done", search))
    steps = sum(r["step_seconds"] for r in records if r["type"] == "TrainRecord")
    cores = os.cpu_count() or 1
    scores = sum(r["device_seconds"] for r in records if r["type"] == "RungRecord") / cores
    return {
        "before_search": begin - started,
        "search_steps": steps,
        "search_scores": scores,
        "search_rest": end - begin - steps - scores,
        "after_search": started + seconds - end,
    }


def _run(command: Sequence[str], *, log: Path, threads: int) -> None:
    """A command to its end; its words are shown where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, check=False
        )
    if done.returncode:
        raise RuntimeError(
            f"{command[:3]} ended with {done.returncode}:\n{log.read_text()[-3000:]}"
        )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
