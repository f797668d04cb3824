"""What a plan expects of a job: tokens, operations, bytes, seconds, money."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
