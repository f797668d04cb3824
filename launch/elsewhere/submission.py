"""A run on a cluster elsewhere: submitted once, followed, stopped, fetched (Ray's Jobs API).

The driver is a job of the cluster, so that it outlives this terminal. Its name is the run's name
and the number of the attempt: a submission that is repeated while the run goes on attaches to it,
and one after its end is the next attempt, which runs what is missing.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.errors import EXIT_ARM_FAILED, EXIT_DONE, EXIT_INTERRUPTED, ClusterError
from launch.cli import TYPED
from launch.elsewhere.archive import contents_of, write_archive
from launch.elsewhere.ray_cluster import HERE, unreachable
from launch.overrides import key_of
from launch.preflight import Checked

NOTES = ".submitted"  # below run.root: where each run was submitted to
STOP_SECONDS = 60  # a training saves its state first; Ray's own 3 s would cut it
POLL_SECONDS = 1.0
METADATA_RUN = "crossover_run"


@dataclass(kw_only=True, slots=True, frozen=True)
class Submission:
    """Where a run was submitted to. storage: the directory of runs there."""

    run: str
    id: str
    address: str
    storage: str

    def save(self, root: Path) -> None:
        """Note it, for attach, stop and fetch."""
        path = root / NOTES / f"{self.run}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def submitted(run: Path) -> Submission:
    """The submission of a run, named as its local directory would be.

    Raises:
        ClusterError: this machine has not submitted it.
    """
    path = run.parent / NOTES / f"{run.name}.json"
    if not path.is_file():
        raise ClusterError(
            str(run),
            found="a run that was not submitted from here",
            expected="one that was: python launch.py ... cluster=ray cluster.address=http://HEAD:8265",
            remedy="type that command again: where the run goes on, it attaches to it",
        )
    return Submission(**json.loads(path.read_text(encoding="utf-8")))


def submit(checked: Checked, *, here: Path) -> int:
    """Submit a run, or attach to it where it goes on already, and follow it to its end.

    Args:
        checked: the run, found possible here for the devices there.
        here: the directory that relative paths are relative to.
    """
    cluster = checked.config.cluster
    assert cluster.address is not None and cluster.storage is not None
    client = client_of(cluster.address)
    last, is_over = last_attempt(client, checked.name)
    if last and not is_over:
        print(f"{checked.name} goes on there already: attaching.")
        number = last
    else:
        number = last + 1
    found = Submission(
        run=checked.name,
        id=f"{checked.name}-{number}",
        address=cluster.address,
        storage=cluster.storage,
    )
    found.save(checked.root)
    if number != last:
        _send(client, found, checked, here=here)
    return follow(found)


def _send(client: Any, to: Submission, checked: Checked, *, here: Path) -> None:
    contents = contents_of(checked.config, here=here)
    moved = {key_of(o) for o in contents.overrides} | {"cluster.address", "run.root", "run.name"}
    kept = [a for a in shlex.split(checked.command)[2:] if key_of(a) not in moved]
    overrides = [
        *(*kept, *contents.overrides),
        *(f"cluster.address={HERE}", f"run.root={to.storage}", f"run.name={to.run}"),
    ]
    entrypoint = shlex.join([checked.config.cluster.python, "launch.py", *overrides])
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "crossover.zip"
        write_archive(contents, archive)
        print(f"Sending {len(contents.files)} files, {archive.stat().st_size / 2**20:.1f} MB")
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=to.id,
                runtime_env={
                    "working_dir": str(archive),
                    "env_vars": {
                        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
                        TYPED: checked.command,
                    },
                },
                metadata={METADATA_RUN: to.run},
            )
        except RuntimeError as error:
            if "already" not in str(error):  # another client was faster: there is one run
                raise
    print(f"Submitted as {to.id} to {to.address}")


def client_of(address: str) -> Any:
    """Ray's client for jobs; the token comes from the environment or Ray's own file.

    Raises:
        ClusterError: nothing there answers.
    """
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
    from conf.clusters import ClusterConfig

    try:
        return JobSubmissionClient(address)
    except Exception as error:  # noqa: BLE001 - ConnectionError, RuntimeError, by Ray's version
        raise unreachable(ClusterConfig(name="ray", address=address), error) from None


def last_attempt(client: Any, run: str) -> tuple[int, bool]:
    """Number of the newest attempt at a run, 0 for none, and whether it is over."""
    attempts = {
        int(job.submission_id.rsplit("-", 1)[1]): job.status.is_terminal()
        for job in client.list_jobs()
        if (job.metadata or {}).get(METADATA_RUN) == run and job.submission_id
    }
    return (max(attempts), attempts[max(attempts)]) if attempts else (0, True)


def follow(to: Submission) -> int:
    """Print what the driver prints until it ends; Ctrl-C detaches. Returns its exit code."""
    client = client_of(to.address)
    try:
        _print_until_over(client, to.id)
    except KeyboardInterrupt:
        print(
            f"\nDetached; the run goes on. To see it again:"
            f"  python -m launch.attach outputs/{to.run}"
            f"\nTo end it:  python -m launch.stop outputs/{to.run}"
            f"\nTo get its files:  python -m launch.fetch outputs/{to.run}"
        )
        return EXIT_INTERRUPTED
    return _exit_code(client, to)


def _print_until_over(client: Any, job: str) -> None:
    """The logs are asked for again and again: a broken stream would end what goes on."""
    shown, is_over = 0, False
    while True:
        text = client.get_job_logs(job) if shown or is_over or _has_started(client, job) else ""
        print(text[shown:], end="", flush=True)
        shown = len(text)
        if is_over:
            return
        is_over = client.get_job_status(job).is_terminal()
        if not is_over:
            time.sleep(POLL_SECONDS)


def _has_started(client: Any, job: str) -> bool:
    return str(client.get_job_status(job)) != "PENDING"


def _exit_code(client: Any, to: Submission) -> int:
    info = client.get_job_info(to.id)
    code = getattr(info, "driver_exit_code", None)
    status = str(info.status)
    if code is None or status == "STOPPED":
        code = {"SUCCEEDED": EXIT_DONE, "STOPPED": EXIT_INTERRUPTED}.get(status, EXIT_ARM_FAILED)
    if code not in (EXIT_DONE, EXIT_ARM_FAILED) and info.message:
        print(info.message.strip().splitlines()[0])
    print(f"{to.run}: {status.lower()}. Its files: python -m launch.fetch outputs/{to.run}")
    return int(code)


def stop(to: Submission) -> int:
    """Ask the driver to end; a training saves its state first."""
    client = client_of(to.address)
    if client.get_job_status(to.id).is_terminal():
        print(f"{to.run} is over already.")
        return EXIT_DONE
    client.stop_job(to.id)
    deadline = time.monotonic() + 2 * STOP_SECONDS
    while not client.get_job_status(to.id).is_terminal():
        if time.monotonic() > deadline:
            raise ClusterError(
                to.id,
                found=f"still running after {2 * STOP_SECONDS} s",
                expected="a driver that ends when it is asked to",
                remedy="look at its node; type the same command again",
            )
        time.sleep(POLL_SECONDS)
    print(f"{to.run} is stopped. The command that submitted it goes on from there.")
    return EXIT_DONE


def fetch(to: Submission, local: Path) -> int:
    """Copy the run's directory here, from storage that this machine sees.

    Raises:
        ClusterError: it does not see it, or the run has left nothing yet.
    """
    there = Path(to.storage) / to.run
    if not there.is_dir():
        raise ClusterError(
            str(there),
            found="nothing that this machine sees",
            expected="the run's directory, on storage that it shares with the cluster",
            remedy=f"copy it by hand: scp -r NODE:{there} {local}",
        )
    if there.resolve() != local.resolve():
        shutil.copytree(there, local, dirs_exist_ok=True)
    print(f"{local}: " + ("report.html" if (local / "report.html").is_file() else "no report yet"))
    return EXIT_DONE
