"""What the tests of the matrix found, and the table of it (pure)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.faults.matrix import Row

DID_NOT_RUN = "pytest did not run it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One execution of one test; recovery and steps where the test records them."""

    test: str
    verdict: str  # passed, failed or skipped
    seconds: float = 0.0
    reason: str = ""
    recovery_seconds: float | None = None
    steps_redone: float | None = None

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Outcome:
        """From a line of the plugin's file."""
        properties = line["properties"]
        return cls(
            test=line["test"],
            verdict=line["verdict"],
            seconds=line["seconds"],
            reason=line["reason"],
            recovery_seconds=_number(properties.get("recovery_seconds")),
            steps_redone=_number(properties.get("steps_redone")),
        )


def _number(said: Any) -> float | None:
    return None if said is None else float(said)


def is_of(test: str, asked: str) -> bool:
    """Whether a test is what an id without parameters asks for, or one of its cases."""
    return test.partition("[")[0] == asked


def with_missing(outcomes: Sequence[Outcome], asked: Iterable[str]) -> list[Outcome]:
    """An id that gave no outcome failed: its test is gone, or its file does not load."""
    lost = [a for a in asked if not any(is_of(o.test, a) for o in outcomes)]
    return [*outcomes, *(Outcome(test=a, verdict="failed", reason=DID_NOT_RUN) for a in lost)]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowResult:
    """All executions of a row's tests."""

    row: Row
    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, row: Row, outcomes: Iterable[Outcome]) -> RowResult:
        """The row's own among all."""
        mine = tuple(o for o in outcomes if any(is_of(o.test, asked) for asked in row.tests))
        return cls(row=row, outcomes=mine)

    @property
    def ran(self) -> list[Outcome]:
        """Those that injected the fault."""
        return [o for o in self.outcomes if o.verdict != "skipped"]

    @property
    def num_passed(self) -> int:
        """Those after which all held."""
        return sum(o.verdict == "passed" for o in self.outcomes)

    @property
    def not_injected(self) -> str:
        """Why nothing ran; empty where something did."""
        if self.ran:
            return ""
        told = dict.fromkeys(o.reason for o in self.outcomes)
        return self.row.reason or "; ".join(told) or DID_NOT_RUN

    @property
    def is_kept(self) -> bool:
        """Whether every injection ended as it should."""
        return self.num_passed == len(self.ran) > 0


def table(results: Sequence[RowResult], *, facts: str) -> str:
    """All rows as Markdown; facts: when, what and where, in one line."""
    injected = [r for r in results if r.ran]
    kept = sum(r.is_kept for r in injected)
    lines = [
        "# Faults",
        "",
        facts,
        "",
        f"{kept} of {len(injected)} rows end as they should, in "
        f"{sum(r.num_passed for r in injected)} of {sum(len(r.ran) for r in injected)} runs.",
        "",
        *_injected(injected),
        *_absent([r for r in results if not r.ran]),
        *_failures(injected),
    ]
    return "\n".join(lines) + "\n"


def _injected(results: Sequence[RowResult]) -> list[str]:
    heads = "| row | fault | what must hold | runs | passed | median s | worst s | redone |"
    lines = [heads, "|" + " ---: |" + " --- |" * 2 + " ---: |" * 5]
    for r in results:
        recovery = [o.recovery_seconds for o in r.ran if o.recovery_seconds is not None]
        redone = [o.steps_redone for o in r.ran if o.steps_redone is not None]
        cells = (
            f"{r.row.number}",
            r.row.fault,
            r.row.expected,
            f"{len(r.ran)}",
            f"{r.num_passed}",
            f"{statistics.median(recovery):.1f}" if recovery else "",
            f"{max(recovery):.1f}" if recovery else "",
            f"{max(redone):.0f}" if redone else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    note = "runs: executions of the row's tests. s: from the fault to the first new step, where "
    note += "it is measured. redone: training steps done again, at most."
    return [*lines, "", note, ""]


def _absent(results: Sequence[RowResult]) -> list[str]:
    if not results:
        return []
    lines = [f"| {r.row.number} | {r.row.fault} | {r.not_injected} |" for r in results]
    heads = ["| row | fault | reason |", "| ---: | --- | --- |"]
    return ["Not injected here:", "", *heads, *lines, ""]


def _failures(results: Sequence[RowResult]) -> list[str]:
    failed = {o.test: o.reason for r in results for o in r.ran if o.verdict == "failed"}
    if not failed:
        return []
    return ["Failed:", "", *(f"- `{test}`: {reason[:200]}" for test, reason in failed.items())]
