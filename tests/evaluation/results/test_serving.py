"""The commands that serve the winner: the right ones for each kind of arm."""

from __future__ import annotations

import ast
import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conf.choices import Normalisation
from conf.records import AnswerRule
from conf.results import Results, ServeCommand
from evaluation.records.run_records import RunRecords, read_run
from evaluation.report.files import write_report
from evaluation.results.serving import serve_commands
from evaluation.results.summary import summarise
from evaluation.scoring.normalisation import LabelScores
from tests.evaluation import fake_run

LORA = {"kind": "lora", "lora_rank": 24}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecords, Results]:
    root = tmp_path_factory.mktemp("a b") / "run"  # a path that a shell would cut
    fake_run.write_spam_run(root, num_test=40)
    records = read_run(root)
    return records, summarise(records)


def commands(
    run: tuple[RunRecords, Results], arm: str | None, *, lora: Mapping[str, Any] = LORA
) -> dict[str, ServeCommand]:
    records, results = run
    config = {**records.config, "arms": {**records.config["arms"], "lora": dict(lora)}}
    model = {**records.model, "directory": "models/base"}
    records = dataclasses.replace(records, config=config, model=model)
    recommendation = dataclasses.replace(results.recommendation, arm=arm)
    found = serve_commands(dataclasses.replace(results, recommendation=recommendation), records)
    assert len({(c.arm, c.title) for c in found}) == len(found)
    return {c.title: c for c in found if c.arm == (arm or c.arm)}


@pytest.mark.parametrize("arm", ["zero_shot", "few_shot", "lora", "full", "few_shot_on_lora"])
def test_every_model_arm_can_be_applied_exported_and_served(
    run: tuple[RunRecords, Results], arm: str
) -> None:
    found = commands(run, arm)
    predict = shlex.split(found["Answer a file of new rows"].text)
    assert predict[:3] == ["python", "-m", "launch.predict"]
    assert predict[3:] == [str(run[0].path), f"arm={arm}", "new.csv", "answers.csv"]
    export = shlex.split(found["Make it a directory of its own"].text)
    assert export[2:] == [
        "launch.export",
        str(run[0].path),
        f"arm={arm}",
        f"exported/{arm}",
        "merge=true",
    ]
    vllm = found["Serve that directory with vLLM"]
    assert shlex.split(vllm.text)[:3] == ["vllm", "serve", f"exported/{arm}"]
    assert "prompt.json" in vllm.note and "largest score" in vllm.note
    ast.parse(found["Or answer one item with plain transformers"].text)


@pytest.mark.parametrize("normalisation", [n.name for n in Normalisation if n.name != "auto"])
def test_the_snippet_scores_labels_by_the_rule_whatever_it_is(
    run: tuple[RunRecords, Results], normalisation: str
) -> None:
    """Its line of scores, run on made log-probabilities of two labels of different lengths."""
    records, results = run
    arm = records.arms["zero_shot"]
    offsets = {"ham": 0.25, "spam": -0.5}
    rule = AnswerRule(
        arm="zero_shot", answer_by="score", normalisation=normalisation, label_offsets=offsets
    )
    arms = {**records.arms, "zero_shot": dataclasses.replace(arm, rule=rule)}
    found = commands((dataclasses.replace(records, arms=arms), results), "zero_shot")
    snippet = found["Or answer one item with plain transformers"].text
    (line,) = (text for text in snippet.splitlines() if text.strip().startswith("scores[label] ="))
    parts = {"ham": [-1.0, -0.5], "spam": [-2.0, -0.25, -0.125]}
    scores = LabelScores(
        sums={label: sum(values) for label, values in parts.items()},
        num_tokens={label: len(values) for label, values in parts.items()},
        num_bytes={"ham": 3, "spam": 4},
        firsts={label: values[0] for label, values in parts.items()},
    )
    told: dict[str, float] = {}
    for label, values in parts.items():
        names = {"scores": told, "label": label, "ending": f" {label}", "parts": values}
        exec(line.strip(), {**names, "prompt": {"label_offsets": offsets}})
    wanted = {label: v - offsets[label] for label, v in scores.by(normalisation).items()}
    assert told == pytest.approx(wanted)


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (16, 16), (24, 32), (512, 512), (513, None)])
def test_a_plain_lora_can_share_its_base_model(
    run: tuple[RunRecords, Results], rank: int, allowed: int | None
) -> None:
    found = commands(run, "lora", lora={"kind": "lora", "lora_rank": rank})
    shared = found.get("Or serve many adapters on one base model")
    assert (shared is None) == (allowed is None)
    if shared is not None:
        words = shlex.split(shared.text)
        assert words[:4] == ["vllm", "serve", "models/base", "--enable-lora"]
        assert words[words.index("--max-lora-rank") + 1] == str(allowed)
        assert words[-1] == f"lora={run[0].path}/arms/lora/final/checkpoint"


def test_what_is_no_plain_lora_is_merged(run: tuple[RunRecords, Results]) -> None:
    title = "Or serve many adapters on one base model"
    assert title not in commands(run, "full") and title not in commands(run, "zero_shot")
    assert title not in commands(run, "lora", lora={**LORA, "use_dora": True})
    assert "lora=" in commands(run, "few_shot_on_lora")[title].text


def test_an_arm_that_asks_twice_has_no_snippet_of_one_call(
    run: tuple[RunRecords, Results],
) -> None:
    found = commands(run, "chain_of_thought")
    assert "Or answer one item with plain transformers" not in found
    assert "Answer a file of new rows" in found


def test_tfidf_is_applied_by_predict_alone(run: tuple[RunRecords, Results]) -> None:
    assert list(commands(run, "tfidf")) == ["Answer a file of new rows"]


def test_where_no_arm_is_told_apart_the_best_of_each_sort_is_served(
    run: tuple[RunRecords, Results],
) -> None:
    results = run[1]
    best = [results.decision["best_tuned"], results.decision["best_prompted"]]
    undecided = dataclasses.replace(results.recommendation, arm=None)
    found = serve_commands(dataclasses.replace(results, recommendation=undecided), run[0])
    assert list(dict.fromkeys(c.arm for c in found)) == best


def test_the_report_ends_with_them(run: tuple[RunRecords, Results], tmp_path: Path) -> None:
    records, results = run
    paths = write_report(results, records, tmp_path)
    assert results.serving
    for command in results.serving:
        first = command.text.splitlines()[0]
        assert f"    {first}" in paths.markdown.read_text()
    assert 'id="serve"' in paths.html.read_text()
