"""The table of arms on the terminal, while a run runs and when it is over (rich only)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from conf.records import Measured, Progress
from conf.results import ArmResult, Results
from evaluation import wording

STYLES = {
    "done": "green",
    "reused": "cyan",
    "running": "yellow",
    "waiting": "dim",
    "failed": "red",
    "refused": "red",
    "stopped": "magenta",
}
BAR_WIDTH = 8


@dataclass(kw_only=True, slots=True, frozen=True)
class ArmState:
    """One arm while the run runs. state: waiting | running | done | reused | failed | stopped.

    metric, tokens, seconds (wall) and usd are what is known so far; None shows as a dash.
    """

    arm: str
    state: str
    progress: Progress | None = None
    metric: Measured | None = None
    tokens: int | None = None
    seconds: float | None = None
    usd: float | None = None
    note: str = ""


def live_table(states: Sequence[ArmState], *, title: str | None = None) -> Table:
    """The arms of a running experiment, one row each."""
    table = Table(title=title, title_justify="left", expand=False, pad_edge=False, box=None)
    table.add_column("arm", no_wrap=True, overflow="ellipsis", max_width=20)
    table.add_column("state", no_wrap=True)
    table.add_column("progress")  # the only one that wraps, so that a narrow screen costs no figure
    table.add_column("metric", justify="right", no_wrap=True)
    for heading in ("tokens", "time", "USD"):
        table.add_column(heading, justify="right", no_wrap=True)
    for s in states:
        table.add_row(
            escape(s.arm),
            Text(s.state, style=STYLES.get(s.state, "")),
            _progress(s),
            "-" if s.metric is None else wording.percent(s.metric.value),
            "-" if s.tokens is None else wording.count(s.tokens),
            "-" if s.seconds is None else wording.seconds(round(s.seconds)),
            "-" if s.usd is None else wording.usd(s.usd),
        )
    return table


def _progress(state: ArmState) -> Text:
    """A short bar with counts while running; the reason of a failure otherwise."""
    p = state.progress
    if state.state in ("failed", "refused", "stopped"):
        return Text(wording.first_line(state.note), style=STYLES[state.state])
    if p is None or state.state != "running":
        return Text(state.note, style="dim")
    share = min(1.0, p.done / p.total) if p.total else 0.0
    filled = round(share * BAR_WIDTH)
    text = Text("#" * filled, style="yellow")
    text.append("." * (BAR_WIDTH - filled), style="dim")
    text.append(f" {p.done}/{p.total} {p.note or p.unit}")
    return text


def final_table(results: Results, *, width: int) -> Table:
    """All arms with their numbers; narrow terminals leave out latency, labels and fixed cost."""
    is_wide = width >= 110
    is_priced = any(_request_usd(r) is not None for r in results.arms.values())
    table = Table(expand=False, pad_edge=False, box=None)
    table.add_column("arm", no_wrap=True, overflow="ellipsis", max_width=20)
    metric = next((r.metric.name for r in results.arms.values() if r.metric), "metric")
    headings = [f"{wording.metric(metric)} (95%)", "p50"]
    headings += ["USD/1,000 req." if is_priced else "device-s/1,000 req."]
    if is_wide:
        headings += ["p95", "fixed USD" if is_priced else "fixed device-s", "labels", "tokens"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.arms.items():
        style = "bold" if name == results.recommendation.arm else ""
        table.add_row(*_final_row(name, result, is_priced=is_priced, is_wide=is_wide), style=style)
    return table


def _request_usd(result: ArmResult) -> float | None:
    return None if result.cost is None else result.cost.request_usd.value


def _final_row(name: str, result: ArmResult, *, is_priced: bool, is_wide: bool) -> list[str]:
    if result.status != "done":
        return [escape(name), escape(f"{result.status}: {_reason(result, is_wide=is_wide)}")]
    cost, latency, tokens = result.cost, result.latency, result.tokens
    request = fixed = None
    if cost is not None:
        request = cost.request_usd.value if is_priced else cost.request_device_seconds.value
        fixed = cost.fixed_usd if is_priced else cost.fixed_device_seconds
    row = [
        escape(name),
        wording.share_with_interval(result.metric),
        wording.seconds(None if latency is None else latency.p50_seconds.value),
        wording.amount(None if request is None else 1000 * request, is_usd=is_priced),
    ]
    if not is_wide:
        return row
    return [
        *row,
        wording.seconds(None if latency is None else latency.p95_seconds.value),
        wording.amount(fixed, is_usd=is_priced),
        wording.count(result.labels_used),
        wording.tokens(None if tokens is None else tokens.prompt.value),
    ]


def _reason(result: ArmResult, *, is_wide: bool) -> str:
    return wording.first_line(result.error or "no reason recorded", limit=70 if is_wide else 34)


def final(results: Results, console: Console, *, report: str | None = None) -> None:
    """The table, the recommendation in three sentences, and the command that reproduces it."""
    console.print()
    console.print(final_table(results, width=console.width))
    console.print()
    for sentence in three_sentences(results):
        console.print(Text(sentence))
    command = results.provenance.get("command")
    if command:
        console.print(Text(f"Again: {command}", style="dim"), soft_wrap=True)
    if report:
        console.print(Text(f"Report: {report}", style="dim"), soft_wrap=True)


def three_sentences(results: Results) -> list[str]:
    """Verdict with its main reason; the next reason; what would change it."""
    recommendation = results.recommendation
    verdict = wording.capitalised(recommendation.verdict)
    reasons, changes = recommendation.reasons, recommendation.would_change_if
    sentences = [f"{verdict}: {reasons[0]}" if reasons else f"{verdict}."]
    sentences += reasons[1:2]
    sentences += changes[:1] if changes else reasons[2:3]
    return sentences
