"""Peak memory above the weights, measured in a fresh process per side.

`python -m tests.benchmarks.memory '{"arm": "ours", ...}'` prints one line of JSON: the high-water
mark of resident memory during one run, less what was resident when the model was loaded and had
answered one short request, and the answers.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import ROOT, Arm
from tests.benchmarks.parity import Scores
from tests.benchmarks.workloads import Builder, Workload

PAGE = resource.getpagesize()


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def forget_peak() -> None:
    """Give free memory back and start the high-water mark anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """High-water mark since it was started anew."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Case:
    """What a child measures. side: ours | lm-eval. batch: of lm-eval."""

    side: str
    task: str
    shots: int
    items: int
    batch: int
    engine: str
    model_dir: str
    data: str | None
    threads: int

    def workload(self) -> Workload:
        """The items that are run."""
        builder = Builder(Path(self.model_dir), data=Path(self.data) if self.data else None)
        return builder.few_shot(self.task, shots=self.shots, items=self.items, chunks=1)[0]


def measure_in_child(case: Case) -> tuple[int, list[Scores]]:
    """Bytes above the weights, and the answers."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.memory",
        json.dumps(dataclasses.asdict(case)),
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found["bytes"], [Scores(logprobs=tuple(of_item)) for of_item in found["answers"]]


def _arm(case: Case) -> Arm:
    builder = Builder(Path(case.model_dir), data=Path(case.data) if case.data else None)
    if case.side == "ours":
        from tests.benchmarks.ours import load_engine, our_arm

        engine = load_engine(case.engine, Path(case.model_dir), builder, threads=case.threads)
        return our_arm(engine, kind="all")
    from tests.benchmarks.scoring_peers import Evaluator, load_model

    model_dir = Path(case.model_dir)
    return Evaluator(load_model(model_dir), model_dir).arm(case.batch)


def main(case: Case) -> None:
    """Load, answer one short request, run, print."""
    arm, workload = _arm(case), case.workload()
    short = dataclasses.replace(workload.items[0], prompt_ids=workload.items[0].prompt_ids[:4])
    arm.run(dataclasses.replace(workload, items=(short,)).first(1, labels=2))
    arm.prepare()
    forget_peak()
    before = resident_bytes()
    answers = arm.run(workload)
    found = {
        "bytes": peak_bytes() - before,
        "answers": [list(a.logprobs) for a in answers if isinstance(a, Scores)],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Case(**json.loads(sys.argv[1])))
