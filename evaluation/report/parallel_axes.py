"""A search as parallel coordinates: one line per setting, an axis per field; a static SVG (pure).

The last two axes are the rung that a setting reached and its value there. Colour goes from grey to
orange by place; the chosen line is thick, those that were dropped or failed are dashed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from conf.hashing import canonical_json
from conf.search_results import SearchResult, SettingResult
from evaluation.report.search_charts import metric_axis, place_of_rung, scaled
from evaluation.search.values import is_number, last_name, shown_value

TEMPLATES = Path(__file__).parent / "templates"
WORST, BEST = (127, 139, 152), (213, 94, 0)  # both at least 3:1 on white and on the dark page
STEP, LEFT, TOP, BOTTOM = 150, 70, 34, 26  # of the drawing, in its own units
LARGEST = 1.3  # times that size on a wide page
MIN_HEIGHT, MAX_HEIGHT, PER_NAME = 220, 900, 15
MAX_NAME = 20  # characters of a tick
MAX_TICKS = 6  # of an axis of numbers


@dataclass(kw_only=True, slots=True, frozen=True)
class Tick:
    """A label on an axis; y: in units of the drawing."""

    y: float
    text: str


@dataclass(kw_only=True, slots=True, frozen=True)
class Axis:
    """A vertical axis."""

    x: float
    title: str
    ticks: tuple[Tick, ...]


@dataclass(kw_only=True, slots=True, frozen=True)
class Line:
    """A setting; points: as an SVG path takes them. title: what it is, for who points at it."""

    points: str
    color: str
    title: str
    is_chosen: bool
    is_dashed: bool


def parallel_svg(search: SearchResult) -> str | None:
    """The drawing as SVG text, every label escaped; None where no setting ended."""
    if not search.settings:
        return None
    columns = _columns(search)
    names = max(len(column.names or ()) for column in columns)
    height = min(MAX_HEIGHT, max(MIN_HEIGHT, PER_NAME * names))
    scales = [_scale(column, height=height) for column in columns]
    axes = [
        Axis(x=LEFT + STEP * place, title=column.title, ticks=scale.ticks)
        for place, (column, scale) in enumerate(zip(columns, scales, strict=True))
    ]
    width = 2 * LEFT + STEP * (len(columns) - 1) + 30
    return (
        _environment()
        .get_template("parallel.svg.jinja")
        .render(
            width=width,
            max_width=round(LARGEST * width),
            height=height + TOP + BOTTOM,
            top=TOP,
            bottom=TOP + height,
            axes=axes,
            # The best lines last, so that they lie on top.
            lines=list(reversed(_lines(search, columns, scales, axes))),
            title=f"Settings of {search.arm}, by place",
        )
    )


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )


@dataclass(kw_only=True, slots=True, frozen=True)
class _Column:
    """What one axis shows. values: by setting. names: of an axis of names, from the foot up."""

    title: str
    values: tuple[Any, ...]
    names: tuple[Any, ...] | None = None
    is_log: bool = False


def _columns(search: SearchResult) -> list[_Column]:
    """The fields, the rung that was reached, and the value there."""
    settings = search.settings
    columns = []
    for field in dict.fromkeys(name for s in settings for name in s.values):
        values = tuple(s.values.get(field) for s in settings)
        found = next(f for f in search.fields if f.field == field)
        columns.append(_field_column(last_name(field), values, is_log=found.is_log))
    reached = sorted({-1 if s.rung is None else s.rung for s in settings})
    columns.append(
        _Column(
            title="judged",
            values=tuple(place_of_rung(search, s.rung) for s in settings),
            names=tuple(dict.fromkeys(place_of_rung(search, rung) for rung in reached)),
        )
    )
    title = _short(metric_axis(search), 2 * MAX_NAME)
    scores = tuple(scaled(s.value.value, search) for s in settings)
    return [*columns, _Column(title=title, values=scores)]


def _field_column(title: str, values: tuple[Any, ...], *, is_log: bool) -> _Column:
    if all(is_number(v) for v in values):
        is_log = is_log and min(values) > 0
        return _Column(title=f"{title} (log)" if is_log else title, values=values, is_log=is_log)
    names = {canonical_json(v): v for v in values}  # the best setting's on top
    return _Column(title=title, values=values, names=tuple(reversed(names.values())))


@dataclass(kw_only=True, slots=True, frozen=True)
class _Scale:
    """Where values lie: value -> y; a value that is not known lies at the foot."""

    at: Mapping[str, float]
    ticks: tuple[Tick, ...]

    def y(self, value: object) -> float:
        """The height of a value."""
        return self.at[canonical_json(value)]


def _scale(column: _Column, *, height: float) -> _Scale:
    foot = float(TOP + height)
    if column.names is not None:
        gap = height / max(1, len(column.names) - 1)
        at = {canonical_json(v): foot - gap * i for i, v in enumerate(column.names)}
        every = max(1, math.ceil(PER_NAME / gap))  # of very many names, only some are written
        texts = [_short(shown_value(v), MAX_NAME) for v in column.names]
        ticks = [Tick(y=y, text=t) for y, t in zip(at.values(), texts, strict=True)][::every]
        return _Scale(at=at, ticks=tuple(ticks))
    known = [v for v in column.values if v is not None]
    if not known:
        return _Scale(at={canonical_json(None): foot}, ticks=())
    scale = _number_scale(known, is_log=column.is_log, height=height)
    return _Scale(at={canonical_json(None): foot, **scale.at}, ticks=scale.ticks)


def _number_scale(values: Sequence[float], *, is_log: bool, height: float) -> _Scale:
    """Ticks at the values themselves where they are few, else evenly; ends are the extremes."""
    forward = math.log if is_log else float
    backward = math.exp if is_log else float
    low, high = forward(min(values)), forward(max(values))
    width = high - low

    def y(value: float) -> float:
        share = (forward(value) - low) / width if width else 0.5
        return TOP + height * (1 - share)

    distinct = sorted(set(values))
    shown = distinct
    if len(distinct) > MAX_TICKS:
        steps = range(MAX_TICKS)
        shown = [backward(low + width * i / (MAX_TICKS - 1)) for i in steps]
    ticks = tuple(Tick(y=y(v), text=shown_value(float(f"{v:.3g}"))) for v in shown)
    return _Scale(at={canonical_json(v): y(v) for v in distinct}, ticks=ticks)


def _lines(
    search: SearchResult,
    columns: Sequence[_Column],
    scales: Sequence[_Scale],
    axes: Sequence[Axis],
) -> list[Line]:
    last = max(1, len(search.settings) - 1)
    lines = []
    for number, setting in enumerate(search.settings):
        points = [
            f"{axis.x:.1f},{scale.y(column.values[number]):.1f}"
            for column, scale, axis in zip(columns, scales, axes, strict=True)
        ]
        lines.append(
            Line(
                points=" ".join(points),
                color=_color(1 - number / last),
                title=_line_title(setting, search),
                is_chosen=setting.status == "chosen",
                is_dashed=setting.status in ("dropped", "failed"),
            )
        )
    return lines


def _line_title(setting: SettingResult, search: SearchResult) -> str:
    where = place_of_rung(search, setting.rung)
    return f"{setting.place}. {setting.label}, {setting.status}, {where}"


def _color(share: float) -> str:
    """From grey (the last place) to orange (the first one)."""
    mixed = [round(w + share * (b - w)) for w, b in zip(WORST, BEST, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
