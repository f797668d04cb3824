"""What a plan is: jobs, and what is expected of each in tokens, operations, bytes and money."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from conf.choices import TaskKind

SEARCH_KINDS = ("search", "prompt_search")
TRAINING_KINDS = ("train", "search")
LEG = "leg"  # of a trial that trains by itself: to its next rung
STEPPING_KINDS = (*TRAINING_KINDS, LEG)  # what leaves records of optimizer steps


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainingPlan:
    """What is planned of one training.

    memory: bytes on a device by part; host_bytes: moved out of each device. zero_reason: the stage
    and why. trained_parameters: None where only building the model tells.
    """

    workers: int
    steps: int
    examples: int
    trained_parameters: int | None
    zero_stage: int
    zero_reason: str
    memory: Mapping[str, int]
    host_bytes: int = 0


@dataclass(kw_only=True, slots=True, frozen=True)
class Estimate:
    """What a job is expected to need. None: not estimated.

    is_about: tokens were counted from characters. low_seconds, high_seconds: the range of the
    assumed rate. rate: what seconds stand on. flops: operations, without what is computed again.
    """

    tokens: int | None = None
    seconds: float | None = None
    usd: float | None = None
    memory_bytes: int | None = None
    is_about: bool = False
    low_seconds: float | None = None
    high_seconds: float | None = None
    rate: str = ""
    flops: int | None = None
    training: TrainingPlan | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class ModelSource:
    """Where an arm's base model comes from: key identifies its bytes; is_ready needs no job."""

    key: str
    is_ready: bool


@dataclass(kw_only=True, slots=True, frozen=True)
class Job:
    """A unit of the plan.

    kind: model | rows | train | leg | search | prompt_search | evaluate | curve | latency |
    features | reference | general | general_base | instructions | instructions_base | probes |
    probes_base | control.

    point: curve jobs only, which of the training's intermediate checkpoints (0 is the first);
    None: the last checkpoint.
    is_exclusive: nothing else may run on the machine at the same time.
    wave: evaluate jobs only, which wave of the test items (launch/waves.py); None: all at once.
    after: jobs that must be over before it starts, in whatever way.
    trial, rung: legs only (launch/search/leg_plan.py).
    """

    id: str
    kind: str
    arm: str | None
    key: str
    depends_on: tuple[str, ...] = ()
    devices: int = 0
    is_exclusive: bool = False
    point: int | None = None
    estimate: Estimate = Estimate()
    wave: int | None = None
    after: tuple[str, ...] = ()
    trial: int | None = None
    rung: int | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class Plan:
    """All jobs of a run in an order in which they could run one after another."""

    jobs: tuple[Job, ...]

    def job(self, job_id: str) -> Job:
        """The job of this id."""
        return next(j for j in self.jobs if j.id == job_id)

    def training(self, arm: str) -> Job:
        """The job that leaves an arm's checkpoint: its training, or the search for it."""
        return next(j for j in self.jobs if j.arm == arm and j.kind in TRAINING_KINDS)

    def legs(self, arm: str) -> tuple[Job, ...]:
        """The legs of an arm's trials, rung by rung; none where they share a pack."""
        return tuple(j for j in self.jobs if j.arm == arm and j.kind == LEG)

    def search(self, arm: str) -> Job | None:
        """The job that searches an arm's setting, if it is searched."""
        return next((j for j in self.jobs if j.arm == arm and j.kind in SEARCH_KINDS), None)


@dataclass(kw_only=True, slots=True, frozen=True)
class TaskFacts:
    """What a plan needs to know of a task. wordings: further ones that arms are asked under."""

    sha256: str
    kind: TaskKind
    wordings: tuple[str, ...] = ()
