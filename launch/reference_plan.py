"""The jobs of reference arms: a bag of words, a linear probe, the user's present system (pure)."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from conf.errors import ConfigError
from conf.hashing import sha256_of, sha256_of_file
from conf.methods import GivenMethod
from conf.resolve import Arm
from launch.placement import Machine, threads_of
from launch.planned import Job

REFERENCE_KINDS = ("tfidf", "linear_probe", "given")


class KeyFacts(Protocol):
    """What the keys of a plan's jobs have in common (launch/plan.py)."""

    @property
    def common(self) -> object:
        """Of all jobs of a task."""

    @property
    def machine(self) -> Machine:
        """What there is to run on."""

    def determined(self, arm: Arm, training: str | None) -> dict[str, object]:
        """What determines an arm's answers, but for the items."""


def reference_jobs(arm: Arm, facts: KeyFacts, *, needs: tuple[str, ...]) -> list[Job]:
    """The jobs of a reference arm; needs: those that make its model ready.

    Raises:
        ConfigError: no file of predictions.
    """
    if arm.kind == "linear_probe":
        return _probe_jobs(arm, facts, needs=needs)
    method: object = arm.method
    if isinstance(arm.method, GivenMethod):
        path = Path(arm.method.path)
        if not path.is_file():
            raise ConfigError(
                f"arms.{arm.name}.path",
                found=f"{arm.method.path}, which is not a file",
                expected="a CSV or JSONL file with columns id and answer",
                remedy=f"write arms.{arm.name}.path=predictions.csv",
            )
        method = [arm.method, sha256_of_file(path)]
    key = sha256_of({"kind": "reference", "common": facts.common, "method": method})
    return [Job(id=f"reference:{arm.name}", kind="reference", arm=arm.name, key=key, devices=1)]


def _probe_jobs(arm: Arm, facts: KeyFacts, *, needs: tuple[str, ...]) -> list[Job]:
    """The hidden states of all items, and the fit on them.

    The first is alone on the machine, since it also times requests.
    """
    determined = facts.determined(arm, None)
    asked = {key: determined[key] for key in ("common", "method", "prompt_file", "model")}
    asked["on"] = facts.machine.name
    features = Job(
        id=f"features:{arm.name}",
        kind="features",
        arm=arm.name,
        key=sha256_of({"kind": "features", **asked}),
        depends_on=needs,
        devices=threads_of(1, facts.machine),
        is_exclusive=True,
    )
    fit = Job(
        id=f"reference:{arm.name}",
        kind="reference",
        arm=arm.name,
        key=sha256_of({"kind": "linear_probe", **asked}),
        depends_on=(features.id,),
        devices=1,
    )
    return [features, fit]


def features_job(job: Job) -> str | None:
    """The id of the features job that a fit waits for; None where it needs none."""
    return next((name for name in job.depends_on if name.startswith("features:")), None)
