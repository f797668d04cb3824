"""What `cluster=slurm` and `cluster=kuberay` share: what is typed there, the tool that takes it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence

from conf.errors import ClusterError
from launch.elsewhere.ray_cluster import HERE
from launch.overrides import key_of
from launch.preflight import Checked

# Said to this machine, or said anew for the driver there.
MOVED = ("cluster", "cluster.submit", "cluster.python", "cluster.address", "run.root", "run.name")


def arguments_there(checked: Checked, *, root: str) -> tuple[str, ...]:
    """Arguments of launch.py for the driver on a node: what was typed, joined to the Ray there.

    Args:
        checked: the run.
        root: where its directory lies for the nodes.
    """
    own = f"cluster.{checked.config.cluster.name}."  # of the script or manifest only
    typed = shlex.split(checked.command)[2:]
    kept = [a for a in typed if key_of(a) not in MOVED and not key_of(a).startswith(own)]
    there = ("cluster=ray", f"cluster.address={HERE}", f"run.root={root}")
    return (*kept, *there, f"run.name={checked.name}")


def check_tool(name: str, *, cluster: str, where: str) -> None:
    """Refuse to hand a file over without the tool that takes it.

    Args:
        name: of the tool.
        cluster: the value of `cluster=`.
        where: a machine that has the tool, for the message.

    Raises:
        ClusterError: it is not on PATH.
    """
    if shutil.which(name) is None:
        raise ClusterError(
            f"cluster={cluster}",
            found=f"no {name} on this machine",
            expected=where,
            remedy="add cluster.submit=false to write the file only",
        )


def output_of(command: Sequence[str], *, cluster: str, remedy: str) -> str:
    """What the tool prints.

    Raises:
        ClusterError: it fails; with what it says.
    """
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise ClusterError(
            f"cluster={cluster}",
            found=f"{command[0]} refused: {found.stderr.strip()[:300]}",
            expected="a job that the cluster takes",
            remedy=remedy,
        )
    return found.stdout
