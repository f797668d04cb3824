"""The report of a searched run: tables against results, drawings against geometry, escaping."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from conf.records import Measured
from conf.results import Results
from conf.search_results import SearchResult, SettingResult
from evaluation.records.run_records import RunRecords, read_run
from evaluation.report.charts import Chart
from evaluation.report.files import ReportPaths, write_report
from evaluation.report.parallel_axes import parallel_svg
from evaluation.report.search_charts import search_charts
from evaluation.report.search_tables import (
    importance_table,
    searches_table,
    settings_table,
    value_text,
)
from evaluation.report.searches import search_sections
from evaluation.results.summary import summarise
from tests.evaluation import fake_search
from tests.evaluation.report.test_report import BROWSER, Page, in_browser

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    return read_run(fake_search.write_searched_run(tmp_path_factory.mktemp("searched")))


@pytest.fixture(scope="module")
def results(records: RunRecords) -> Results:
    return summarise(records)


@pytest.fixture(scope="module")
def written(results: Results, records: RunRecords) -> ReportPaths:
    return write_report(results, records, records.path)


@pytest.fixture(scope="module")
def charts(results: Results, records: RunRecords) -> dict[str, Chart]:
    return {chart.name: chart for chart in search_charts(results, records)}


def polylines(text: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """Class and points of every line of a drawing."""
    return [
        (
            str(line.get("class")),
            [tuple(map(float, p.split(","))) for p in str(line.get("points")).split()],
        )
        for line in ET.fromstring(text).iter(f"{SVG}polyline")
    ]  # type: ignore[misc]


def test_the_table_of_settings_has_every_setting_with_value_interval_n_and_cost(
    results: Results,
) -> None:
    search = results.searches["lora"]
    table = settings_table(search)
    cells = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    assert [c["place"] for c in cells] == [str(s.place) for s in search.settings]
    for cell, s in zip(cells, search.settings, strict=True):
        assert s.value.value is not None and s.value.low is not None
        assert (
            f"{100 * s.value.value:.1f}% ({100 * s.value.low:.1f} to "
            in cell["value on validation"]
        )
        assert cell["value on validation"].endswith("n = 48")
        assert float(cell["learning_rate"]) == s.values["trainer.learning_rate"]
        assert cell["tokens"] == f"{s.tokens:,}" and "2 seeds" in cell["replicates"]
    assert cells[-1]["status"].startswith("failed: the loss is not finite")


def test_a_loss_is_not_shown_as_a_share(results: Results) -> None:
    search = replace(results.searches["lora"], metric="minus_loss")
    value = Measured(value=-0.41, low=-0.43, high=-0.39, n=9)
    assert value_text(value, search) == "-0.41 (-0.43 to -0.39), n = 9"
    assert value_text(Measured(), search) == "n/a"


def test_the_lead_names_what_is_not_told_apart_and_what_the_grid_would_take(
    results: Results,
) -> None:
    search = results.searches["lora"]
    first = search.settings[1]
    tied = replace(search, settings=(search.settings[0], replace(first, is_told_apart=False)))
    for found, is_named in ((search, False), (tied, True)):
        (section,) = search_sections(replace(results, searches={"lora": found}), [])
        text = " ".join(section.sentences)
        assert ("Not told apart" in text and first.label in text) == is_named
        share = 100 * search.totals.taken / (16 * 50)
        assert f"{share:.0f}% of the 800" in text


def test_unknown_importance_is_unknown_and_not_zero(results: Results) -> None:
    search = results.searches["lora"]
    none = replace(search.fields[0], share=None, chance_high=None, p_value=None)
    (row,) = importance_table(replace(search, fields=(none,))).rows
    assert row[2:5] == ("n/a", "n/a", "n/a")


def test_the_rate_curve_is_the_settings_at_one_rung_and_at_the_last(
    results: Results, charts: dict[str, Chart]
) -> None:
    search = results.searches["lora"]
    chart = charts["search_learning_rate"]
    assert chart.is_x_log and chart.section == "search"
    early, last = chart.series
    assert (early.name, last.name) == ("lora, after 7 steps", "lora, after 50 steps")
    expected = {
        s.values["trainer.learning_rate"]: r.value.value
        for s in search.settings
        for r in s.rungs
        if r.rung == 1
    }
    assert len(expected) == 7  # the failed one did not come there
    assert list(early.x) == sorted(expected)
    assert list(early.y) == [100 * (expected[float(x)] or 0) for x in early.x]
    best = search.settings[0]
    assert last.x == (best.values["trainer.learning_rate"],)
    assert last.y == (100 * (best.value.value or 0),)


def test_best_so_far_has_a_point_per_rung_of_each_search(
    results: Results, charts: dict[str, Chart]
) -> None:
    chart = charts["search_best_so_far"]
    by_name = {s.name: s for s in chart.series}
    for name, search in results.searches.items():
        assert list(by_name[name].x) == [p.usd for p in search.best_so_far]
        assert list(by_name[name].x) == sorted(by_name[name].x) and len(by_name[name].x) == 4
    assert "USD" in chart.x_title


def test_every_trial_has_its_loss_and_the_chosen_one_stands_out(
    records: RunRecords, charts: dict[str, Chart]
) -> None:
    chart = charts["search_loss_lora"]
    search = records.arms["lora"].search
    assert search is not None and search.choice is not None
    assert len(chart.series) == 16
    assert [s.style for s in chart.series].count("line") == 1
    lengths = sorted(len(s.x) for s in chart.series)
    assert lengths == sorted(t.steps for t in search.trials)
    chosen = next(s for s in chart.series if s.style == "line")
    own = [r.loss for r in search.steps if r.trial == search.choice.trials[0]]
    assert list(chosen.y) == own


# --- Parallel coordinates -------------------------------------------------------------------------


def test_a_line_per_setting_crosses_every_axis_where_its_value_lies(results: Results) -> None:
    search = results.searches["lora"]
    text = parallel_svg(search)
    assert text is not None
    lines = list(reversed(polylines(text)))  # drawn from the last place to the first
    assert len(lines) == 8 and all(len(points) == 5 for _, points in lines)
    assert [kind for kind, _ in lines].count("chosen") == 1 and lines[0][0] == "chosen"
    assert lines[-1][0] == "dashed"
    rates = [s.values["trainer.learning_rate"] for s in search.settings]
    heights = [points[1][1] for _, points in lines]
    low, high = math.log(min(rates)), math.log(max(rates))
    top, foot = min(heights), max(heights)
    for rate, height in zip(rates, heights, strict=True):
        share = (math.log(rate) - low) / (high - low)
        assert height == pytest.approx(foot - share * (foot - top), abs=0.1)
    judged = {s.rung: points[3][1] for s, (_, points) in zip(search.settings, lines, strict=True)}
    assert [judged[r] for r in sorted(judged, key=lambda r: r or 0)] == sorted(
        judged.values(), reverse=True
    )


def setting(number: int, value: object, score: float | None) -> SettingResult:
    return SettingResult(
        setting=number, place=number + 1, label=f"x={value}", values={"x": value}, status="done",
        reason="", rung=None if score is None else 0, value=Measured(value=score),
        replicate_values=(), seeds=1, draws=1, tokens=0, device_seconds=0.0, usd=None,
        trained_parameters=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        [None, 1e-3, 2],
        [[1, 2], [1], []],
        [True, False, True],
        [5, 5, 5],
        ["<a onload=x>", '"', "&"],
        [0, -1, 1000],
        [f"wording {i}" for i in range(200)],
        [0.5],
    ],
)
def test_any_values_can_be_drawn(results: Results, values: list[object]) -> None:
    from conf.search_results import FieldResult

    settings = tuple(setting(i, v, None if i == 1 else i / 10) for i, v in enumerate(values))
    field = FieldResult(
        field="x", is_log=True, num_values=2, share=None, chance_high=None, p_value=None, n=3
    )
    search: SearchResult = replace(results.searches["lora"], settings=settings, fields=(field,))
    text = parallel_svg(search)
    assert text is not None
    assert len(polylines(text)) == len(values)
    root = ET.fromstring(text)
    width, height = map(float, str(root.get("viewBox")).split()[2:])
    assert height <= 1000
    for _, points in polylines(text):
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    ticks = [float(str(t.get("y"))) for t in root.iter(f"{SVG}text") if not t.get("class")]
    assert ticks and max(ticks) <= height


def test_no_setting_no_drawing(results: Results) -> None:
    assert parallel_svg(replace(results.searches["lora"], settings=())) is None


# --- Files ----------------------------------------------------------------------------------------


def test_page_and_markdown_show_both_searches(written: ReportPaths, results: Results) -> None:
    page = Page(written.html.read_text(encoding="utf-8"))
    text, markdown = page.text, written.markdown.read_text(encoding="utf-8")
    assert "search" in page.ids and "plot-search_learning_rate" in page.ids
    assert page.tags.count("polyline") == 8 + 6
    figures = json.loads(page.data)["figures"]
    assert {"search_learning_rate", "search_best_so_far", "search_loss_lora"} <= set(figures)
    for name, search in results.searches.items():
        assert f"### {name}".replace("_", "\\_") in markdown
        for s in search.settings:
            assert f"{s.tokens:,}" in text
    assert "lora answers with the setting that its search chose" in text
    names = {path.name for path in written.figures}
    assert {"search_settings_lora.svg", "search_loss_lora.svg"} <= names
    for path in written.figures:
        assert f"figures/{path.name}" in markdown and path.is_file()
        ET.parse(path)


def test_a_wording_is_escaped_everywhere(written: ReportPaths) -> None:
    page = Page(written.html.read_text(encoding="utf-8"))
    assert page.handlers == [] and "img" not in page.tags
    assert page.tags.count("script") == 3  # the data, plotly, and the page's own
    assert "Decide whether this is spam. </script>" in page.text
    drawing = next(p for p in written.figures if p.name == "search_settings_few_shot.svg")
    root = ET.parse(drawing).getroot()
    assert not [e for e in root.iter() if e.tag in (f"{SVG}script", f"{SVG}image")]
    assert "<script" not in written.markdown.read_text().replace("\\<script", "")


def test_a_report_without_texts_has_no_wording(tmp_path: Path) -> None:
    run = read_run(fake_search.write_searched_run(tmp_path, text="none"))
    write_report(summarise(run), run, tmp_path)
    files = [*tmp_path.glob("report.*"), *tmp_path.glob("results.*"), *tmp_path.glob("figures/*")]
    for path in files:
        assert not [w for w in fake_search.WORDINGS if w in path.read_text(encoding="utf-8")]
    assert "instruction 2" in (tmp_path / "report.md").read_text()


def test_a_run_without_a_search_has_no_such_section(
    results: Results, records: RunRecords, tmp_path: Path
) -> None:
    arms = {n: replace(a, search=None) for n, a in records.arms.items()}
    plain = replace(records, arms=arms)
    paths = write_report(summarise(plain), plain, tmp_path)
    page = Page(paths.html.read_text(encoding="utf-8"))
    assert "search" not in page.ids and "polyline" not in page.tags
    assert "## Search" not in paths.markdown.read_text()


def test_searches_stand_side_by_side(results: Results) -> None:
    table = searches_table(results.searches)
    cells = {row[0]: dict(zip(table.headings, row, strict=True)) for row in table.rows}
    assert set(cells) == {"few_shot", "lora"}
    share = results.searches["lora"].totals.share_of_grid
    assert share is not None and cells["lora"]["of the whole grid"] == f"{100 * share:.0f}%"
    open_ended = replace(results.searches["lora"], settings=(), choice=None)
    (row,) = searches_table({"lora": open_ended}).rows
    assert "did not end" in row[1] and row[2] == "n/a"


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(written: ReportPaths, tmp_path: Path, width: int) -> None:
    found = in_browser(tmp_path, written.html, width=width)
    assert found["errors"] == [] and found["console"] == []
    assert found["inner"] == width and int(str(found["scroll"])) <= width
    assert found["plots"] == 3 * len(re.findall('id="plot-', written.html.read_text()))
    assert found["hacked"] is None and found["fetched"] == []
