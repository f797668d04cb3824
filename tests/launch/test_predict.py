"""Rows for a prediction: what is read, what is refused, and what is kept of a killed attempt."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from conf.groups import ColumnsConfig
from conf.records import SampleRecord
from evaluation.tasks import Task
from launch.predict import Kept, predict, read_items

COLUMNS = ColumnsConfig(input="body", context="page", choices="options")


def choice_task(task: Task) -> Task:
    return dataclasses.replace(task, kind=TaskKind.multiple_choice, labels=())


def context_task(task: Task) -> Task:
    rows = tuple(dataclasses.replace(i, context="a page") for i in task.items["train"])
    return dataclasses.replace(task, items={**task.items, "train": rows})


def test_csv_and_jsonl_give_the_same_items_and_no_label_is_read(
    topic_task: Task, tmp_path: Path
) -> None:
    rows = [("7", "My parcel, late"), ("8", 'a "quoted" one')]
    (tmp_path / "a.csv").write_text(
        'id,body,label\n7,"My parcel, late",secret\n8,"a ""quoted"" one",secret\n'
    )
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"id": i, "body": text, "label": "secret"}) + "\n" for i, text in rows)
    )
    found = [read_items(tmp_path / n, COLUMNS, topic_task) for n in ("a.csv", "a.jsonl")]
    assert found[0] == found[1]
    assert [(i.id, i.input, i.split) for i in found[0]] == [(a, b, "test") for a, b in rows]
    assert "secret" not in repr(found)


def test_rows_without_ids_are_numbered(topic_task: Task, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("body\none\ntwo\n")
    items = read_items(tmp_path / "a.csv", COLUMNS, topic_task)
    assert [i.id for i in items] == ["0", "1"]


def test_slices_are_the_rows_own(topic_task: Task, tmp_path: Path) -> None:
    train = tuple(
        dataclasses.replace(i, slices={"channel": "mail", "tier": "gold"})
        for i in topic_task.items["train"]
    )
    task = dataclasses.replace(topic_task, items={**topic_task.items, "train": train})
    (tmp_path / "a.csv").write_text("body,channel\none,phone\ntwo,\n")
    items = read_items(tmp_path / "a.csv", COLUMNS, task)
    assert [i.slices for i in items] == [{"channel": "phone"}, {}]


@pytest.mark.parametrize(
    ("text", "make", "expected"),
    [
        ("text\nhello\n", None, "column body"),
        ("body\nhello\n", context_task, "column page"),
        ("body\nhello\n", choice_task, "column options"),
        ("page\nhello\n", choice_task, "columns body, options"),
        ('body,options\nhello,"one"\n', choice_task, "two or more different choices"),
        ("body,options\nhello,one|one\n", choice_task, "two or more different choices"),
        ("body,id\n,3\n", None, "a text"),
        ("body,id\na,3\nb,3\n", None, "one row per id"),
    ],
)
def test_what_is_missing_is_named(
    text: str, make: object, expected: str, topic_task: Task, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text(text)
    task = make(topic_task) if callable(make) else topic_task
    with pytest.raises(DataError) as error:
        read_items(tmp_path / "a.csv", COLUMNS, task)
    assert expected in error.value.expected


def test_choices_are_each_rows_own(topic_task: Task, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("body,options\none,x|y\ntwo,p|q|r\n")
    items = read_items(tmp_path / "a.csv", COLUMNS, choice_task(topic_task))
    assert [i.choices for i in items] == [("x", "y"), ("p", "q", "r")]


def record(item_id: str) -> SampleRecord:
    return SampleRecord(arm="a", item_id=item_id, set="test", answer="x")


def test_answers_of_a_killed_attempt_are_kept_but_for_half_a_line(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    first = Kept(target, key="k")
    first.append(record("1"))
    first.append(record("2"))
    first.close()
    with (tmp_path / ".out.csv.answers.jsonl").open("a") as stream:
        stream.write('{"arm": "a", "item_')
    second = Kept(target, key="k")
    assert [r.item_id for r in second.records] == ["1", "2"]
    second.append(record("3"))
    second.close()
    third = Kept(target, key="k")
    assert [r.item_id for r in third.records] == ["1", "2", "3"]
    third.close()
    third.remove()
    assert list(tmp_path.iterdir()) == []


def test_answers_of_another_arm_or_file_are_not_used(tmp_path: Path) -> None:
    for key, kept in (("one", []), ("one", ["1"]), ("two", [])):
        with contextlib.closing(Kept(tmp_path / "out.csv", key=key)) as answers:
            assert [r.item_id for r in answers.records] == kept
            if not kept:
                answers.append(record("1"))


@pytest.mark.parametrize(
    "arguments",
    [[], ["run", "a.csv", "b.csv"], ["run", "arm=x", "a.csv"], ["r", "arm=x", "a", "b"]],
)
def test_a_wrong_command_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        predict(arguments)
