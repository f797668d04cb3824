"""Draws charts: as plotly figures (plain dictionaries, coloured by the page) and as SVG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.report.charts import Chart, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = {"prompt": "#0072B2", "weights": "#D55E00", "both": "#A3558A", "reference": "#5F6B76"}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
MPL_DASHES = ("-", "--", ":", "-.", (0, (8, 3)), (0, (8, 3, 1, 3)))
MPL_MARKERS = ("o", "s", "D", "^", "x", "P")


def plotly_figure(chart: Chart) -> dict[str, object]:
    """Data and layout of a chart; colours are names like `@prompt` that the page replaces."""
    axis = {"zeroline": False, "automargin": True, "ticklen": 4}
    legend_rows = math.ceil(len(chart.series) / 2)
    height = 90 + 34 * _num_rows(chart) if chart.is_ranked else 380 + 20 * max(0, legend_rows - 2)
    return {
        "data": [_trace(s, chart=chart) for s in chart.series],
        "layout": {
            "height": height,
            "margin": {"l": 8, "r": 14, "t": 12, "b": 8},
            "showlegend": not chart.is_ranked,
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": 0,
                "yanchor": "bottom",
                "yref": "container",
            },
            "hovermode": "closest",
            "xaxis": {
                **axis,
                "title": {"text": chart.x_title, "standoff": 10},
                "type": "log" if chart.is_x_log else "linear",
                **_log_ticks(chart.is_x_log, [x for s in chart.series for x in s.x]),
            },
            "yaxis": {
                **axis,
                "title": {"text": chart.y_title, "standoff": 8},
                "type": "category" if chart.is_ranked else "log" if chart.is_y_log else "linear",
                **_log_ticks(chart.is_y_log, [y for s in chart.series for y in s.y]),
            },
            **_marks(chart),
        },
    }


def _log_ticks(is_log: bool, values: Sequence[float | str]) -> dict[str, object]:
    """A tick per decade where there are several; else plotly's own, as plain numbers."""
    numbers = [v for v in values if isinstance(v, float)]
    if not is_log:
        return {}
    is_wide = max(numbers) >= 100 * min(numbers)
    return {"exponentformat": "power", "dtick": 1} if is_wide else {"exponentformat": "none"}


def _num_rows(chart: Chart) -> int:
    return len({s.y for s in chart.series})


def _trace(s: Series, *, chart: Chart) -> dict[str, object]:
    color = f"@{s.family}"
    trace: dict[str, object] = {"type": "scatter", "name": s.name, "x": s.x, "y": s.y}
    if s.style in ("line", "thin"):
        width = 2.2 if s.style == "line" else 1
        dash = DASHES[s.order % len(DASHES)]
        return {**trace, "mode": "lines", "line": {"color": color, "width": width, "dash": dash}}
    if s.style == "faint":
        thin = {"color": "@muted", "width": 1}
        return {**trace, "mode": "lines", "line": thin, "showlegend": False}
    symbol = "circle" if chart.is_ranked else SYMBOLS[s.order % len(SYMBOLS)]
    symbol = f"{symbol}-open" if s.style == "hollow" else symbol
    trace |= {"mode": "markers", "marker": {"color": color, "size": 10, "symbol": symbol}}
    if s.style == "joined":
        trace |= {"mode": "lines+markers", "line": {"color": color, "width": 1.6}}
    measured = s.x if chart.is_ranked else s.y
    up = [_gap(h, v) for h, v in zip(s.high, measured, strict=False)]
    down = [_gap(v, low) for low, v in zip(s.low, measured, strict=False)]
    if any(up) or any(down):
        bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
        bars |= {"color": color, "thickness": 1.6, "width": 0 if chart.is_ranked else 3}
        trace["error_x" if chart.is_ranked else "error_y"] = bars
    return trace


def _gap(high: float | str | None, low: float | str | None) -> float:
    return high - low if isinstance(high, float) and isinstance(low, float) else 0.0


def _marks(chart: Chart) -> dict[str, object]:
    """Vertical lines with a note at the foot, and a ring with a note at a crossing."""
    shapes, notes = [], []
    for mark in chart.marks:
        x = _position(mark.x, is_log=chart.is_x_log)
        if mark.y is None:
            line = {"color": "@muted", "width": 1, "dash": "dot"}
            shapes.append(
                {
                    "type": "line",
                    "x0": mark.x,
                    "x1": mark.x,
                    "yref": "paper",
                    "y0": 0,
                    "y1": 1,
                    "line": line,
                }
            )
            notes.append(
                {
                    "x": x,
                    "yref": "paper",
                    "y": 0.02,
                    "text": mark.label,
                    "showarrow": False,
                    "xanchor": "right",
                    "yanchor": "bottom",
                    "xshift": -4,
                }
            )
        else:
            y = _position(mark.y, is_log=chart.is_y_log)
            notes.append(
                {
                    "x": x,
                    "y": y,
                    "text": "crossing",
                    "showarrow": True,
                    "ax": -30,
                    "ay": -44,
                    "arrowcolor": "@ink",
                    "arrowwidth": 1.2,
                    "arrowhead": 0,
                    "standoff": 4,
                }
            )
    return {"shapes": shapes, "annotations": notes}


def _position(value: float, *, is_log: bool) -> float:
    """Plotly places annotations on a log axis by their logarithm."""
    return math.log10(value) if is_log else value


def write_svg(chart: Chart, path: Path) -> None:
    """One chart as an SVG file."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = chart.name  # the same chart gives the same bytes
    from matplotlib.figure import Figure

    height = 1.2 + 0.32 * _num_rows(chart) if chart.is_ranked else 4.2
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.add_subplot()
    for s in chart.series:
        _draw(axes, s, chart=chart)
    if chart.is_x_log:
        axes.set_xscale("log")
    if chart.is_y_log:
        axes.set_yscale("log")
    for mark in chart.marks:
        if mark.y is None:
            axes.axvline(mark.x, color="#888888", linewidth=1, linestyle=":")
            axes.annotate(
                mark.label,
                (mark.x, 0.03),
                xycoords=("data", "axes fraction"),
                fontsize=8,
                ha="right",
                xytext=(-4, 0),
                textcoords="offset points",
            )
        else:
            axes.plot([mark.x], [mark.y], "o", mfc="none", mec="#111111", markersize=11)
            axes.annotate(
                "crossing",
                (mark.x, mark.y),
                fontsize=8,
                ha="right",
                xytext=(-10, 12),
                textcoords="offset points",
            )
    axes.set_xlabel(chart.x_title)
    axes.set_ylabel(chart.y_title)
    axes.set_title(chart.title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if chart.is_ranked else "both", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    if not chart.is_ranked:
        figure.legend(loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def _draw(axes: Axes, s: Series, *, chart: Chart) -> None:
    color = COLORS[s.family]
    if s.style in ("line", "thin"):
        style, width = MPL_DASHES[s.order % len(MPL_DASHES)], 1.7 if s.style == "line" else 0.8
        axes.plot(s.x, s.y, color=color, linestyle=style, linewidth=width, label=s.name)
        return
    if s.style == "faint":
        axes.plot(s.x, s.y, color="#9aa5b1", linewidth=0.9, zorder=1)
        return
    marker = "o" if chart.is_ranked else MPL_MARKERS[s.order % len(MPL_MARKERS)]
    measured = s.x if chart.is_ranked else s.y
    up = [_gap(h, v) for h, v in zip(s.high, measured, strict=False)]
    down = [_gap(v, low) for low, v in zip(s.low, measured, strict=False)]
    bars = [down, up] if up else None
    axes.errorbar(
        s.x,
        s.y,
        xerr=bars if chart.is_ranked else None,
        yerr=None if chart.is_ranked else bars,
        marker=marker,
        color=color,
        markersize=6.5,
        linewidth=1.4,
        label=s.name,
        linestyle="-" if s.style == "joined" else "none",
        markerfacecolor="none" if s.style == "hollow" else color,
    )
