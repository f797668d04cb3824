"""The terminal's tables at 80 and 120 columns."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from conf.records import Measured, Progress
from evaluation.records.run_records import read_run
from evaluation.report import panel
from evaluation.results.summary import summarise
from tests.evaluation import fake_run


def screen(width: int) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width, color_system=None), stream


STATES = [
    panel.ArmState(
        arm="zero_shot",
        state="running",
        progress=Progress(done=40, total=200),
        metric=Measured(value=0.505),
        tokens=19_200,
        seconds=33.4,
        usd=0.00038,
    ),
    panel.ArmState(arm="few_shot_on_lora", state="waiting"),
    panel.ArmState(arm="full", state="failed", note="the loss is not finite at step 7\nTraceback"),
    panel.ArmState(arm="[red]odd[/]", state="reused", metric=Measured(value=0.9)),
]


@pytest.mark.parametrize("width", [80, 120])
def test_live_table_keeps_every_figure(width: int) -> None:
    console, stream = screen(width)
    console.print(panel.live_table(STATES, title="compare"))
    text = stream.getvalue()
    for needle in (
        "zero_shot",
        "running",
        "##......",
        "50.5%",
        "19,200",
        "33.0 s",
        "0.000380",
        "few_shot_on_lora",
        "[red]odd[/]",
    ):
        assert needle in text, needle
    assert "Traceback" not in text and "finite" in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("task", ["spam", "orders"])
def test_final_says_the_verdict_in_three_sentences(tmp_path: Path, width: int, task: str) -> None:
    write = fake_run.write_spam_run if task == "spam" else fake_run.write_orders_run
    results = summarise(read_run(write(tmp_path)))
    console, stream = screen(width)
    panel.final(results, console, report="outputs/x/report.html")
    text = stream.getvalue()
    assert results.recommendation.verdict[1:] in " ".join(text.split())
    assert "Again: python launch.py +exp=compare" in text and "outputs/x/report.html" in text
    assert len(panel.three_sentences(results)) == 3
    for name in results.arms:
        assert name in text
    assert ("labels" in text) == (width == 120)
    table = text.split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= width
    if task == "orders":
        assert "failed: the loss is not finite" in text and "device-s" in text


def test_panel_is_light() -> None:
    code = (
        "import sys, evaluation.report.panel\n"
        "heavy = {'torch', 'plotly', 'matplotlib', 'scipy', 'pandas', 'ray', 'transformers'}\n"
        "found = heavy & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
