"""Chaos for three minutes; `python -m tests.faults chaos` takes half an hour."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.chaos import Chaos

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.all_cores]


def test_runs_that_are_killed_at_random_leave_what_undisturbed_ones_do(
    record_property: Callable[[str, object], None],
) -> None:
    chaos = Chaos(seed=0, seconds=180)
    chaos.run()
    assert len(chaos.kills) >= 3
    record_property("recovery_seconds", max(seconds for _, seconds in chaos.kills))
