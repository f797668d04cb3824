"""`budget.*`: caps on the whole run, checked before it, before each job and as records come in.

The whole run is all its invocations: what a killed or stopped one spent counts when the command is
typed again (launch/spending.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from conf.errors import ConfigError
from conf.records import LedgerLine
from conf.run_groups import BudgetConfig, PricingConfig
from conf.schema import RunConfig
from launch.placement import Machine
from launch.planned import LEG, SEARCH_KINDS, Job, Plan
from launch.rates import price_of
from launch.search.estimate import check_sweep_budget
from launch.spending import Spending

# In a run's directory: what hosted models were paid, and what is set aside for requests under way.
ENDPOINT_SPEND = "endpoint_spend.jsonl"


@dataclass(kw_only=True, slots=True)
class Budget:
    """What a run has spent of what it may."""

    config: BudgetConfig
    pricing: PricingConfig
    device_seconds: float = 0.0
    hosted_usd: float = 0.0  # for tokens
    endpoint_spend: Path | None = None  # the file that all requests to hosted models go by
    spending: Spending | None = None  # over all invocations; None: of this one alone
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Begin with what earlier invocations spent."""
        if self.spending is not None:
            self.device_seconds += self.spending.before.device_seconds
            self.hosted_usd += self.spending.before.hosted_usd

    def spend(
        self, device_seconds: float, *, job: str | None = None, hosted_usd: float = 0.0
    ) -> None:
        """Count device-seconds, or a price in USD, as their records come in. job: its key."""
        self.device_seconds += device_seconds
        self.hosted_usd += hosted_usd
        if self.spending is not None:
            self.spending.add(job=job, device_seconds=device_seconds, hosted_usd=hosted_usd)

    def spend_line(self, line: LedgerLine, *, job: str | None = None) -> None:
        """Count a ledger line: tokens of hosted models are paid for where no device works."""
        is_hosted = not line.device_seconds and not line.is_reused
        self.spend(line.device_seconds, job=job, hosted_usd=line.usd or 0.0 if is_hosted else 0.0)

    def begin_job(self, job: str, device_seconds: float) -> None:
        """A job starts, of which records of so many device-seconds are kept from before."""
        if self.spending is None:
            return
        unseen = self.spending.unseen(job, device_seconds)
        self.spending.begin(job)
        if unseen:
            self.spend(unseen, job=job)

    def hosted_limit_usd(self) -> float | None:
        """What requests to hosted models may cost in all, devices being paid for; None: any."""
        price = self.pricing.usd_per_device_second
        if self.config.max_usd is None:
            return None
        return max(0.0, self.config.max_usd - self.device_seconds * (price or 0.0))

    def refusal(self, job: Job) -> str | None:
        """Why a job may not start, or None where its estimate still fits."""
        expected = (job.estimate.seconds or 0.0) * job.devices
        return self._over(self.device_seconds + expected, f"with {job.id}")

    def excess(self) -> str | None:
        """Why a running job has to stop, or None while there is budget left."""
        if self.spending is not None:
            self.spending.tick()
        return self._over(self.device_seconds, "spent")

    def _over(self, device_seconds: float, what: str) -> str | None:
        cap = self.config.max_device_seconds
        if cap is not None and device_seconds > cap:
            return f"budget.max_device_seconds={cap:g}: {device_seconds:.0f} {what}"
        price = self.pricing.usd_per_device_second
        if self.config.max_usd is not None and (price is not None or self.hosted_usd):
            usd = device_seconds * (price or 0.0) + self.hosted_usd
            if usd > self.config.max_usd:
                return f"budget.max_usd={self.config.max_usd:g}: {usd:.4f} USD {what}"
        wall = time.monotonic() - self.started
        wall += self.spending.before.wall_seconds if self.spending is not None else 0.0
        if self.config.max_wall_seconds is not None and wall > self.config.max_wall_seconds:
            return f"budget.max_wall_seconds={self.config.max_wall_seconds:g}: {wall:.0f} s passed"
        return None


def check_budget(config: RunConfig, plan: Plan, machine: Machine) -> None:
    """Refuse a run whose estimate is over its budget. What is unknown is not counted."""
    if config.budget.max_usd is not None and price_of(config, machine) is None:
        raise ConfigError(
            "budget.max_usd",
            found=f"{config.budget.max_usd:g}, and no price of a device-hour",
            expected="a price to spend it by",
            remedy="write pricing=cpu_core_hour, or budget.max_device_seconds instead",
        )
    searches = [(j.estimate, j.devices) for j in plan.jobs if j.kind in (*SEARCH_KINDS, LEG)]
    check_sweep_budget(config.sweep.budget, searches, price=price_of(config, machine))
    totals = {
        "max_usd": sum(j.estimate.usd or 0.0 for j in plan.jobs),
        "max_device_seconds": sum((j.estimate.seconds or 0.0) * j.devices for j in plan.jobs),
    }
    for key, total in totals.items():
        cap = getattr(config.budget, key)
        if cap is not None and total > cap:
            raise ConfigError(
                f"budget.{key}",
                found=f"{cap:g}, and a plan of about {total:.3g}",
                expected="a budget that the plan fits",
                remedy="raise it, drop arms (~method@arms.full), or lower task.limit.*; "
                "dry_run=true shows the plan",
            )
