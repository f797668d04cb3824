"""evaluation.read_run: records as data frames, compared with the files; results.tex."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import DataError
from evaluation import read_run
from evaluation.records.run_records import read_run as read_records
from evaluation.report.latex import escaped, results_tex
from evaluation.results.summary import summarise
from tests.evaluation import fake_run
from tests.waiting import HANG_SECONDS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conf.records import to_dict

    path: Path = fake_run.write_spam_run(tmp_path_factory.mktemp("run"), num_test=30)
    results = summarise(read_records(path))
    (path / "results.json").write_text(json.dumps(to_dict(results)))
    return path


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_frames_hold_every_record(root: Path) -> None:
    run = read_run(root)
    samples = run.samples()
    expected = [s for p in root.glob("arms/*/samples.jsonl") for s in lines(p)]
    assert len(samples) == len(expected)
    right = sum(bool(s["is_correct"]) for s in expected if s["set"] == "test")
    assert samples[samples.set == "test"].is_correct.fillna(False).astype(bool).sum() == right
    assert len(run.train()) == sum(len(lines(p)) for p in root.glob("arms/*/train.jsonl")) == 120
    assert set(run.curve()["value.n"]) == {60} and len(run.items()) == 330
    ledger = [e["data"] for e in lines(root / "journal.jsonl") if e["event"] == "ledger"]
    assert run.ledger().device_seconds.sum() == pytest.approx(
        sum(line["device_seconds"] for line in ledger)  # type: ignore[index]
    )


def test_arms_and_pairs_are_those_of_results_json(root: Path) -> None:
    run, found = read_run(root), json.loads((root / "results.json").read_text())
    arms = run.arms()
    assert list(arms.index) == list(found["arms"])
    for name, arm in found["arms"].items():
        assert arms.loc[name, "metric.value"] == arm["metric"]["value"]
        assert arms.loc[name, "cost.request_usd.high"] == arm["cost"]["request_usd"]["high"]
    assert len(run.pairs()) == len(found["pairs"])
    assert run.results is not None and run.results.arms["lora"].train is not None


def test_a_run_without_results_says_what_to_type(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    run = read_run(tmp_path / "run")
    assert run.results is None and len(run.samples())
    with pytest.raises(DataError, match=r"python -m launch\.report"):
        run.arms()
    (tmp_path / "run" / "results.json").write_text("{")
    with pytest.raises(DataError, match="results as a report writes them"):
        read_run(tmp_path / "run")


def test_names_are_escaped_in_latex(root: Path) -> None:
    results = read_run(root).results
    assert results is not None
    nasty = r"50%_of $x$ & {y} \input{/etc/passwd} ~#^ <b>"
    failed = replace(results.arms["full"], status="failed", error="no")
    text = results_tex(replace(results, arms={nasty: results.arms["lora"], "full": failed}))
    assert r"50\%\_of \$x\$ \& \{y\} \textbackslash{}input\{/etc/passwd\}" in text
    assert r"full & \multicolumn{5}{l}{failed} \\" in text
    # Every row has six columns: what is left after the escaped ampersands are taken out.
    for line in text.splitlines()[3:]:
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert line.replace(r"\&", "").count("&") == 5
    lora = results.arms["lora"]
    assert lora.metric is not None and lora.metric.value is not None
    assert f"{100 * lora.metric.value:.1f} (" in text
    assert escaped("a\n\tb") == "a b"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on PATH")
def test_latex_compiles(root: Path, tmp_path: Path) -> None:
    results = read_run(root).results
    assert results is not None
    (tmp_path / "t.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
        f"{results_tex(results)}\\end{{document}}\n"
    )
    subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"],
        cwd=tmp_path,
        check=True,
        timeout=HANG_SECONDS,
    )
