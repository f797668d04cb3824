"""The report's files: numbers, escaping, no requests, and a real browser where there is one."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evaluation.records.run_records import read_run
from evaluation.report.files import ReportPaths, write_report
from evaluation.report.html import script_json
from evaluation.results.summary import summarise
from tests.evaluation import fake_run
from tests.waiting import HANG_SECONDS

BROWSER = next(
    (b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None
)


class Page(HTMLParser):
    """Collects tags, addresses, visible text and the page's data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.data = ""
        self.ids: list[str] = []
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "action") and v]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        self.ids += [v for k, v in attrs if k == "id" and v]
        if tag in ("script", "style"):
            self._inside.append(values.get("id") or tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data
        elif self._inside[-1] == "data":
            self.data += data


def made(tmp_path: Path, **options: object) -> tuple[ReportPaths, Page]:
    fake_run.write_spam_run(tmp_path, **options)
    records = read_run(tmp_path)
    paths = write_report(summarise(records), records, tmp_path)
    return paths, Page(paths.html.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def spam(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportPaths, Page]:
    return made(tmp_path_factory.mktemp("spam"), num_general=60)


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportPaths, Page]:
    root = fake_run.write_orders_run(tmp_path_factory.mktemp("orders"))
    records = read_run(root)
    paths = write_report(summarise(records), records, root)
    return paths, Page(paths.html.read_text(encoding="utf-8"))


def test_the_page_fetches_nothing(spam: tuple[ReportPaths, Page]) -> None:
    paths, page = spam
    assert all(a.startswith(("#", "data:")) for a in page.addresses)
    assert not {"img", "iframe", "object", "embed", "base"} & set(page.tags)
    text = paths.html.read_text()
    assert (
        "default-src 'none'" in text
        and "@import" not in text
        and "url(" not in text.split("<script")[0]
    )
    assert paths.html.stat().st_size < 8_000_000


def test_the_verdict_comes_first_with_its_figures(spam: tuple[ReportPaths, Page]) -> None:
    paths, page = spam
    results = json.loads(paths.results_json.read_text())
    verdict = results["recommendation"]["verdict"]
    text = " ".join(page.text.split())
    assert text.index(verdict[1:]) < text.index("Accuracy on the test items")
    for needle in (
        "per 1,000 requests, lora",
        "Break-even, few_shot to lora",
        "1.2 million",
        "2026-06-17",
    ):
        assert needle in text
    for arm in fake_run.SPAM_ARMS:
        assert arm in text
    assert "python launch.py +exp=compare" in text


def test_item_text_cannot_become_html(spam: tuple[ReportPaths, Page]) -> None:
    paths, page = spam
    assert page.tags.count("script") == 3 and "img" not in page.tags and not page.handlers
    assert "window.hacked" in page.data  # it is there, as data
    assert fake_run.NASTY not in paths.html.read_text()
    assert fake_run.NASTY in page.text  # shown in the prompts, as text
    assert json.loads(page.data)["shows_text"] is True


def test_script_json_escapes_and_reads_back() -> None:
    value = {"a": "</script><!-- & \u2028 \u00e9"}
    text = script_json(value)
    assert not set(text) & set("<>&") and text.isascii()
    assert json.loads(text) == value


def test_ids_are_unique(spam: tuple[ReportPaths, Page]) -> None:
    assert len(spam[1].ids) == len(set(spam[1].ids))


def test_items_that_differ_are_all_in_the_page(spam: tuple[ReportPaths, Page]) -> None:
    paths, page = spam
    data = json.loads(page.data)
    pairs = json.loads(paths.results_json.read_text())["pairs"]
    for pair in pairs:
        rows = zip(data["answers"][pair["a"]], data["answers"][pair["b"]], strict=True)
        assert sum(a[1] != b[1] for a, b in rows) == pair["wins"] + pair["losses"]


def planted(value: object, word: str) -> object:
    """The same JSON with the word in every text a user's data or a model can have put there."""
    texts = ("input", "context", "target", "rationale", "completion", "text", "shown_row")
    texts += ("answer", "calibrated_answer", "references", "choices")
    if isinstance(value, dict):
        return {
            k: word if k in texts and v is not None else planted(v, word) for k, v in value.items()
        }
    return [planted(v, word) for v in value] if isinstance(value, list) else value


def test_without_text_no_item_text_is_left(tmp_path: Path) -> None:
    fake_run.write_spam_run(tmp_path, num_test=24, num_general=10, text="none")
    planted_in = set()
    for path in [*tmp_path.glob("*.jsonl"), *tmp_path.glob("arms/*/*.jsonl")]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if path.name not in ("train.jsonl", "curve.jsonl"):
            text = "".join(json.dumps(planted(line, "canary77")) + "\n" for line in lines)
            path.write_text(text)
            planted_in |= {path.name} if "canary77" in text else set()
    assert planted_in == {"items.jsonl", "prompts.jsonl", "samples.jsonl", "journal.jsonl"}
    records = read_run(tmp_path)
    paths = write_report(summarise(records), records, tmp_path)
    files = [paths.html, paths.markdown, paths.latex, paths.results_json, paths.results_csv]
    for path in [*files, *paths.figures]:
        assert "canary77" not in path.read_text(), path.name
    assert "report.text=none" in paths.html.read_text()


def test_every_axis_has_a_title_with_a_unit(spam: tuple[ReportPaths, Page]) -> None:
    figures = json.loads(spam[1].data)["figures"]
    shown = {"accuracy", "cost_quality", "training", "validation", "volume", "latency"}
    assert set(figures) == shown
    for name, figure in figures.items():
        for axis in ("xaxis", "yaxis"):
            title = figure["layout"][axis]["title"]["text"]
            assert title == "arm" or re.search(r"\(.*(%|USD|count|nats|seconds).*\)", title), (
                name,
                title,
            )


def test_latency_and_consistency_are_drawn_as_measured(orders: tuple[ReportPaths, Page]) -> None:
    figures = json.loads(orders[1].data)["figures"]
    arms = json.loads(orders[0].results_json.read_text())["arms"]
    for name, arm in arms.items():
        if arm["status"] != "done":
            continue
        rows = {t["name"]: t["x"][0] for t in figures["latency"]["data"]}
        assert rows[name] == arm["latency"]["p50_seconds"]["value"]
        assert rows[f"{name}, 95th percentile"] == arm["latency"]["p95_seconds"]["value"]
        agree = {t["name"]: t["x"][0] for t in figures["consistency"]["data"]}
        assert agree[name] == pytest.approx(100 * arm["consistency"]["value"])


def test_the_crossing_is_marked_where_results_say(spam: tuple[ReportPaths, Page]) -> None:
    volume = json.loads(spam[1].data)["figures"]["volume"]
    results = json.loads(spam[0].results_json.read_text())
    expected = next(
        b["requests"]
        for b in results["break_even"]
        if (b["a"], b["b"], b["unit"]) == ("few_shot", "lora", "usd")
    )
    note = next(n for n in volume["layout"]["annotations"] if n["text"] == "crossing")
    assert 10 ** note["x"] == pytest.approx(expected)
    lora = next(t for t in volume["data"] if t["name"] == "lora")
    cost = results["arms"]["lora"]["cost"]
    assert lora["y"][0] == pytest.approx(cost["fixed_usd"] + cost["request_usd"]["value"])


def test_csv_has_a_row_per_arm_and_empty_unknowns(
    spam: tuple[ReportPaths, Page], orders: tuple[ReportPaths, Page]
) -> None:
    rows = list(csv.DictReader(spam[0].results_csv.read_text().splitlines()))
    assert [r["arm"] for r in rows] == list(fake_run.SPAM_ARMS)
    results = json.loads(spam[0].results_json.read_text())
    assert float(rows[4]["metric_low"]) == results["arms"]["lora"]["metric"]["low"]
    failed = next(
        r
        for r in csv.DictReader(orders[0].results_csv.read_text().splitlines())
        if r["arm"] == "full"
    )
    assert failed["metric_value"] == "" and "not finite" in failed["error"]


def test_a_run_without_a_price_reports_device_seconds(orders: tuple[ReportPaths, Page]) -> None:
    text = " ".join(orders[1].text.split())
    assert "device-s per 1,000 requests" in text and "no price" in text
    sliders = [i for i in orders[1].ids if i.startswith("slide-")]
    assert sliders == ["slide-requests_per_month", "slide-horizon_months"]
    assert "failed: the loss is not finite at step 7" in text
    figures = json.loads(orders[1].data)["figures"]
    assert "device-seconds" in figures["volume"]["layout"]["yaxis"]["title"]["text"]


def test_markdown_escapes_and_links_figures(spam: tuple[ReportPaths, Page]) -> None:
    text = spam[0].markdown.read_text()
    assert "| zero\\_shot |" in text
    for path in spam[0].figures:
        assert f"figures/{path.name}" in text and path.read_text().lstrip().startswith("<?xml")


def test_a_run_in_which_nothing_finished_still_reports(tmp_path: Path) -> None:
    fake_run.write_spam_run(tmp_path, num_test=4)
    for path in tmp_path.glob("arms/*/*.jsonl"):
        path.unlink()
    records = read_run(tmp_path)
    paths = write_report(summarise(records), records, tmp_path)
    assert "No arm finished" in paths.html.read_text()
    assert paths.markdown.read_text() and paths.results_csv.read_text()


def in_browser(tmp_path: Path, report: Path, *, width: int) -> dict[str, object]:
    """Loads the report in a frame of this width and reads what happened there."""
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"""<body><style>iframe {{ border: 0; width: {width}px; height: 900px }}</style>
        <iframe id=f src="{report.as_uri()}"></iframe>
        <pre id=out></pre><script>
        const frame = document.getElementById("f"), errors = [];
        frame.contentWindow.addEventListener("error", e => errors.push(String(e.message)));
        frame.onload = () => setTimeout(() => {{  // charts are drawn after the page has loaded
          const w = frame.contentWindow, d = frame.contentDocument;
          const select = d.getElementById("pair");
          const count = () => d.getElementById("difference-count").textContent;
          const before = count();
          select.selectedIndex = select.options.length - 1;
          select.dispatchEvent(new w.Event("change"));
          document.getElementById("out").textContent = JSON.stringify({{
            scroll: d.documentElement.scrollWidth, inner: w.innerWidth, errors,
            plots: d.querySelectorAll(".plot .main-svg").length, hacked: w.hacked || null,
            before, after: count(), rows: d.getElementById("differences").rows.length,
            fetched: w.performance.getEntriesByType("resource").map(r => r.name),
          }});
        }}, 2000);
        </script></body>"""
    )
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
    ]
    command += [
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
    ]
    command += [
        "--window-size=1400,1000",
        "--virtual-time-budget=10000",
        "--dump-dom",
        probe.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="out">(\{.*?\})</pre>', done.stdout, re.DOTALL)
    assert found, f"the page did not load: {done.stdout[:500]} {console}"
    probed = json.loads(html.unescape(found[1]))
    return {**probed, "console": console}


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(spam: tuple[ReportPaths, Page], tmp_path: Path, width: int) -> None:
    found = in_browser(tmp_path, spam[0].html, width=width)
    assert found["errors"] == [] and found["console"] == []
    assert found["inner"] == width and found["scroll"] <= found["inner"]
    assert found["plots"] >= 5 and found["hacked"] is None and found["fetched"] == []
    results = json.loads(spam[0].results_json.read_text())
    last = next(p for p in results["pairs"] if (p["a"], p["b"]) == ("few_shot_on_lora", "tfidf"))
    differing = last["wins"] + last["losses"]
    assert found["after"] == f"{differing} items differ." and found["rows"] == differing
    assert found["before"] != found["after"]
