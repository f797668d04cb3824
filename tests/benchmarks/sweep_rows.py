"""Rows of sweeps: our search as a user types it, against Ray Tune with a process a trial.

Both sides are commands, measured from start to exit, on the same rows, items, steps and batch size;
the peer (sweep_peer.py) is given the prepared rows for nothing and may group its batches by length.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path
from typing import Any

from tests.benchmarks.comparing import Absent, Setup
from tests.benchmarks.harness import Result, ratio_of
from tests.benchmarks.sweep_runs import OurRun, PeerRun, Sweep

WITHOUT_HALVING = ("sweep.halving.enabled=false",)
GRID = ("sweep=grid", "+sweep.space.lora.trainer.learning_rate.grid=4")
MAX_TOKEN_SHARE = 1 / 3  # of the grid's
MEASURED_OF_GRID = 4  # trials of the grid that the peer is measured on, one of each rank


def sweep_makespan(setup: Setup) -> list[Result]:
    """8 trials, all of their steps: our command against the peer's, in turns."""
    _require_tune()
    _, rounds = setup.cap(sys.maxsize, 2)
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep(setup, WITHOUT_HALVING, steps=setup.items, scratch=Path(scratch))
        ours = [_told(sweep.run_ours())]
        settings, searched = sweep.best_settings(ours[0])
        peer = [sweep.run_peer(ours[0], settings)]
        for k in range(1, rounds):
            if k % 2:
                peer.append(sweep.run_peer(ours[0], settings))
            ours.append(_told(sweep.run_ours()))
            if not k % 2:
                peer.append(sweep.run_peer(ours[0], settings))
            print(f"  round {k + 1} of {rounds}: peer {peer[k].seconds:.1f} s", flush=True)
        parity = sweep.parity(ours[0], settings, trial=_winner(ours[0]))
    seconds = {side: [run.seconds for run in of] for side, of in (("ours", ours), ("peer", peer))}
    first = ours[0]
    result = Result(
        name="sweep_makespan",
        work=f"{len(peer[0].trials)} LoRA trials (rate x rank), {len(first.steps(0))} steps of 8 "
        "rows of sms_spam each, scored on 48 items, not halved; from a command's start to its end",
        ours=statistics.median(seconds["ours"]),
        peer=statistics.median(seconds["peer"]),
        peer_version=_peer_version(),
        ratio=ratio_of(seconds["ours"], seconds["peer"]),
        floor=2.5,
        aim=4.0,
        bound=None,
        unit="seconds",
        parity=parity.parity,
        more={
            "seconds": seconds,
            "ours_stages": [run.stages for run in ours],
            "peer_stages": [run.stages() for run in peer],
            "peer_settings": settings,
            "settings_seconds": searched,
            "tokens": {"ours": first.tokens, "peer": peer[0].tokens},
            "accuracy": _accuracies(first, peer[0]),
            "parity_trial": parity.told(),
            "rounds": rounds,
            "data": "sms_spam, embedded",
        },
    )
    result.judge()
    return [result]


def sweep_halving(setup: Setup) -> list[Result]:
    """16 settings, halved, against the whole grid by the peer, whose time is composed."""
    _require_tune()
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep(setup, GRID, steps=setup.items, scratch=Path(scratch))
        trials = sweep.trials()
        ours = _told(sweep.run_ours())
        settings, searched = sweep.best_settings(ours)
        some = trials[:: len(trials) // MEASURED_OF_GRID]
        peer = sweep.run_peer(ours, settings, trials=some)
        parity = sweep.parity(ours, settings, trial=_winner(ours))
    peer_seconds = peer.seconds_of(len(trials))
    peer_tokens = peer.tokens * len(trials) // len(some)
    result = Result(
        name="sweep_halving",
        work=f"{len(trials)} settings (rate x rank) of LoRA on sms_spam: halved, against the grid",
        ours=ours.seconds,
        peer=peer_seconds,
        peer_version=_peer_version(),
        ratio=ratio_of([ours.seconds], [peer_seconds]),
        floor=4.0,
        aim=8.0,
        bound=None,
        unit="seconds",
        parity=parity.parity,
        more={
            "peer_composed_of": f"{len(some)} trials of the grid, one of each rank, measured in "
            f"{peer.seconds:.0f} s; start and end once, the rest {len(trials) // len(some)} times",
            "ours_stages": ours.stages,
            "peer_stages": peer.stages(),
            "peer_settings": settings,
            "settings_seconds": searched,
            "tokens": {"ours": ours.tokens, "peer": peer_tokens, "ours_grid": ours.grid_tokens},
            "token_share": ours.tokens / peer_tokens,
            "token_share_of_our_grid": ours.tokens / ours.grid_tokens,
            "step_share": _step_share(ours),
            "decisions": [_decided(record) for record in ours.of("RungDecision")],
            "chosen": _chosen(ours),
            "parity_trial": parity.told(),
            "data": "sms_spam, embedded",
        },
    )
    result.judge()
    share = ours.tokens / peer_tokens
    if share > MAX_TOKEN_SHARE:
        result.failures.append(f"tokens: {share:.2f} of the grid's, allowed {MAX_TOKEN_SHARE:.2f}")
    return [result]


def _told(run: OurRun) -> OurRun:
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in run.stages.items())
    print(f"  ours {run.seconds:.1f} s: {parts}", flush=True)
    return run


def _winner(run: OurRun) -> int:
    return int(run.of("SweepChoice")[0]["trials"][0])


def _chosen(run: OurRun) -> dict[str, Any]:
    row = [r for r in run.of("TrialRecord") if r["trial"] == _winner(run)][-1]
    return {"label": row["label"], "value": run.of("SweepChoice")[0]["value"]}


def _decided(record: dict[str, Any]) -> dict[str, Any]:
    kept, left = len(record["keep"]), len(record["drop"]) + len(record["failed"])
    facts = {key: record[key] for key in ("rung", "correlation", "is_grace")}
    return facts | {"kept": kept, "left": left}


def _step_share(run: OurRun) -> float:
    """Steps taken, of those that the grid takes."""
    by_trial = {record["trial"]: int(record["steps"]) for record in run.of("TrialRecord")}
    taken = by_trial.values()
    return sum(taken) / (max(taken) * len(taken))


def _accuracies(ours: OurRun, peer: PeerRun) -> dict[str, list[float]]:
    """Of the trials at their end, by number; the peer's batches are others."""
    own = {record["trial"]: record["value"]["value"] for record in ours.of("RungRecord")}
    its = {number: statistics.fmean(trial["right"]) for number, trial in peer.trials.items()}
    return {"ours": [own[k] for k in sorted(own)], "peer": [its[k] for k in sorted(its)]}


def _peer_version() -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("peft", "transformers"))
    return f"ray tune {metadata.version('ray')}, a process a trial, {versions}"


def _require_tune() -> None:
    if any(util.find_spec(name) is None for name in ("ray", "pandas", "pyarrow")):
        raise Absent("Ray Tune cannot be imported here")
