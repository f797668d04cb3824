"""Tables of a report: what was trained on, and how well instructions are obeyed (pure)."""

from __future__ import annotations

from conf.records import SourceRows
from conf.results import Results
from evaluation import wording
from evaluation.report.tables import SimpleTable


def sources_table(results: Results) -> SimpleTable:
    """One line per source of each arm that trained; no rows where nothing is on record."""
    rows = [
        _source_row(name, source, whole=sum(s.num_rows for s in r.train.sources))
        for name, r in results.arms.items()
        if r.train is not None
        for source in r.train.sources
    ]
    return SimpleTable(
        headings=(
            "arm",
            "source",
            "items",
            "rows",
            "share, asked",
            "trained rows",
            "trained tokens",
            "of them targets",
            "dropped rows, tokens",
            "truncated tokens",
            "held out",
            "note",
        ),
        rows=tuple(rows),
        note="rows: prepared, repeats included; trained: over all epochs, without padding. Dropped:"
        " rows over the model's context, left out whole; no row is cut. Held out: rows left out"
        " since they hold a text that arms are judged on. A batch forwards the beginning that its"
        " rows share once, so the ledger may bill fewer tokens than its rows have.",
    )


def _source_row(arm: str, source: SourceRows, *, whole: int) -> tuple[str, ...]:
    share = wording.percent(source.num_rows / whole if whole else None, digits=0)
    if source.share_asked is not None:
        share += f", {wording.percent(source.share_asked, digits=0)}"
    return (
        arm,
        source.source,
        f"{source.num_items:,}",
        f"{source.num_rows:,}",
        share,
        wording.count(source.trained_rows),
        wording.count(source.trained_tokens),
        wording.count(source.trained_target_tokens),
        f"{source.num_dropped:,}, {source.dropped_tokens:,}",
        f"{source.truncated_tokens:,}",
        f"{source.num_held_out:,}",
        source.note or "-",
    )


def instructions_table(results: Results) -> SimpleTable:
    """How often the base model and each tuned one obey; no rows where it was not asked."""
    rows = [
        (
            row.arm,
            wording.percent(row.base.value),
            wording.span(row.base.low, row.base.high),
            wording.percent(row.tuned.value),
            wording.span(row.tuned.low, row.tuned.high),
            wording.points(row.change.value),
            wording.span(row.change.low, row.change.high, is_points=True),
            "; ".join(
                f"{kind} {wording.points(m.value)} ({wording.span(m.low, m.high, is_points=True)},"
                f" n = {m.n})"
                for kind, m in row.by_kind.items()
            ),
            str(row.change.n),
        )
        for row in results.instructions
    ]
    return SimpleTable(
        headings=(
            "arm",
            "base obeys",
            "interval",
            "tuned obeys",
            "interval",
            "points",
            "interval",
            "by kind of instruction",
            "requests",
        ),
        rows=tuple(rows),
        note="Embedded requests with an instruction on the form of the answer (upper case, a number"
        " of words, JSON with a key, ..), asked of the weights without the task's prompt; a program"
        " verifies the form, not the fact. Questions and wordings are none of those of the mix; new"
        " kinds are in no mix at all.",
    )
