"""The script of cluster=slurm: what it asks for, what cannot escape from it, and that it runs.

The fake `sbatch`, `srun` and `scontrol` on PATH really start the processes; both nodes are this
machine, so what differs between two machines (addresses, file systems) is not tested here.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.choices import Device
from conf.clusters import ClusterConfig, SlurmConfig
from conf.errors import ConfigError
from launch.slurm import Job, render

ROOT = Path(__file__).resolve().parents[2]
SRUN = """\
#!/bin/bash
# Starts a task per node, passes USR1 and TERM on, and ends with the first node's code.
while [[ "$1" == --* ]]; do shift; done
for ((n = 0; n < SLURM_NNODES; n++)); do
  SLURM_NODEID=$n "$@" & tasks[n]=$!
done
trap 'kill -USR1 "${tasks[@]}" 2>/dev/null' USR1
trap 'kill -TERM "${tasks[@]}" 2>/dev/null' TERM
while :; do
  wait "${tasks[0]}" && code=0 || code=$?
  kill -0 "${tasks[0]}" 2>/dev/null || break
done
for ((n = 1; n < SLURM_NNODES; n++)); do
  pkill -TERM -P "${tasks[n]}"
  kill "${tasks[n]}" 2>/dev/null
done
wait
exit "$code"
"""
SCONTROL = """\
#!/bin/bash
if [ "$1" = show ]; then echo "$SLURM_HEAD"; else echo "$@" >> "$FAKE_LOG"; fi
"""
SBATCH = """\
#!/bin/bash
for last; do :; done
setsid bash "$last" > "$FAKE_LOG.out" 2>&1 &
echo $!
"""


def job(tmp_path: Path, *, python: str = sys.executable, **changes: object) -> Job:
    options: dict[str, object] = {"nodes": 2, "devices_per_node": 1, "device": Device.cpu}
    setup = changes.pop("setup", [])
    slurm = SlurmConfig(account="lab", partition="gpu", time="1-12:00:00", setup=setup)
    cluster = ClusterConfig(name="slurm", slurm=slurm, **{**options, **changes})
    return Job(
        name="try",
        code=ROOT,
        notes=tmp_path,
        python=python,
        arguments=("+exp=smoke", "cluster=ray", "cluster.address=auto"),
        cluster=cluster,
    )


@pytest.fixture
def fakes(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH begins with the fakes."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))},
        "PATH": f"{place}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_HEAD": "127.0.0.1",
        "SLURM_NNODES": "2",
        "FAKE_LOG": str(tmp_path / "scontrol.txt"),
    }


def test_it_asks_for_what_the_run_needs(tmp_path: Path) -> None:
    lines = render(job(tmp_path, device=Device.h100, devices_per_node=8)).splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert asked == {
        *("--job-name=try", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8"),
        *("--time=1-12:00:00", "--account=lab", "--partition=gpu"),
        *("--signal=B:USR1@120", "--open-mode=append", "--requeue"),
    }
    assert lines[0] == "#!/bin/bash"
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first:])  # Slurm reads no further


def test_the_script_is_shell(tmp_path: Path) -> None:
    path = tmp_path / "s.sh"
    path.write_text(render(job(tmp_path)))
    subprocess.run(["bash", "-n", str(path)], check=True)


@given(
    argument=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30),
    python=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30),
)
def test_no_value_escapes(argument: str, python: str) -> None:
    """What bash makes of the line that starts the driver is what was given, whatever it holds."""
    given_job = job(Path("/shared"), python=python)
    arguments = ("+exp=lora", f"task.instruction={argument}")
    made = Job(
        name=given_job.name,
        code=given_job.code,
        notes=given_job.notes,
        python=python,
        arguments=arguments,
        cluster=given_job.cluster,
    )
    text = render(made)
    words = shlex.split(text[text.index('"$python" launch.py') :].partition(" &\n  driver=")[0])
    assert words == ["$python", "launch.py", *arguments]
    assigned = text[text.index("\npython=") :].partition("\nexport RAY_AUTH_MODE")[0]
    assert shlex.split(assigned) == [f"python={python}"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("account", "lab; rm -rf ~"),
        ("partition", "gpu\n#SBATCH --uid=0"),
        ("qos", "$(id)"),
        ("time", "soon"),
        ("time", "1:00\n#SBATCH --uid=0"),
        ("modules", ["cuda && id"]),
        ("setup", ["true\n#SBATCH --uid=0"]),
        ("save_seconds", 0),
    ],
)
def test_a_name_that_is_none_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"cluster.slurm.{key}"):
        SlurmConfig(**{key: value})


DRIVER = """\
import pathlib, signal, sys, time
state = pathlib.Path(sys.argv[0] + ".state")
if state.exists():
    print("went on from", state.read_text(), flush=True)
    sys.exit(0)
def save(*_):
    state.write_text("step 7")
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[0] + ".started").touch()
time.sleep(60)
"""


def test_before_the_limit_it_saves_and_queues_itself_again(
    tmp_path: Path, fakes: dict[str, str]
) -> None:
    """A driver and a Ray that only sleep: signal, saved state, requeue, and then the end."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "launch.py").write_text(DRIVER)
    python = tmp_path / "python"  # answers for Ray and for the wait, and runs the driver
    python.write_text(
        "#!/bin/bash\n"
        f'case "$*" in *ray.scripts*) exec sleep 60;; *wait_for_nodes*) exit 0;; '
        f'*) exec {sys.executable} "$@";; esac\n'
    )
    python.chmod(0o755)
    made = job(tmp_path, python=str(python))
    made = Job(
        name="try",
        code=code,
        notes=tmp_path,
        python=str(python),
        arguments=(),
        cluster=made.cluster,
    )
    made.script.write_text(render(made))
    fakes = {**fakes, "SLURM_NNODES": "1"}
    first = subprocess.Popen(
        ["bash", str(made.script)], env=fakes, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while not (code / "launch.py.started").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    said = first.communicate(timeout=30)[0]
    assert "goes on from there" in said
    assert Path(fakes["FAKE_LOG"]).read_text() == f"requeue {fakes['SLURM_JOB_ID']}\n"
    assert not (tmp_path / "try.token").exists()
    again = subprocess.run(
        ["bash", str(made.script)], env=fakes, capture_output=True, text=True, timeout=30
    )
    assert (again.returncode, again.stdout) == (0, "went on from step 7\n")
    assert Path(fakes["FAKE_LOG"]).read_text().count("requeue") == 1


def launched(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch.py", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


CPU = ("cluster=slurm", "cluster.device=cpu", "cluster.devices_per_node=1")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("cluster=slurm",), "cluster.device"),
        (("cluster=slurm", "cluster.device=h100"), "cluster.devices_per_node"),
        ((*CPU, "cluster.slurm.qos=a b"), "cluster.slurm.qos"),
        (CPU, "no sbatch"),
    ],
)
def test_refused_before_anything_is_queued(
    tmp_path: Path, arguments: tuple[str, ...], found: str
) -> None:
    env = {**os.environ, "PATH": str(tmp_path)}
    done = launched("+exp=smoke", *arguments, f"run.root={tmp_path}", env=env)
    assert done.returncode == 2 and found in done.stdout + done.stderr


def test_written_only_with_the_command_that_queues_it(tmp_path: Path) -> None:
    done = launched(
        "+exp=smoke",
        *CPU,
        *("cluster.nodes=2", "cluster.submit=false", f"run.root={tmp_path}"),
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (script,) = (tmp_path / ".submitted").glob("*.sh")
    assert script.stat().st_mode & 0o777 == 0o700
    assert f"sbatch --parsable --output={script.with_suffix('')}-%j.log {script}" in done.stdout
    text = script.read_text()
    assert f"run.root={tmp_path}" in text and "cluster=slurm" not in text


@pytest.mark.slow
@pytest.mark.all_cores
@pytest.mark.timeout(600)
def test_the_script_runs_a_run_to_its_report_on_two_nodes(
    tmp_path: Path, fakes: dict[str, str]
) -> None:
    overrides = (*CPU, "cluster.nodes=2", "tracking=none", f"run.root={tmp_path / 'runs'}")
    done = launched("+exp=smoke", *overrides, env=fakes)
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 400
    out = Path(fakes["FAKE_LOG"] + ".out")
    while not (reports := list((tmp_path / "runs").glob("*/report.html"))):
        assert time.monotonic() < deadline, out.read_text()[-3000:]
        time.sleep(1)
    number = int(done.stdout.split("job ")[1].split(".")[0])
    while Path(f"/proc/{number}").exists():
        assert time.monotonic() < deadline, "the job does not end"
        time.sleep(1)
    (report,) = reports
    results = json.loads((report.parent / "results.json").read_text(encoding="utf-8"))
    assert results["provenance"]["hardware"]["name"] == "2 nodes of 1 cores"
