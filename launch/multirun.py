"""`python launch.py -m ..`: every combination of the values becomes a run, all on one schedule.

Hydra's grammar says what the combinations are, and each is composed as if it were typed alone: same
command, same directory. Hydra's own sweeper is not used, nor a launcher plugin in its place: it
hands its launcher jobs to run to their end, with no plan that several share, composes them again
after our checks, and ends its errors with exit code 1.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from conf import schema
from conf.errors import EXIT_INTERRUPTED, ConfigError, Refused
from conf.hashing import plain, sha256_of
from evaluation.tasks import Task
from launch.budget import check_budget
from launch.cli import CONF, console_for, explained, run_checked, typed
from launch.combinations import Combination, combinations
from launch.overrides import experiment_of, rewrite
from launch.preflight import Checked, check
from launch.sweep_report import Sweep, SweepRun, show, write
from launch.together import joined

if TYPE_CHECKING:
    from launch.run import Run

T = TypeVar("T")
# One schedule has one machine, one place, one budget and one price.
COMMON = ("cluster", "budget", "pricing", "run.root", "dry_run")


@dataclass(kw_only=True, slots=True, frozen=True)
class SweepPlan:
    """A sweep that may start: every run of it is checked.

    name: of its directory, and of the group in W&B; the same combinations have the same name.
    """

    name: str
    command: str
    combinations: tuple[Combination, ...]
    checks: tuple[Checked, ...]

    def by_prefix(self) -> dict[str, Checked]:
        """The runs by what stands before their jobs' names: "1/", "2/", ..."""
        return {f"{c.number}/": k for c, k in zip(self.combinations, self.checks, strict=True)}


def run_sweep(arguments: list[str]) -> int:
    """Compose, check and run all combinations; returns the worst of their exit codes.

    Raises:
        Refused: one combination that is refused; then nothing was started.
    """
    sweep = checked_sweep(arguments)
    console = console_for()
    if len(sweep.checks) == 1:  # one value each: a run, not a sweep
        return run_checked(sweep.checks[0], console)
    if sweep.checks[0].config.dry_run:
        from launch.dry_run import show_sweep

        show_sweep([(c.label, k) for c, k in _pairs(sweep)], console)
        return 0
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return execute(sweep, console)


def _pairs(sweep: SweepPlan) -> list[tuple[Combination, Checked]]:
    return list(zip(sweep.combinations, sweep.checks, strict=True))


def checked_sweep(arguments: list[str]) -> SweepPlan:
    """All combinations, composed and checked. Raises Refused, naming the combination."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        found = _explained(
            lambda: combinations(arguments, config_loader=loader), where=shlex.join(arguments)
        )
        tasks: dict[str, Task] = {}
        checks = [_checked(combination, tasks) for combination in found]
    _check_together(found, checks)
    return SweepPlan(
        name=sweep_name(checks),
        command=shlex.join(["python", "launch.py", *arguments]),
        combinations=tuple(found),
        checks=tuple(checks),
    )


def sweep_name(checks: Sequence[Checked]) -> str:
    """The same runs have the same name, in whatever order."""
    names = sorted(checked.name for checked in checks)
    exps = {checked.exp for checked in checks}
    return f"sweep-{exps.pop() if len(exps) == 1 else 'several'}-{sha256_of(names)[:8]}"


def _explained(call: Callable[[], T], *, where: str) -> T:
    """Call Hydra; what it refuses is a ConfigError with what to type next."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        return call()
    except (HydraException, OmegaConfBaseException) as error:
        text = f"{error}\n{error.__cause__ or ''}"
        raise ConfigError(
            where,
            found=explained(text).removeprefix("Refused: "),
            expected="keys and values that exist",
        ) from None


def _checked(combination: Combination, tasks: dict[str, Task]) -> Checked:
    """Compose and check one combination as a run of its own."""
    from hydra import compose

    overrides = rewrite(list(combination.overrides))
    where = f"the combination {combination.label or combination.command}"
    config = _explained(lambda: typed(compose("config", overrides=overrides)), where=where)
    try:
        exp = experiment_of(overrides)
        return check(config, exp=exp, command=combination.command, tasks=tasks)
    except Refused as error:
        error.where = f"{error.where}, in {where}"
        raise


def _check_together(found: list[Combination], checks: list[Checked]) -> None:
    """Refuse runs that cannot share a schedule, a directory or the budget."""
    for key in COMMON:
        if len({sha256_of(_at(plain(checked.config), key)) for checked in checks}) > 1:
            raise ConfigError(
                key,
                found="several values in one sweep",
                expected="one: all runs share a schedule, a machine and a budget",
                remedy="type one sweep for each value",
            )
    first: dict[str, Combination] = {}
    for combination, checked in zip(found, checks, strict=True):
        same = first.setdefault(checked.name, combination)
        if same is not combination:
            raise ConfigError(
                f"-m: {same.label} and {combination.label}",
                found=f"the same run, {checked.name}",
                expected="combinations that differ",
                remedy="leave run.name out: each run has a name of its own"
                if checked.config.run.name
                else "leave one of them out",
            )
    plan = joined({f"{c.number}/": k.plan for c, k in zip(found, checks, strict=True)})
    check_budget(checks[0].config, plan, checks[0].machine)


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def execute(sweep: SweepPlan, console: Console) -> int:
    """Run what is missing in all runs, report each and all; returns the worst exit code."""
    from launch.run import end_copies, end_tracking, opened, report, run_jobs

    swept = {f"{c.number}/": values(c) for c in sweep.combinations}
    with opened(sweep.by_prefix(), group=sweep.name, swept=swept) as runs:
        write(_result(sweep, runs, is_over=False))
        console.print(_opening(sweep, runs), highlight=False, soft_wrap=True)
        run_jobs(runs, console)
        for run in runs:
            end_tracking(run, report(run), console)
        for run in runs:
            end_copies(run, console)
        result = _result(sweep, runs, is_over=True)
        tables = write(result)
    show(result, tables, console)
    code = max(run.exit_code for run in runs)
    if code == EXIT_INTERRUPTED:
        console.print(
            f"Interrupted. The same command goes on from here: {sweep.command}", soft_wrap=True
        )
    return code


def values(combination: Combination) -> dict[str, object]:
    """Its swept keys and values, numbers as numbers, so that W&B can draw axes of them."""
    return {key: _number_or_text(value) for key, value in combination.swept}


def _number_or_text(text: str) -> object:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _opening(sweep: SweepPlan, runs: list[Run]) -> str:
    finished = {j.key for run in runs for j in run.finished}
    pending = {j.key for run in runs for j in run.checked.plan.jobs} - finished
    lines = [
        f"[bold]{sweep.name}[/bold]: {len(runs)} runs, {len(pending)} different jobs to run, "
        f"{len(finished)} found finished"
    ]
    lines += [
        f"  {c.number}  {c.label}  {run.directory.path}"
        for c, run in zip(sweep.combinations, runs, strict=True)
    ]
    return "\n".join(lines)


def _result(sweep: SweepPlan, runs: list[Run], *, is_over: bool) -> Sweep:
    return Sweep(
        name=sweep.name,
        command=sweep.command,
        path=sweep.checks[0].root / sweep.name,
        runs=tuple(
            SweepRun(
                number=c.number,
                swept=c.swept,
                path=run.directory.path,
                command=c.command,
                exit_code=run.exit_code if is_over else None,
                keys={
                    j.arm: j.key
                    for j in run.checked.plan.jobs
                    if j.arm and j.kind in ("evaluate", "reference")
                },
            )
            for c, run in zip(sweep.combinations, runs, strict=True)
        ),
    )
