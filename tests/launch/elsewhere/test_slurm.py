"""The script of cluster=slurm: what it asks for, what cannot escape from it, and that it runs.

The fake `sbatch`, `srun` and `scontrol` on PATH really start the processes, and the fake `srun` is
as strict as the real one; both nodes are this machine, so what differs between two machines
(addresses, file systems) is not tested here.
"""

from __future__ import annotations

import dataclasses
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
from conf.clusters import ClusterConfig, SlurmConfig, slurm_seconds
from conf.errors import ClusterError, ConfigError
from launch.elsewhere.slurm import Job, _queued, render
from tests.launch.elsewhere.fake_slurm import DRIVER, PYTHON, SBATCH, SCONTROL, SRUN
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[3]


def job(tmp_path: Path, *, python: str = sys.executable, **changes: object) -> Job:
    options: dict[str, object] = {"nodes": 2, "devices_per_node": 1, "device": Device.cpu}
    setup = changes.pop("setup", [])
    slurm = SlurmConfig(account="lab", partition="gpu", time="1-12:00:00", setup=setup)
    slurm = dataclasses.replace(slurm, **changes.pop("slurm", {}))
    cluster = ClusterConfig(name="slurm", slurm=slurm, **{**options, **changes})
    return Job(
        name="try",
        code=ROOT,
        notes=tmp_path,
        python=python,
        arguments=("+exp=smoke", "cluster=ray", "cluster.address=auto"),
        typed="python launch.py +exp=smoke cluster=slurm",
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


def test_cores_and_memory_are_asked_for_and_passed_on(tmp_path: Path) -> None:
    """Where nobody asks, an accelerator's node may be left with one core."""
    slurm = {"cpus": 24, "memory": "200G"}
    text = render(job(tmp_path, device=Device.h100, devices_per_node=8, slurm=slurm))
    assert "#SBATCH --cpus-per-task=24\n" in text and "#SBATCH --mem=200G\n" in text
    text = render(job(tmp_path, devices_per_node=8))
    assert "#SBATCH --cpus-per-task=8\n" in text and "--mem" not in text


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
    arguments = ("+exp=lora", f"task.instruction={argument}")
    made = dataclasses.replace(
        job(Path("/shared"), python=python), arguments=arguments, typed=argument
    )
    text = render(made)
    words = shlex.split(text[text.index("start launch.py") :].partition("\n  driver=")[0])
    assert words == ["start", "launch.py", *arguments]
    assigned = text[text.index("\npython=") :].partition("\nexport RAY_AUTH_MODE")[0]
    assert shlex.split(assigned) == [f"python={python}"]
    typed = text[text.index("export CROSSOVER_TYPED=") :].partition("\nport=$((")[0]
    assert shlex.split(typed) == ["export", f"CROSSOVER_TYPED={argument}"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("account", "lab; rm -rf ~"),
        ("partition", "gpu\n#SBATCH --uid=0"),
        ("qos", "$(id)"),
        ("time", "soon"),
        ("time", "1:00\n#SBATCH --uid=0"),
        ("time", "10"),  # save_seconds come first: it would requeue for ever
        ("memory", "64G\n#SBATCH --uid=0"),
        ("cpus", 0),
        ("modules", ["cuda && id"]),
        ("setup", ["true\n#SBATCH --uid=0"]),
        ("save_seconds", 0),
    ],
)
def test_a_name_that_is_none_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"cluster.slurm.{key}"):
        SlurmConfig(**{key: value})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("0", 0), ("90", 5400), ("90:30", 5430), ("04:00:00", 14400)),
        *(("2-12", 216000), ("2-12:30", 217800), ("1-00:00:01", 86401)),
    ],
)
def test_a_time_as_slurm_reads_it(text: str, seconds: int) -> None:
    assert slurm_seconds(text) == seconds  # the forms of sbatch's manual


@pytest.fixture
def sleeping(tmp_path: Path, fakes: dict[str, str]) -> Job:
    """A job whose Ray and driver only wait; its script is written."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "launch.py").write_text(DRIVER)
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("REAL", sys.executable))
    python.chmod(0o755)
    fakes["JOINED"] = f"{python}.joined"
    made = dataclasses.replace(job(tmp_path, python=str(python)), code=code, arguments=())
    made.script.write_text(render(made))
    return made


def started(made: Job, env: dict[str, str]) -> subprocess.Popen[str]:
    """The batch job, once its driver runs."""
    batch = subprocess.Popen(["bash", str(made.script)], env=env, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + HANG_SECONDS
    while not (made.code / "launch.py.started").exists():
        assert time.monotonic() < deadline and batch.poll() is None
        time.sleep(0.05)
    return batch


def test_before_the_limit_it_saves_and_queues_itself_again(
    sleeping: Job, fakes: dict[str, str]
) -> None:
    """A driver and a Ray that only wait: signal, saved state, requeue, and then the end."""
    first = started(sleeping, fakes)
    first.send_signal(signal.SIGUSR1)
    said = first.communicate(timeout=HANG_SECONDS)[0]
    assert "goes on from there" in said
    assert Path(fakes["FAKE_LOG"]).read_text() == f"requeue {fakes['SLURM_JOB_ID']}\n"
    assert not list(sleeping.notes.glob("*.token"))
    alone = {**fakes, "SLURM_NNODES": "1"}
    again = subprocess.run(
        ["bash", str(sleeping.script)],
        env=alone,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert (again.returncode, again.stdout) == (0, "went on from step 7\n")
    assert Path(fakes["FAKE_LOG"]).read_text().count("requeue") == 1


def test_cancelled_it_saves_and_is_over(sleeping: Job, fakes: dict[str, str]) -> None:
    """`scancel` sends TERM to the batch job and to each task."""
    batch = started(sleeping, fakes)
    (token,) = sleeping.notes.glob("*.token")
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text().strip()) == 64
    batch.terminate()
    for task in Path(fakes["FAKE_LOG"] + ".tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    batch.communicate(timeout=HANG_SECONDS)
    assert batch.returncode != 0
    assert (sleeping.code / "launch.py.state").read_text() == "step 7"
    assert not Path(fakes["FAKE_LOG"]).exists()  # not queued again
    assert not token.exists()


def test_a_ray_that_dies_on_a_node_starts_again(
    sleeping: Job, tmp_path: Path, fakes: dict[str, str]
) -> None:
    """The node's task outlives its Ray, else srun would end the run; its own end is in time."""
    (tmp_path / "python.dies").touch()
    env = {**fakes, "SLURM_CPUS_PER_TASK": "1"}
    done = subprocess.run(
        ["bash", str(sleeping.script)], env=env, timeout=HANG_SECONDS, check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "python.joined").read_text() == "joined\n" * 2
    asked = Path(fakes["FAKE_LOG"] + ".srun").read_text()
    assert asked.strip() == "['--cpus-per-task', '--kill-on-bad-exit', '--wait']"


@pytest.mark.parametrize(
    ("says", "found"),
    [
        ("echo RUNNING", "7"),
        ("exit 0", None),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", None),
    ],
)
def test_a_job_that_goes_on_is_not_queued_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, found: str | None
) -> None:
    assert queued_says(tmp_path, monkeypatch, says) == found


def test_a_slurm_that_does_not_answer_queues_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match="job 7"):
        queued_says(tmp_path, monkeypatch, "echo 'Unable to contact slurm controller' >&2; exit 1")


def queued_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> str | None:
    (tmp_path / "squeue").write_text(f"#!/bin/bash\n{says}\n")
    (tmp_path / "squeue").chmod(0o755)
    (tmp_path / "note.json").write_text('{"job": "7"}')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return _queued(tmp_path / "note.json")


def launched(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch.py", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
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
    (driver,) = (line for line in text.splitlines() if "start launch.py" in line)
    assert f"run.root={tmp_path}" in driver and "cluster=slurm" not in driver
    assert "cluster=slurm" in text[text.index("export CROSSOVER_TYPED") :]  # to type it again


@pytest.mark.slow
@pytest.mark.all_cores
def test_the_script_runs_a_run_to_its_report_on_two_nodes(
    tmp_path: Path, fakes: dict[str, str]
) -> None:
    overrides = (*CPU, "cluster.nodes=2", "tracking=none", f"run.root={tmp_path / 'runs'}")
    done = launched("+exp=smoke", *overrides, env=fakes)
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + HANG_SECONDS
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
    assert Path(fakes["FAKE_LOG"] + ".code").read_text() == "0\n"
