"""Train in groups of forked workers, one group after another, with faults; files of cases come in.

This process imports everything once and forks, so a group starts in less than a second. A case is
{"name", "world_size", "job": a spec as in worker.py, "faults": {...}}. Each worker leaves
<case>/<rank>.json with its records, its summary or its error; a killed one leaves none. After a
worker died the rest of its group has GRACE seconds to notice, then it is killed, as Ray does.

Faults, all optional: kill_at: [rank, step], SIGKILL in a pass of that step. hang_at: [rank, step],
SIGSTOP. stay_away_at: [rank, step], it lives and
does something else than that pass and its collectives.
kill_in_save: [rank, step, point], SIGKILL to that worker when rank 0 is at a point of the
commit of a state. stop_at: step after which the runtime asks to save. oom: [rank, step, rows,
place], a pass with more rows runs out of memory, in "forward" or "backward". file_limit: [step,
bytes], no file can be longer from that step on. nan_at: [rank, step], its gradients
are not numbers. timeout_seconds: of collectives. measured: whether
oneDNN's linear product wins its measurement, true by default.
"""

import json
import os
import resource
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import deepspeed  # noqa: F401 - imported before forking
import peft  # noqa: F401
import torch
import torch.distributed as dist
import transformers  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from conf.errors import CrossoverError
from conf.records import to_dict
from kernels import linear
from training import commit, engine, loop, zero

sys.path.insert(0, str(Path(__file__).parent))
import worker  # noqa: E402

GRACE_SECONDS = 8.0


class Runtime(worker.ListRuntime):
    """Keeps what is reported, and asks to stop after a step."""

    def __init__(self, stop_at):
        super().__init__()
        self._stop_at = stop_at

    def should_save(self):
        return bool(self.records) and self.records[-1]["step"] == self._stop_at


def end_here(signal_number=signal.SIGKILL):
    os.kill(os.getpid(), signal_number)
    time.sleep(60)


def install(faults, rank, directory):
    """Make this worker fail as its case says."""
    run_pass = engine.Engine.run_pass
    where = {"step": 0}
    take_step = loop._take_step

    def counted(step, **kwargs):
        where["step"] = step.step
        if "file_limit" in faults and faults["file_limit"][0] == step.step:
            size = faults["file_limit"][1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return take_step(step, **kwargs)

    def failing(self, batch, *, scale, is_last):
        for fault, number in (("kill_at", signal.SIGKILL), ("hang_at", signal.SIGSTOP)):
            if faults.get(fault) == [rank, where["step"]]:
                end_here(number)
        oom = faults.get("oom")
        is_place = oom is not None and [rank, where["step"]] == oom[:2]
        if is_place and batch.targets.numel() // 2 > oom[2]:  # a row has two targets
            run_out_of_memory(self, batch, place=oom[3])
        if faults.get("stay_away_at") == [rank, where["step"]]:
            time.sleep(600)
        if faults.get("nan_at") == [rank, where["step"]]:
            scale = float("nan")
        return run_pass(self, batch, scale=scale, is_last=is_last)

    loop._take_step, engine.Engine.run_pass = counted, failing
    linear.choose_linear = lambda: (faults.get("measured", True), "as the case says")
    engine.linear_choice = lambda job, *, stage: linear.choose_linear()
    if "kill_in_save" in faults:
        _kill_in_save(*faults["kill_in_save"], rank=rank, where=where, directory=directory)


def run_out_of_memory(trained, batch, *, place):
    """Raise what torch raises, after a forward or in the middle of a backward."""

    def fail(_grad=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    loss = trained._engine(batch)
    if place == "forward":
        fail()
    parameters = [p for p in trained.trainee.model.parameters() if p.requires_grad]
    handle = parameters[len(parameters) // 2].register_hook(fail)
    try:
        trained._engine.backward(loss)
    finally:
        handle.remove()


def _kill_in_save(victim, step, point, *, rank, where, directory):
    """Rank 0 dies at the point itself; another worker when it sees rank 0 there."""
    marker = directory / "here"

    def reached(name):
        if name == point and where["step"] == step and not marker.exists():
            marker.touch()
            if victim == 0:
                end_here()
            time.sleep(0.5)

    def watch():
        while not marker.exists():
            time.sleep(0.01)
        end_here()

    def gather(self, *, keep):
        for number, item in enumerate(gathered(self, keep=keep)):
            if number == 3:
                reached("gathering")
            yield item

    commit._reached = reached
    gathered = engine.Engine.state_tensors
    if rank == 0:
        engine.Engine.state_tensors = gather
    elif rank == victim:
        import threading

        threading.Thread(target=watch, daemon=True).start()


def run_worker(case, rank, directory):
    """One worker of a group, in a process of its own."""
    world_size = case["world_size"]
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    zero.PERSISTED_ELEMENTS = 0
    faults = case.get("faults", {})
    install(faults, rank, directory)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/group",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=faults.get("timeout_seconds", 60)),
    )
    job = worker.make_job(case["job"])
    runtime = Runtime(faults.get("stop_at"))
    result = {"records": runtime.records, "progress": runtime.progress}
    try:
        result["summary"] = to_dict(loop.train(job, runtime))
    except CrossoverError as error:
        result["error"] = [type(error).__name__, str(error)]
    (directory / f"{rank}.json").write_text(json.dumps(result))


def run_case(case, root):
    """Fork the workers of a case and wait for them; their exit codes."""
    directory = root / case["name"]
    directory.mkdir()
    case["job"]["job"]["world_size"] = case["world_size"]
    pids = {}
    for rank in range(case["world_size"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with (directory / f"{rank}.log").open("w", buffering=1) as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                    run_worker(case, rank, directory)
                    code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids[pid] = rank
    return wait_for(pids, case)


def wait_for(pids, case):
    """Exit codes by rank; negative: the signal that ended it."""
    codes, deadline = {}, None
    hang_seconds = case.get("faults", {}).get("timeout_seconds", 60) + 60
    last = time.monotonic() + hang_seconds
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
            if deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
        elif time.monotonic() > min(deadline or last, last):
            for left in pids:
                os.kill(left, signal.SIGKILL)
            deadline = last = float("inf")
        else:
            time.sleep(0.02)
    return codes


def main():
    """Run the cases of each file named on standard input; a line on standard output ends each."""
    for line in sys.stdin:
        path = Path(line.strip())
        for case in json.loads(path.read_text()):
            codes = run_case(case, path.parent)
            (path.parent / case["name"] / "codes.json").write_text(json.dumps(codes))
        print("done", flush=True)


if __name__ == "__main__":
    main()
