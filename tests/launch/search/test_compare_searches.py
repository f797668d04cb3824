"""launch.compare over sweeps, searched runs and single runs, from their records alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import sweep_report
from launch.compare import main, pair_table, paired, read_runs, runs_of, searches_of
from launch.sweep_report import Sweep, SweepRun
from tests.evaluation import fake_run, fake_search

ARMS = {name: fake_run.SPAM_ARMS[name] for name in ("zero_shot", "lora")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single run, and a sweep of two runs of which the second was searched."""
    root = tmp_path_factory.mktemp("outputs")
    for name in ("single", "first"):
        fake_run.write_spam_run(root / name, arms=ARMS, num_test=40)
    fake_search.write_searched_run(root / "second", num_test=40)
    for path in (root / "single", root / "first", root / "second"):
        config = json.loads((path / "config.json").read_text())
        config["config"]["run"]["name"] = path.name
        (path / "config.json").write_text(json.dumps(config))
    return root


def sweep_of(root: Path) -> Sweep:
    runs = tuple(
        SweepRun(
            number=number,
            swept=(("task.seed", str(number)),),
            path=root / name,
            command="",
            exit_code=0,
            keys={"zero_shot": f"{number}z", "lora": f"{number}l"},
        )
        for number, name in enumerate(("first", "second"), start=1)
    )
    return Sweep(name="sweep-x", command="launch -m", path=root / "sweep-x", runs=runs)


def test_a_sweep_stands_for_its_runs_and_compares_with_a_single_run(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "260")
    sweep_report.write(sweep_of(root))
    paths = [root / "sweep-x", root / "single"]
    assert runs_of(paths) == [root / "first", root / "second", root / "single"]
    pairs = paired(read_runs(runs_of(paths)))
    met = {frozenset((p.a.split("/")[0], p.b.split("/")[0])) for p in pairs}
    assert met == {
        frozenset(two) for two in (("first", "second"), ("first", "single"), ("second", "single"))
    }
    assert all(p.n == 40 for p in pairs)
    assert main(paths) == 0
    shown = capsys.readouterr().out
    assert "Searches" in shown and "second/lora (lora_rank=" in shown
    assert "single/lora (" not in shown and "136,300" in shown  # tokens of all 16 trials


def test_the_pairs_of_a_searched_arm_name_its_setting_and_its_bill_is_the_trials(
    root: Path,
) -> None:
    runs = read_runs([root / "second", root / "single"])
    searches = searches_of(runs)
    assert set(searches) == {"second/few_shot", "second/lora"}
    search = searches["second/lora"]
    assert search.totals.tokens == sum(t.tokens for t in search.trials) > 0
    assert search.totals.usd is not None and search.totals.usd > 0
    pairs = paired(runs)
    plain, named = pair_table(pairs), pair_table(pairs, searches=searches)
    label = search.chosen.label if search.chosen else ""
    for before, after in zip(plain.rows, named.rows, strict=True):
        assert before[2:] == after[2:]
        for old, new in zip(before[:2], after[:2], strict=True):
            assert new == (f"{old} ({label})" if old == "second/lora" else new)
            assert new.startswith(old)


def test_the_report_of_a_sweep_shows_the_searches_of_its_runs(root: Path) -> None:
    tables = dict(sweep_report.write(sweep_of(root)))
    rows = {row[0]: row for row in tables["Searches"].rows}
    assert set(rows) == {"2/few_shot", "2/lora"}
    text = (root / "sweep-x" / "report.md").read_text()
    assert "## Searches" in text and "lora\\_rank=" in text
    page = (root / "sweep-x" / "report.html").read_text()
    assert "<script" not in page and "lora_rank=" in page
