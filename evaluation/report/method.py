"""How a report's numbers were made, and the facts of its run (pure)."""

from __future__ import annotations

from conf.results import Results
from evaluation import wording
from evaluation.report.pair_words import pairs_note


def method_notes(results: Results) -> list[str]:
    """How the numbers were made, in sentences."""
    confidence = results.decision.get("confidence")
    share = wording.percent(confidence if isinstance(confidence, float) else 0.95, digits=0)
    notes = [
        f"Intervals are {share}: Wilson's for shares, a bootstrap over items for other scores,"
        " order statistics for latencies.",
        f"Every two arms are compared on the same items.{pairs_note(results.pairs)}",
        "The best prompted and the best fine-tuned arm of the headline are picked on validation, so"
        " that the test items judge only once. The answer rule of each arm (score or generate, and"
        " the calibration) is chosen on validation too.",
        "A request is answered alone, one at a time. Its cost is its seconds times the devices"
        " reserved. Fixed cost is training, validation and search, and labels where they have a"
        " price; an arm on top of a fine-tuned one pays for that one.",
        "Break-even intervals come from a bootstrap over the measured requests.",
        "n/a: not measured or no price. A dash: does not apply, such as format validity of an arm"
        " that scores labels.",
    ]
    note = results.model.get("note")
    if note:
        notes.append(f"About the model: {note}.")
    broken = results.provenance.get("num_broken_lines")
    if broken:
        notes.append(f"{broken} half-written line(s) of a killed process were skipped.")
    return notes


def run_facts(results: Results) -> list[tuple[str, str]]:
    """Versions, hardware, commit and data, one line each."""
    p = results.provenance
    dirty = ", with uncommitted changes" if p.get("is_dirty") else ""
    facts = [
        ("task", _flat({k: v for k, v in results.task.items() if k != "labels"})),
        ("model", _flat(results.model)),
        ("price", _flat(results.pricing)),
        ("hardware", _flat(p.get("hardware"))),
        ("versions", _flat(p.get("versions"))),
        ("commit", f"{p.get('commit') or 'unknown'}{dirty}"),
        ("checkpoints", "; ".join(_chosen_checkpoints(results))),
    ]
    return [(name, text) for name, text in facts if text]


def _chosen_checkpoints(results: Results) -> list[str]:
    """Of each arm that does not answer with its last checkpoint: which, and out of which."""
    told = []
    for name, r in results.arms.items():
        if (c := r.checkpoint) is not None:
            points = [f"step {s}: {wording.share_with_interval(m)}" for s, m in c.points.items()]
            told.append(f"{name}: step {c.step}, best on validation ({'; '.join(points)})")
    return told


def _flat(value: object) -> str:
    if isinstance(value, dict):
        parts = [f"{k} {_flat(v)}" for k, v in value.items() if v not in (None, "", {}, [])]
        return ", ".join(parts)
    return str(value) if value is not None else ""
