"""Programs that stand for Slurm's, for Ray and for a driver in the tests of cluster=slurm.

They really start processes. The fake `srun` is as strict as the real one's sources: TERM kills the
tasks, and so does the end of the first one after `--wait` seconds; its code is the highest.
"""

from __future__ import annotations

import sys

SRUN = (
    f"#!{sys.executable}"
    """
import os, signal, subprocess, sys, time

options, command = {}, sys.argv[1:]
while command[0].startswith("--"):
    key, _, value = command.pop(0).partition("=")
    options[key] = value
with open(os.environ["FAKE_LOG"] + ".srun", "w") as file:
    print(sorted(options), file=file)
tasks = [
    subprocess.Popen(
        command, env={**os.environ, "SLURM_NODEID": str(n)}, start_new_session=True
    )
    for n in range(int(os.environ["SLURM_NNODES"]))
]
with open(os.environ["FAKE_LOG"] + ".tasks", "w") as file:
    print(*(task.pid for task in tasks), file=file)


def send(number):  # to every process of each task: proctrack/cgroup alone spares all but the first
    for task in tasks:
        try:
            os.killpg(task.pid, number)
        except ProcessLookupError:
            pass


signal.signal(signal.SIGUSR1, lambda *_: send(signal.SIGUSR1))
signal.signal(signal.SIGTERM, lambda *_: send(signal.SIGKILL))
first = None
while True:
    codes = [code for task in tasks if (code := task.poll()) is not None]
    if len(codes) == len(tasks):
        break
    first = first or (codes and time.monotonic())
    if first and (any(codes) or time.monotonic() - first > float(options["--wait"])):
        send(signal.SIGKILL)
    time.sleep(0.05)
send(signal.SIGKILL)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
)
SCONTROL = """\
#!/bin/bash
if [ "$1" = show ]; then echo "$SLURM_HEAD"; else echo "$@" >> "$FAKE_LOG"; fi
"""
SBATCH = """\
#!/bin/bash
for last; do :; done
(setsid bash "$last"; echo "$?" > "$FAKE_LOG.code") > "$FAKE_LOG.out" 2>&1 &
echo $!
"""
# Answers for Ray, for the wait and for the driver. The Ray of the second node dies at once, once.
PYTHON = """\
#!/bin/bash
case "$*" in
*--head*)
  for word; do [[ "$word" == --port=* ]] && port="${word#*=}"; done
  exec REAL -c "import socket, time
listener = socket.create_server(('127.0.0.1', $port), backlog=1000)
while True:
    listener.accept()[0].close()";;
*--address=*)
  echo joined >> "$0.joined"
  [ -e "$0.dies" ] && rm "$0.dies" && exit 1
  exec sleep 60;;
*wait_for_nodes*) until [ -e "$0.joined" ] || [ "$SLURM_NNODES" = 1 ]; do sleep 0.05; done;;
*secrets*) rm -f "$0.joined"; exec REAL "$@";;  # the first thing of a job
*) exec REAL "$@";;
esac
"""
DRIVER = """\
import os, pathlib, signal, sys, time
joined = pathlib.Path(os.environ["JOINED"])
state = pathlib.Path(sys.argv[0] + ".state")
if state.exists():
    print("went on from", state.read_text(), flush=True)
    sys.exit(0)
def save(*_):
    time.sleep(0.5)
    state.write_text("step 7")
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[0] + ".started").touch()
for _ in range(300):
    if joined.exists() and len(joined.read_text().split()) == 2:
        sys.exit(0)  # the second node came back
    time.sleep(0.1)
sys.exit(3)
"""
