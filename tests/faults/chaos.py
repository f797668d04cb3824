"""`python -m tests.faults chaos --minutes 30 --seed 0`: random kills, and what holds after them.

Something of a run is killed every 20 to 40 s: a training worker, an engine's process, or the
driver, after which the command is typed again. When the run is done it must have left what an
undisturbed one leaves; then the next one starts, until the time is over.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from conf.hashing import sha256_of_file
from tests.launch.embedding_hook import billed, hooked, passes, processes_of
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
# Some 60 s undisturbed on two free cores: 400 steps, and four arms that answer 96 items.
RUN = (
    *("+exp=lora", "model=tiny", "run.name=r", "tracking=none", "engine.latency_requests=0"),
    *("+method@arms.few_shot=few_shot", "arms.few_shot.num_shots=2"),
    *("+method@arms.chain_of_thought=chain_of_thought", "general.items=0"),
    *("task.limit.train=160", "task.limit.validation=48", "task.limit.test=48"),
    *("trainer.epochs=100", "trainer.max_steps=400", "trainer.state_every_steps=10"),
)
GAP_SECONDS = (20.0, 40.0)
GONE_SECONDS = 60.0
TITLES = {"worker": ("fit_here", "RayTrainWorker"), "engine": ("Evaluator", "EngineActor")}
TIMES = ("step_seconds", "device_seconds", "usd", "flops_share", "peak_memory_bytes")
ANSWER = (
    *("set", "item_id", "repeat", "draw", "paraphrase", "num_shots", "step", "call", "answer_by"),
)


@dataclass(frozen=True)
class Left:
    """What a run leaves, whatever happened on its way."""

    steps: list[dict[str, Any]]
    weights: str
    answers: dict[str, list[tuple[Any, ...]]]

    @classmethod
    def by(cls, run: Path) -> Left:
        """From the run's directory."""
        steps = [
            {k: v for k, v in step.items() if k not in TIMES}
            for step in lines(run / "arms/lora/train.jsonl")
        ]
        answers = {
            path.parent.name: sorted(
                tuple(repr(s[key]) for key in (*ANSWER, "answer")) for s in lines(path)
            )
            for path in run.glob("arms/*/samples.jsonl")
        }
        weights = run / "arms/lora/final/checkpoint/adapter_model.safetensors"
        return cls(steps=steps, weights=sha256_of_file(weights), answers=answers)


def lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines so far."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def require(holds: bool, what: str) -> None:
    """Not an assert: chaos also runs where these are left out."""
    if not holds:
        raise AssertionError(what)


def require_as_undisturbed(root: Path, undisturbed: Left) -> None:
    """Equal records and weights, none twice, and a bill of all that was computed."""
    left = Left.by(root / "r")
    require(
        [s["step"] for s in left.steps] == list(range(1, len(undisturbed.steps) + 1)),
        "a step is missing or there twice",
    )
    require(left.steps == undisturbed.steps, _difference(left.steps, undisturbed.steps))
    require(left.weights == undisturbed.weights, "the weights differ")
    for arm, answers in left.answers.items():
        keys = [answer[: len(ANSWER)] for answer in answers]
        require(len(set(keys)) == len(keys), f"{arm} has an answer twice")
    require(left.answers == undisturbed.answers, "an answer differs")
    done = Counter(
        event["job"]
        for event in lines(root / "r/journal.jsonl")
        if event["event"] == "job_done" and not event["data"]["is_reused"]
    )
    require(set(done.values()) == {1}, f"a job ran to its end twice: {done}")
    told, computed = billed(root / "r"), sum(passes(root))
    require(told == computed, f"{told} tokens billed, {computed} computed")


def _difference(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> str:
    """The first step that differs, and in what."""
    for a, b in zip(found, wanted, strict=True):
        fields = [f"{name} {a.get(name)} for {b[name]}" for name in b if a.get(name) != b[name]]
        if fields:
            return f"step {a['step']} differs: {', '.join(fields)}"
    return ""


class Run:
    """The command in a directory of its own, typed as often as it takes."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.root = root
        self._environment = hooked(root)
        self.type_command()

    def type_command(self) -> None:
        """Start it; what it prints is added to out.txt."""
        command = [sys.executable, str(ROOT / "launch.py"), f"run.root={self.root}", *RUN]
        with (self.root / "out.txt").open("ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, cwd=self.root, env=self._environment
            )

    def wait(self) -> None:
        """To its end, with nobody killing."""
        code = self.process.wait(timeout=HANG_SECONDS)
        require(code == 0, f"exit code {code}: {self.said()}")

    def said(self) -> str:
        """The end of what it printed."""
        return (self.root / "out.txt").read_text(encoding="utf-8")[-2000:]

    def targets(self) -> dict[str, list[psutil.Process]]:
        """What can be killed now, by kind."""
        driver = psutil.Process(self.process.pid)
        found = {"driver": [driver]}
        for child in driver.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                title = " ".join(child.cmdline())
                for kind, names in TITLES.items():
                    if title.startswith("ray::") and any(name in title for name in names):
                        found.setdefault(kind, []).append(child)
        return found

    def progress(self) -> int:
        """Records of all arms so far. A kill may take some away; they come again."""
        paths = (self.root / "r/arms").glob("*/*.jsonl")
        return sum(path.read_bytes().count(b"\n") for path in paths)

    def wait_until_gone(self) -> float:
        """Until no process of a killed driver is left; returns how long it took."""
        began = time.monotonic()
        while left := processes_of(self.root):
            require(time.monotonic() - began < GONE_SECONDS, f"left behind: {left}")
            time.sleep(0.2)
        return time.monotonic() - began

    def end(self) -> None:
        """Whatever happened: leave no process."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=GONE_SECONDS)
            self.process.kill()
        self.wait_until_gone()


@dataclass(kw_only=True)
class Chaos:
    """Runs that are killed at random; kills: what, and seconds to the next new record."""

    seed: int
    seconds: float
    kills: list[tuple[str, float]] = field(default_factory=list)
    num_runs: int = 0

    def run(self) -> None:
        """One undisturbed run, then killed ones until the time is over, each to its end."""
        draw = random.Random(self.seed)
        directory = Path(tempfile.mkdtemp(prefix="chaos", dir="/tmp"))  # stays where a run fails
        undisturbed = self._one(directory / "undisturbed", lambda run: None)
        say(f"undisturbed: final loss {undisturbed.steps[-1]['loss']}")
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            self.num_runs += 1
            root = directory / f"run-{self.num_runs}"
            self._one(root, lambda run: self._disturb(run, draw, end), undisturbed)
            say(f"run {self.num_runs}: final loss, records, answers and bill as undisturbed")
        directory.rmdir()

    def _one(
        self, root: Path, disturb: Callable[[Run], None], undisturbed: Left | None = None
    ) -> Left:
        """A run from its start to its end, and what it left."""
        run = Run(root)
        try:
            disturb(run)
            run.wait()
        finally:
            run.end()
        left = Left.by(root / "r")
        try:
            require_as_undisturbed(root, undisturbed or left)
        except AssertionError as error:
            raise AssertionError(f"{error}; all of it: {root}") from None
        shutil.rmtree(root)
        return left

    def _disturb(self, run: Run, draw: random.Random, end: float) -> None:
        """Kill something, again and again, until the run has ended or the time is over."""
        before = len(self.kills)
        seconds = 0.0
        while time.monotonic() < end or len(self.kills) == before:
            try:
                run.process.wait(timeout=max(1.0, draw.uniform(*GAP_SECONDS) - seconds))
                break
            except subprocess.TimeoutExpired:
                seconds = self._kill(run, draw)
        require(len(self.kills) > before, f"it ended before a kill: {run.said()}")

    def _kill(self, run: Run, draw: random.Random) -> float:
        """Returns the seconds from the kill to the next record that was not there before."""
        found = run.targets()
        kind = draw.choice(sorted(found))
        victim = draw.choice(found[kind])
        before, began = run.progress(), time.monotonic()
        say(f"kill {kind}, after {before} records")
        victim.kill()
        if kind == "driver":
            run.process.wait()
            run.wait_until_gone()
            run.type_command()
        while run.progress() <= before and run.process.poll() is None:
            require(time.monotonic() - began < HANG_SECONDS, f"no progress: {run.said()}")
            time.sleep(0.1)
        seconds = time.monotonic() - began
        self.kills.append((kind, seconds))
        return seconds

    def told(self) -> str:
        """What happened, in a line."""
        counts = Counter(kind for kind, _ in self.kills)
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))
        worst = max(seconds for _, seconds in self.kills)
        return (
            f"seed {self.seed}, {self.seconds / 60:g} minutes: {self.num_runs} runs, "
            f"{len(self.kills)} kills ({kinds}), each followed by a new record within {worst:.0f} s"
            "; final loss, weights, answers and bill as undisturbed, no record twice"
        )


def say(text: str) -> None:
    """A line with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def main(argv: Sequence[str]) -> int:
    """Exit 0: all held. 1: something did not, and what. 130: interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults chaos")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    chaos = Chaos(seed=options.seed, seconds=60 * options.minutes)
    say(f"seed {chaos.seed}, {options.minutes:g} minutes")
    try:
        chaos.run()
    except KeyboardInterrupt:
        return 130
    except AssertionError as error:
        say(f"failed: {error}")
        return 1
    say(chaos.told())
    return 0
