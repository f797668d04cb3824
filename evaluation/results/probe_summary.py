"""Probes, turn-around and the ten-dimension table put into the results of a run (pure)."""

from __future__ import annotations

from dataclasses import replace

from conf.results import Results
from evaluation.records.run_records import RunRecords
from evaluation.results.dimensions import all_dimensions
from evaluation.results.probes import all_changes, all_probes, results_of
from evaluation.results.turn_around import turn_around


def with_probes(results: Results, records: RunRecords, *, confidence: float) -> Results:
    """The results with what probes found; the table comes last, as it is made from all of them."""
    probed = all_probes(records)
    arms = {
        name: replace(
            arm,
            probes=results_of(probed.get(name, {}), confidence=confidence),
            turn_around=turn_around(records, name),
        )
        for name, arm in results.arms.items()
    }
    changes = all_changes(records, probed, confidence=confidence)
    found = replace(results, arms=arms, probe_changes=changes)
    return replace(found, dimensions=all_dimensions(found))
