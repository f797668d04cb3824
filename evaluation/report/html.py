"""report.html: one file that works offline, made from results and records.

Every text goes through jinja's escaping or, for the page's script, through JSON whose `<`, `>` and
`&` are escaped. A content security policy allows the page's own scripts by hash and no request.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from conf.results import Results
from evaluation import wording
from evaluation.decision.rules import family
from evaluation.records.arm_scores import Request
from evaluation.records.run_records import RunRecords
from evaluation.report import costs, dimensions, method, outcome, tables
from evaluation.report.charts import Chart
from evaluation.report.evidence import item_records
from evaluation.report.figures import plotly_figure
from evaluation.report.labels import label_section
from evaluation.report.page_decision import decision_data, sliders, totals_note
from evaluation.report.search_tables import chosen_labels
from evaluation.report.searches import search_sections, shared_charts
from evaluation.report.training_tables import instructions_table, sources_table
from evaluation.results.arm_summary import answered_requests, is_calibrated, test_scores

TEMPLATES = Path(__file__).parent / "templates"
MAX_DIFFERENCES = 100
MAX_ITEMS = 2000
MAX_CHARACTERS = 600


def render_html(results: Results, records: RunRecords, *, charts: list[Chart]) -> str:
    """The whole page as text."""
    plotly_js, report_js = _plotly_js(), _page_script()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    verdict = results.recommendation.verdict
    return environment.get_template("report.html.jinja").render(
        script_hashes=[_hash(plotly_js), _hash(report_js)],
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        plotly_js=Markup(plotly_js),
        report_js=Markup(report_js),
        data_json=Markup(script_json(_page_data(results, records, charts=charts))),
        run=results.run,
        verdict=wording.capitalised(verdict),
        reasons=results.recommendation.reasons,
        changes=results.recommendation.would_change_if,
        task_name=results.task.get("name", "task"),
        model_name=results.model.get("name", "model"),
        figures=tables.key_figures(results),
        sliders=sliders(results),
        totals_note=totals_note(results),
        arms=[{"name": name, "family": family(r)} for name, r in results.arms.items()],
        dimensions=dimensions.dimension_groups(results),
        criteria=dimensions.criteria_table(results),
        latency=dimensions.latency_table(results),
        arm_headings=tables.arm_headings(results),
        arm_rows=tables.arm_rows(results),
        arm_note=arm_note(results),
        charts=[chart for chart in charts if not chart.section],
        first_charts=("accuracy", "cost_quality"),
        searches=_searches(results, charts),
        search_charts=shared_charts(charts),
        label_curve=label_section(results, charts),
        pairs=tables.pair_table(results),
        break_even=costs.break_even_table(results),
        rates=costs.rates_table(results),
        retraining=costs.retraining_table(results),
        ledger=tables.ledger_table(results),
        forgetting=outcome.forgetting_table(results),
        serving=outcome.serving(results),
        training_sources=sources_table(results),
        instructions=instructions_table(results),
        pair_options=_pair_options(results),
        shows_text=records.shows_text,
        prompts=_prompts(results, records),
        no_prompts=_why_none("prompt", records),
        records=item_records(results, records),
        no_records=_why_none("record", records),
        method_notes=method.method_notes(results),
        command=results.provenance.get("command") or "not recorded",
        facts=method.run_facts(results),
    )


def _why_none(what: str, records: RunRecords) -> str:
    if records.shows_text:
        return f"No {what} was written."
    return f"{wording.capitalised(what)}s are left out, since report.text=none."


def arm_note(results: Results) -> str:
    """What the table's intervals rest on."""
    sizes = sorted({r.metric.n for r in results.arms.values() if r.metric and r.metric.n})
    timed = sorted(
        {
            r.latency.p50_seconds.n
            for r in results.arms.values()
            if r.latency and r.latency.p50_seconds.n
        }
    )
    parts = []
    if sizes:
        parts.append(f"n = {' or '.join(map(str, sizes))} test items.")
    if timed:
        parts.append(
            f"Latency and cost: {' or '.join(map(str, timed))} separate requests, one at a time."
        )
    parts += [
        f"{name} answers with the setting that its search chose: {label}."
        for name, label in chosen_labels(results).items()
    ]
    return " ".join(parts)


def _searches(results: Results, charts: list[Chart]) -> list[dict[str, Any]]:
    """Sections of searches; their drawings are markup whose labels were escaped."""
    return [
        {
            "arm": section.arm,
            "sentences": section.sentences,
            "tables": section.tables,
            "parallel": Markup(section.parallel) if section.parallel else None,
            "charts": section.charts,
        }
        for section in search_sections(results, charts)
    ]


def script_json(value: object) -> str:
    """JSON that cannot end or open a tag inside a script element."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _page_script() -> str:
    """The page's own script: rules, drawing, sliders; one element, so that the rules are shared."""
    names = ("decision.js", "report.js", "sliders.js")
    return '"use strict";\n' + "\n".join(
        (TEMPLATES / name).read_text(encoding="utf-8") for name in names
    )


def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    source = str(get_plotlyjs())
    assert "</script" not in source, "plotly.js would end its own element"
    return source


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _page_data(results: Results, records: RunRecords, *, charts: list[Chart]) -> dict[str, Any]:
    """What the page's script draws and filters."""
    answers: dict[str, dict[str, list[object]]] = {}
    for name in records.arm_specs:
        if results.arms[name].status == "done":
            answers[name] = _answers(records, name)
    item_ids = sorted({i for given in answers.values() for i in given}, key=_item_order(records))
    item_ids = _most_disputed(item_ids, answers)
    return {
        "figures": {chart.name: plotly_figure(chart) for chart in charts},
        "items": [_item(records, i) for i in item_ids],
        "answers": {name: [given.get(i) for i in item_ids] for name, given in answers.items()},
        "shows_text": records.shows_text,
        "max_rows": MAX_DIFFERENCES,
        "decision": decision_data(results),
    }


def _item_order(records: RunRecords) -> Any:
    order = {item_id: i for i, item_id in enumerate(records.items)}
    return lambda item_id: order.get(item_id, len(order))


def _most_disputed(item_ids: list[str], answers: dict[str, dict[str, list[object]]]) -> list[str]:
    """Only items on which arms differ, and no more than the page can carry."""
    disputed = [
        i
        for i in item_ids
        if len({str(given[i][1]) for given in answers.values() if i in given}) > 1
    ]
    return disputed[:MAX_ITEMS]


def _item(records: RunRecords, item_id: str) -> list[str]:
    item = records.items.get(item_id)
    if not records.shows_text or item is None:
        return [item_id]
    return [item_id, _cut(item.input), _cut(item.answer_key)]


def _answers(records: RunRecords, name: str) -> dict[str, list[object]]:
    """Item id -> [answer, score]; the answer is left out where texts are."""
    requests = answered_requests(records, name, set_name="test")
    scores = test_scores(records, name, requests)
    with_calibration = is_calibrated(records, name)
    shown: dict[str, str] = {}
    for request in requests:
        shown.setdefault(request.final.item_id, _answer_text(request, with_calibration))
    return {
        item_id: [_cut(shown[item_id]) if records.shows_text else "", round(score, 4)]
        for item_id, score in scores.items()
    }


def _answer_text(request: Request, with_calibration: bool) -> str:
    final = request.final
    answer = final.calibrated_answer if with_calibration else final.answer
    return answer if answer is not None else final.completion or final.error or ""


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 3]}..."


def _pair_options(results: Results) -> list[dict[str, object]]:
    """Pairs of arms for the list, the headline pair selected."""
    done = [name for name, r in results.arms.items() if r.metric is not None]
    headline = {results.decision.get("best_prompted"), results.decision.get("best_tuned")}
    return [
        {"value": json.dumps([a, b]), "text": f"{a} and {b}", "is_selected": {a, b} == headline}
        for a, b in itertools.combinations(done, 2)
    ]


def _prompts(results: Results, records: RunRecords) -> list[dict[str, str]]:
    if not records.shows_text:
        return []
    shown = []
    for name, r in results.arms.items():
        summary = records.arms[name].train_summary
        row = summary.shown_row if summary is not None else ""
        if r.prompt_example or row:
            shown.append(
                {
                    "name": name,
                    "family": family(r),
                    "text": r.prompt_example or "",
                    "shown_row": row,
                }
            )
    return shown
