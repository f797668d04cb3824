"""Where a run runs: this machine, a Ray cluster, a Slurm job or a RayJob on Kubernetes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.choices import Device, require

NAME = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9_.,:@/+-]*"
)  # nothing that a shell or Slurm would take apart
DNS_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
TOLERATION = re.compile(
    r"(?P<key>[A-Za-z0-9_./-]+)(=(?P<value>[A-Za-z0-9_.-]*))?:(?P<effect>NoSchedule|"
    r"PreferNoSchedule|NoExecute)"
)
SLURM_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}", re.ASCII)
START_SECONDS = 600  # until nodes have joined and a run has something to save
QUANTITY = re.compile(r"\d+[KMGT]?", re.ASCII)


def slurm_seconds(text: str) -> int:
    """Seconds of a time as Slurm writes it: minutes[:seconds], h:m:s or days-h[:m[:s]]; 0: none."""
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not days and len(parts) < 3:
        parts.insert(0, 0)  # no hours
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """What `sbatch` is asked for. setup: lines of shell that each node runs first, as they are."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: str = "04:00:00"  # then the job saves its state and queues itself again
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    save_seconds: int = 120  # before the limit, for saving the state
    cpus: int | None = None  # cores of each node; null: on CPU the devices, else the site's default
    memory: str | None = None  # of each node, e.g. 64G; null: the site's default

    def __post_init__(self) -> None:
        """Names that are names, a time as Slurm writes it, lines that are lines."""
        for key in ("account", "partition", "qos"):
            value = getattr(self, key)
            is_name = value is None or NAME.fullmatch(value) is not None
            require(is_name, f"cluster.slurm.{key}", value, "a name, or null")
        is_time = SLURM_TIME.fullmatch(self.time) is not None
        require(
            is_time, "cluster.slurm.time", self.time, "minutes, hours:minutes:seconds or days-hours"
        )
        for module in self.modules:
            is_name = NAME.fullmatch(module) is not None
            require(is_name, "cluster.slurm.modules", module, "names of modules")
        for line in self.setup:
            require("\n" not in line, "cluster.slurm.setup", line, "one line of shell each")
        is_enough = 30 <= self.save_seconds <= 65535
        require(is_enough, "cluster.slurm.save_seconds", self.save_seconds, "30 to 65535")
        limit = slurm_seconds(self.time)  # a shorter job would requeue for ever and get nowhere
        is_enough = limit == 0 or limit >= self.save_seconds + START_SECONDS
        least = f"save_seconds and {START_SECONDS // 60} minutes, or more"
        require(is_enough, "cluster.slurm.time", self.time, least)
        require(
            self.cpus is None or self.cpus > 0, "cluster.slurm.cpus", self.cpus, "a count or null"
        )
        is_size = self.memory is None or QUANTITY.fullmatch(self.memory) is not None
        require(is_size, "cluster.slurm.memory", self.memory, "a quantity, e.g. 64G, or null")


@dataclass(kw_only=True, slots=True)
class KubeRayConfig:
    """What a RayJob is made of. Secrets are named, never given: their pods read them."""

    image: str | None = None  # with our code and its packages: see the Dockerfile
    code: str = "/app"  # where launch.py lies, in the image or on the volume
    volume_claim: str | None = None  # mounted at cluster.storage in every pod
    namespace: str = "default"
    service_account: str | None = None
    env_from: str | None = None  # a Secret: its keys become variables, e.g. WANDB_API_KEY
    pull_secrets: list[str] = field(default_factory=list)
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[str] = field(default_factory=list)  # key[=value]:effect
    queue: str | None = None  # of Kueue
    memory: str | None = None  # of each worker, e.g. 64Gi
    head_cpus: int = 2
    head_memory: str = "8Gi"
    user_id: int = 1000  # nobody's root
    wait_seconds: int = 3600  # for the pods; a RayJob without resources never fails by itself
    max_seconds: int = 86400  # of the whole job

    def __post_init__(self) -> None:
        """Names of Kubernetes, quantities, positive counts."""
        for key in ("volume_claim", "namespace", "service_account", "env_from", "queue"):
            value = getattr(self, key)
            is_name = value is None or DNS_NAME.fullmatch(value) is not None
            require(is_name, f"cluster.kuberay.{key}", value, "a name of a-z, 0-9, - and .")
        require(
            "." not in self.namespace, "cluster.kuberay.namespace", self.namespace, "no dot in it"
        )
        for name in self.pull_secrets:
            is_name = DNS_NAME.fullmatch(name) is not None
            require(is_name, "cluster.kuberay.pull_secrets", name, "names of a-z, 0-9, - and .")
        for key in ("image", "code"):
            value = getattr(self, key)
            is_path = value is None or re.fullmatch(r"[A-Za-z0-9_./:@-]+", value) is not None
            require(is_path, f"cluster.kuberay.{key}", value, "letters, digits and _ . / : @ -")
        for key in ("memory", "head_memory"):
            value = getattr(self, key)
            is_size = value is None or re.fullmatch(r"[0-9]+(\.[0-9]+)?[KMGT]i?", value) is not None
            require(is_size, f"cluster.kuberay.{key}", value, "a quantity, e.g. 64Gi")
        for text in self.tolerations:
            is_known = TOLERATION.fullmatch(text) is not None
            require(is_known, "cluster.kuberay.tolerations", text, "key[=value]:NoSchedule")
        for key in ("head_cpus", "user_id", "wait_seconds", "max_seconds"):
            value = getattr(self, key)
            require(value >= 1, f"cluster.kuberay.{key}", value, "1 or more")


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Where a run runs. workers null: all devices (on CPU one worker uses all cores of a node)."""

    name: str = MISSING  # local | ray | kuberay | slurm
    workers: int | None = None
    nodes: int = 1
    devices_per_node: int | None = None
    device: Device = Device.auto
    address: str | None = None  # ray: http://HEAD:8265, or auto on a node of the cluster
    storage: str | None = None  # ray: a directory that all nodes see; runs and the cache lie there
    copy_to: str | None = None  # a URL that fsspec opens: finished jobs and the run go there
    python: str = "python"  # what runs Python on the nodes
    submit: bool = True  # slurm, kuberay: hand the file over; false: write it, and say how
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kuberay: KubeRayConfig = field(default_factory=KubeRayConfig)
    # How long a worker waits for the others; then the attempt ends, and the next one resumes.
    collective_timeout_seconds: float = 300.0

    def __post_init__(self) -> None:
        """Counts are positive, and so is the timeout."""
        for key in ("workers", "nodes", "devices_per_node"):
            value = getattr(self, key)
            require(value is None or value > 0, f"cluster.{key}", value, "a positive count or null")
        require(
            self.collective_timeout_seconds >= 1,
            "cluster.collective_timeout_seconds",
            self.collective_timeout_seconds,
            "1 or more",
        )
