"""Arms x tasks: two runs on different tasks in one table, with the numbers of their own reports."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from conf.errors import DataError
from evaluation import wording
from evaluation.records.run_records import RunRecords, read_run
from evaluation.report.task_table import are_of_several_tasks, task_table
from evaluation.results.summary import summarise
from launch.compare import main, paired, show_table
from tests.evaluation import fake_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecords]:
    root = tmp_path_factory.mktemp("runs")
    fake_run.write_spam_run(root / "spam", num_test=30)
    fake_run.write_orders_run(root / "orders", num_test=12)
    spam, orders = read_run(root / "spam"), read_run(root / "orders")
    spam = dataclasses.replace(spam, task={**spam.task, "sha256": "s"})
    return [spam, dataclasses.replace(orders, task={**orders.task, "sha256": "o"})]


def test_each_column_is_a_runs_own_numbers(runs: list[RunRecords]) -> None:
    table = task_table(runs)
    assert table.headings[0] == "arm"
    assert [h.partition(",")[0] for h in table.headings[1:]] == ["sms_spam", "orders"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert set(rows) == set(runs[0].arm_specs) | set(runs[1].arm_specs)
    for place, records in enumerate(runs):
        results = summarise(records)
        for name, cells in rows.items():
            if name not in results.arms:
                assert cells[place] == "-"
            elif results.arms[name].status != "done":
                assert cells[place] == results.arms[name].status == "failed"
            else:
                assert cells[place] == wording.share_with_interval(results.arms[name].metric)
                assert " to " in cells[place]


def test_two_runs_of_one_task_are_told_apart_by_their_names(runs: list[RunRecords]) -> None:
    again = dataclasses.replace(runs[0], name="again")
    headings = task_table([runs[0], again]).headings
    assert len(set(headings)) == 3 and "again" in headings[2]
    assert not are_of_several_tasks([runs[0], again])
    assert are_of_several_tasks(runs)


def test_it_is_printed_whole(runs: list[RunRecords]) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    show_table(task_table(runs), console)
    text = console.export_text()
    assert all(name in text for name in runs[0].arm_specs)
    assert "not comparable" in text


def test_runs_of_different_scoring_are_not_paired(runs: list[RunRecords]) -> None:
    with pytest.raises(DataError, match=r"task\.scoring"):
        paired(runs)


def test_the_command_takes_runs_of_several_tasks(
    runs: list[RunRecords], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([r.path for r in runs]) == 0
    with pytest.raises(DataError, match="at least two"):
        main([runs[0].path])
