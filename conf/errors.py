"""Every error a user can meet, and the exit code it ends a run with.

CrossoverError
|-- Refused           exit 2: nothing was started
|   |-- ConfigError       a key of the configuration
|   |-- DataError         a file, line or column of the user's data
|   |-- ModelError        a model, tokenizer, template or checkpoint directory
|   |-- ClusterError      more asked for than there is, or a place that cannot be written
|   `-- NotBuiltYet       a room of the design that cannot do its job yet
|-- JobFailed         exit 1: one job failed; the other arms are reported
`-- BudgetReached     exit 3: stopped at `budget.*`, with a partial report
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_ARM_FAILED = 1
EXIT_REFUSED = 2
EXIT_BUDGET = 3
EXIT_INTERRUPTED = 130


class CrossoverError(Exception):
    """Base of all errors with a meaning to the user."""

    exit_code = EXIT_ARM_FAILED


class Refused(CrossoverError):
    """Bad input, found before anything started.

    Args:
        where: file and line, or key, e.g. `tickets.csv:17` or `trainer.learning_rate`.
        found: what stands there.
        expected: what should stand there.
        remedy: what to type or change, as a full sentence or command.
    """

    exit_code = EXIT_REFUSED

    def __init__(self, where: str, *, found: str, expected: str, remedy: str = "") -> None:
        self.where = where
        self.found = found
        self.expected = expected
        self.remedy = remedy
        super().__init__(where, found, expected, remedy)

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword fields when the error crosses a process boundary."""
        return (_rebuild, (type(self), self.where, self.found, self.expected, self.remedy))

    def __str__(self) -> str:
        """Four short lines: where, found, expected, remedy."""
        lines = [self.where, f"  found:    {self.found}", f"  expected: {self.expected}"]
        if self.remedy:
            lines.append(f"  remedy:   {self.remedy}")
        return "\n".join(lines)


def _rebuild(cls: type[Refused], where: str, found: str, expected: str, remedy: str) -> Refused:
    return cls(where, found=found, expected=expected, remedy=remedy)


class ConfigError(Refused):
    """A key of the configuration is wrong."""


class DataError(Refused):
    """The user's data is wrong."""


class ModelError(Refused):
    """A model, tokenizer, chat template or checkpoint directory cannot be used."""


class ClusterError(Refused):
    """The machines or the storage cannot hold what was asked for."""


class NotBuiltYet(Refused):
    """A room of the design that refuses by name instead of returning a plausible number."""

    def __init__(self, where: str, *, instead: str) -> None:
        super().__init__(
            where,
            found="a part of Crossover that is not built yet",
            expected="one of the parts that are",
            remedy=instead,
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the two arguments when the error crosses a process boundary."""
        return (_rebuild_not_built, (self.where, self.remedy))


def _rebuild_not_built(where: str, instead: str) -> NotBuiltYet:
    return NotBuiltYet(where, instead=instead)


class JobFailed(CrossoverError):
    """A job failed for a reason that a retry does not mend (e.g. a loss that is not finite)."""

    exit_code = EXIT_ARM_FAILED


class MachineFailed(JobFailed):
    """A job failed for a reason outside of it (a full disk); once it is mended the job goes on."""


class BudgetReached(CrossoverError):
    """The run stopped at one of its `budget.*` limits."""

    exit_code = EXIT_BUDGET
