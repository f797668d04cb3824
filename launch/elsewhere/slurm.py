"""`cluster=slurm`: a batch script that starts Ray on its nodes, drives the run and requeues.

One script plays both parts. As the batch job it makes a token, starts itself once on each node with
`srun`, and hears from Slurm shortly before the limit. On a node it keeps a Ray running for as long
as the first node's answers; the first node also drives the run. Not `ray symmetric-run`: it ends
with `ray stop`, which ends every Ray of a shared node, and it passes no signal on to what it runs.

What Slurm's sources and manual say and the script heeds: `srun` passes USR1 on to its tasks, but
kills them on TERM; `--wait` seconds after the first task's end it kills the others, and its exit
code is the highest of all; with proctrack/cgroup only the tasks hear a signal, with the other kinds
every process; since 22.05 it does not inherit --cpus-per-task.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from conf.clusters import ClusterConfig
from conf.errors import EXIT_DONE, ClusterError
from launch.cli import TYPED
from launch.elsewhere.shared import arguments_there, check_tool, output_of
from launch.elsewhere.submission import NOTES
from launch.preflight import Checked

READY_SECONDS = 300  # until all nodes have joined
STRAGGLER_SECONDS = 30  # for the other nodes, once the first has ended
FIRST_PORT, PORTS = 20000, 20000  # a port of the job's own, by its number


@dataclass(kw_only=True, slots=True, frozen=True)
class Job:
    """What a script is rendered from: paths are absolute, on a file system that all nodes see."""

    name: str
    code: Path  # where launch.py lies
    notes: Path  # scripts, logs and tokens of submitted runs
    python: str
    arguments: tuple[str, ...]  # of launch.py
    typed: str  # what the user typed here, for the run's records
    cluster: ClusterConfig

    @property
    def script(self) -> Path:
        """Where the script is written."""
        return self.notes / f"{self.name}.sh"


def job_of(checked: Checked, *, here: Path) -> Job:
    """The job that runs what was typed, from the directory it was typed in."""
    config = checked.config
    root = (here / config.run.root).absolute()
    python = config.cluster.python
    return Job(
        name=checked.name,
        code=here.absolute(),
        notes=root / NOTES,
        python=sys.executable if python == "python" else python,
        arguments=arguments_there(checked, root=str(root)),
        typed=checked.command,
        cluster=config.cluster,
    )


def render(job: Job) -> str:
    """The script (pure). Every value is quoted, or checked to be a plain name."""
    return "\n".join(
        ["#!/bin/bash", *_directives(job), *_shared(job), *_on_a_node(job), *_batch(job)]
    )


def _directives(job: Job) -> list[str]:
    slurm, cluster = job.cluster.slurm, job.cluster
    count = cluster.devices_per_node
    is_cpu = cluster.device.name == "cpu"
    cpus = slurm.cpus or (count if is_cpu else None)
    asked = {
        "job-name": job.name,
        "nodes": cluster.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": None if is_cpu else count,
        "cpus-per-task": cpus,
        "mem": slurm.memory,
        "time": slurm.time,
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "signal": f"B:USR1@{slurm.save_seconds}",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in asked.items() if value is not None]
    return [*lines, "#SBATCH --requeue"]


def _shared(job: Job) -> list[str]:
    """What the batch job and the nodes do alike."""
    token = f'{shlex.quote(str(job.notes / job.name))}-"$SLURM_JOB_ID".token'
    modules = [f"module load {shlex.quote(name)}" for name in job.cluster.slurm.modules]
    return [
        "set -u",
        "umask 077",
        f"cd {shlex.quote(str(job.code))} || exit 1",
        *modules,
        *job.cluster.slurm.setup,
        f"python={shlex.quote(job.python)}",
        f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}",
        # Ray would wait 30 s for a head that is gone, and srun kill it meanwhile.
        "export RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0",
        f"export {TYPED}={shlex.quote(job.typed)}",
        f"port=$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))",
        "",
    ]


def _on_a_node(job: Job) -> list[str]:
    """The part of a node: Ray in its own directory, and on the first node the run."""
    ray = 'start -m ray.scripts.scripts start --temp-dir="$scratch" --block'
    drive = shlex.join(["launch.py", *job.arguments])
    is_cpu = job.cluster.device.name == "cpu"
    counts = f"--num-cpus={job.cluster.devices_per_node}" if is_cpu else ""
    return f"""\
# --- on each node ---
if [ "${{1:-}}" = node ]; then
  head=$(getent ahostsv4 "$CROSSOVER_HEAD" | awk 'NR == 1 {{ print $1 }}')
  [ -n "$head" ] || {{ echo "No address of the first node: $CROSSOVER_HEAD"; exit 1; }}
  scratch=$(mktemp -d /tmp/crossover-XXXXXX)
  trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$scratch"' EXIT
  start() {{ (trap '' USR1; exec "$python" "$@") & }}  # USR1 is for this shell alone
  if [ "$SLURM_NODEID" != 0 ]; then
    trap : USR1 TERM  # the driver may need this node to save its state
    answers() {{
      for pause in 0 1 1; do
        sleep "$pause"
        (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null && return
      done
      return 1
    }}
    until answers || [ "$SECONDS" -ge {READY_SECONDS} ]; do :; done
    while answers; do  # a Ray that dies alone starts again: an early end would end all nodes
      {ray} --address="$head:$port" {counts}
      joined=$!
      while kill -0 "$joined" 2>/dev/null && answers; do sleep 1; done
      kill "$joined" 2>/dev/null
      wait "$joined"
    done
    exit 0
  fi
  trap 'exit 143' USR1 TERM
  {ray} --head --node-ip-address="$head" --port="$port" --include-dashboard=false {counts}
  export RAY_ADDRESS="$head:$port"  # a shared node may have other Rays
  start -m launch.wait_for_nodes {job.cluster.nodes} {READY_SECONDS}
  wait "$!" || exit 1
  start {drive}
  driver=$!
  trap 'kill -TERM "$driver"' USR1 TERM
  while :; do
    wait "$driver" && code=0 || code=$?
    kill -0 "$driver" 2>/dev/null || break
  done
  exit "$code"
fi
""".split("\n")


def _batch(job: Job) -> list[str]:
    """The part of the batch job; its end is the run's, or a place in the queue."""
    cpus = '${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}'
    node = f"bash {shlex.quote(str(job.script))} node"
    return f"""\
# --- the batch job, on the first node ---
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
"$python" -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH" || exit 1
export CROSSOVER_HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
is_ending=
srun --kill-on-bad-exit=1 --wait={STRAGGLER_SECONDS} {cpus} {node} &
step=$!
trap 'is_ending=1; kill -USR1 "$step"' USR1
trap : TERM  # cancelled: the nodes hear it too, and save; the job lasts until they have
while :; do
  wait "$step" && code=0 || code=$?
  kill -0 "$step" 2>/dev/null || break
done
if [ -n "$is_ending" ] && [ "$code" != 0 ]; then
  echo "The time is over: the run has saved its state and goes on from there."
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
""".split("\n")


def submit(checked: Checked, *, here: Path) -> int:
    """Write the script, and queue it unless it is queued or running already.

    Raises:
        ClusterError: `sbatch` is not here, or it refuses.
    """
    job = job_of(checked, here=here)
    job.notes.mkdir(parents=True, exist_ok=True)
    job.script.write_text(render(job), encoding="utf-8")
    job.script.chmod(0o700)
    log = job.notes / f"{job.name}-%j.log"
    command = ["sbatch", "--parsable", f"--output={log}", str(job.script)]
    if not checked.config.cluster.submit:
        print(f"Written: {job.script}\nQueue it with: {shlex.join(command)}")
        return EXIT_DONE
    check_tool("sbatch", cluster="slurm", where="a login node of the cluster")
    note = job.notes / f"{job.name}.slurm.json"
    number = _queued(note)
    if number is None:
        said = output_of(command, cluster="slurm", remedy="change cluster.slurm.* as it says")
        number = said.partition(";")[0].strip()
        note.write_text(json.dumps({"job": number}) + "\n", encoding="utf-8")
        print(f"Queued as job {number}.")
    else:
        print(f"Job {number} does this already.")
    print(f"Log: {str(log).replace('%j', number)}\nStop it: scancel {number}")
    return EXIT_DONE


def _queued(note: Path) -> str | None:
    """The number of the job that was queued for this run, if it waits or runs still.

    Raises:
        ClusterError: Slurm does not say; a second job would drive the run twice.
    """
    if not note.is_file() or shutil.which("squeue") is None:
        return None
    number = str(json.loads(note.read_text(encoding="utf-8"))["job"])
    asked = ["squeue", "--noheader", f"--jobs={number}", "--format=%T"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    if found.returncode != 0 and "Invalid job id" not in found.stderr:  # what an old number gets
        raise ClusterError(
            "cluster=slurm",
            found=f"squeue does not say whether job {number} goes on: {found.stderr.strip()[:300]}",
            expected="an answer: a second job would drive the run twice",
            remedy="try again later",
        )
    return number if found.stdout.strip() else None
