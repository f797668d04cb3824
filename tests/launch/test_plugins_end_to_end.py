"""A user's own prompt style, scorer and loader, each at most 20 lines, outside the repository."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG_SECONDS

pytestmark = pytest.mark.all_cores

ROOT = Path(__file__).resolve().parent.parent.parent

STYLE = """
from evaluation.plugins import prompt_style
from evaluation.prompts import Ask, Message, item_text

@prompt_style("terse")
def terse(item, context):
    system = Message("system", context.instruction + " Be terse.")
    answer = yield Ask((system, Message("user", item_text(item))))
    return answer
"""
SCORER = """
from evaluation.plugins import scorer

@scorer("first_letter")
def first_letter(answer, item, task):
    return float((answer or "")[:1] == item.answer_key[:1])
"""
LOADER = """
from evaluation.plugins import loader

@loader("animals")
def animals(config):
    names = ["cat", "dog", "owl", "bee"]
    return [
        {"input": f"sighting {i} of a {names[i % 4]} at night", "label": names[i % 4]}
        for i in range(80)
    ]
"""


@pytest.mark.slow
def test_a_style_a_scorer_and_a_loader_from_outside(tmp_path: Path) -> None:
    names = []
    for name, text in (("style", STYLE), ("scorer", SCORER), ("loader", LOADER)):
        assert len(text.strip().splitlines()) <= 20
        (tmp_path / f"my_{name}.py").write_text(text)
        names.append(str(tmp_path / f"my_{name}.py"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "+exp=smoke", f"run.root={tmp_path}/out"]
        + ["run.name=r", f"plugins=[{','.join(names)}]", "task=file", "task.source=animals"]
        + ["task.scoring=first_letter", "arms.zero_shot.prompt=terse", "task.name=animals"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out/r/results.json").read_text())
    assert results["task"]["scoring"] == "first_letter"
    assert results["arms"]["zero_shot"]["metric"]["value"] is not None
    prompts = (tmp_path / "out/r/prompts.jsonl").read_text()
    assert "Be terse." in prompts
