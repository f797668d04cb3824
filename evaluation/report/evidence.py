"""Records of one item as they were written, an arm each, for whoever doubts a number (pure)."""

from __future__ import annotations

import json

from conf.records import to_dict
from conf.results import Results
from evaluation.decision.rules import family
from evaluation.records.run_records import RunRecords

MAX_RECORDS = 4  # of an arm: calls and repeats of one item may be many
MAX_TEXT = 4000


def item_records(results: Results, records: RunRecords) -> list[dict[str, str]]:
    """Per arm its records of the first test item that all of them answered; none without text."""
    if not records.shows_text:
        return []
    by_arm = {
        name: [s for s in records.arms[name].samples if s.set == "test"]
        for name in results.arms
        if records.arms[name].samples
    }
    answered = [{s.item_id for s in samples} for samples in by_arm.values() if samples]
    shared = set.intersection(*answered) if answered else set()
    item = next((i for i in records.items if i in shared), None)
    shown = []
    for name, samples in by_arm.items():
        mine = [s for s in samples if s.item_id == item][:MAX_RECORDS]
        text = "\n".join(json.dumps(to_dict(s), ensure_ascii=False) for s in mine)
        if text:
            kind = family(results.arms[name])
            shown.append({"name": name, "family": kind, "text": text[:MAX_TEXT]})
    return shown
