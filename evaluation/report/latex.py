"""results.tex: the table of arms for a paper (pure); needs the package booktabs."""

from __future__ import annotations

from conf.records import Measured
from conf.results import ArmResult, Metric, Results
from evaluation import wording
from evaluation.report.charts import is_priced, metric_name

SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def escaped(text: str) -> str:
    """One line of text that LaTeX shows as it is."""
    return "".join(SPECIAL.get(c, c) for c in " ".join(text.split()))


def results_tex(results: Results) -> str:
    """A tabular of all arms: metric, latency, costs and labels; failed arms with their status."""
    unit = "USD" if is_priced(results) else "device-s"
    headings = (
        "arm",
        f"{metric_name(results)} (%)",
        "p50 latency",
        f"{unit} / 1,000 requests",
        f"fixed {unit}",
        "labels",
    )
    lines = [
        f"% {escaped(results.run)}: \\usepackage{{booktabs}}",
        r"\begin{tabular}{lrrrrr}",
        r"\toprule",
        _line(headings),
        r"\midrule",
    ]
    for name, r in results.arms.items():
        if r.status == "done":
            lines.append(_line((name, *_cells(r, with_usd=is_priced(results)))))
        else:
            lines.append(rf"{escaped(name)} & \multicolumn{{5}}{{l}}{{{escaped(r.status)}}} \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return rf"{' & '.join(map(escaped, cells))} \\"


def _cells(r: ArmResult, *, with_usd: bool) -> tuple[str, ...]:
    request = fixed = None
    if r.cost is not None:
        request = (r.cost.request_usd if with_usd else r.cost.request_device_seconds).value
        fixed = r.cost.fixed_usd if with_usd else r.cost.fixed_device_seconds
    return (
        _share(r.metric),
        wording.seconds(r.latency.p50_seconds.value if r.latency else None),
        wording.amount(None if request is None else 1000 * request, is_usd=with_usd),
        wording.amount(fixed, is_usd=with_usd),
        wording.count(r.labels_used),
    )


def _share(measured: Measured | Metric | None) -> str:
    """'93.4 (90.1 to 95.7)'; the unit stands in the heading."""
    if measured is None or measured.value is None:
        return wording.UNKNOWN
    value = f"{100 * measured.value:.1f}"
    if measured.low is None or measured.high is None:
        return value
    return f"{value} ({wording.span(measured.low, measured.high)})"
