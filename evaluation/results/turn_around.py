"""How long it takes from a changed prompt, or changed data, to a score, by the ledger (pure)."""

from __future__ import annotations

from collections.abc import Collection

from conf.probe_results import TurnAround
from evaluation.records.run_records import RunRecords

SCORING = ("validation", "calibration", "test", "reference")
PREPARING = ("train", "sweep", "prompt_search", "curve")


def turn_around(records: RunRecords, name: str) -> TurnAround | None:
    """Seconds of an arm's jobs, each on the devices it had; None for an arm that is not done.

    A changed prompt is scored again. Changed data also train again whatever the arm stands on.
    Start-ups are not in it, and what was found in the cache counts as if it were done now.
    """
    if records.arms[name].status != "done":
        return None
    scored = _wall_seconds(records, [name], SCORING)
    if scored is None:
        return TurnAround()
    prepared = _wall_seconds(records, records.base_arms(name), PREPARING)
    return TurnAround(prompt_seconds=scored, data_seconds=scored + (prepared or 0.0))


def ready_seconds(records: RunRecords, name: str) -> float | None:
    """Seconds from the labels to the first request that an arm can serve: no test is in it.

    Jobs one after another, each on the devices it had, by the ledger; None for an arm that is not
    done. An arm without such work is ready at once.
    """
    if records.arms[name].status != "done":
        return None
    before = ("validation", "calibration", "reference", "redone", *PREPARING)
    return _wall_seconds(records, records.base_arms(name), before) or 0.0


def _wall_seconds(
    records: RunRecords, arms: Collection[str], purposes: Collection[str]
) -> float | None:
    """Device-seconds of some purposes over the devices that their jobs reserved."""
    devices = {str(job.get("id")): int(job.get("devices") or 0) for job in records.jobs}
    everything = int(records.hardware.get("devices") or 1)
    found = [
        line.device_seconds / (devices.get(line.job) or everything)
        for line in records.ledger
        if line.arm in arms and line.purpose in purposes and line.device_seconds
    ]
    return sum(found) if found else None
