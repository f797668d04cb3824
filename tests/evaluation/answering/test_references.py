"""Reference arms: a bag of words, and given predictions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from conf.groups import EngineConfig, ModelConfig, TrainerConfig, ZeroConfig
from conf.methods import GivenMethod, Method, TfidfMethod
from conf.records import Item, LedgerLine, SampleRecord
from conf.resolve import Arm
from evaluation.answering.references import check_tfidf, given, read_given, reference, tfidf
from evaluation.tasks import Task


def samples(events: object) -> list[SampleRecord]:
    return [e for e in events if isinstance(e, SampleRecord)]  # type: ignore[attr-defined]


def test_a_bag_of_words_learns_the_topics(topic_task: Task) -> None:
    events = list(tfidf(topic_task))
    found = samples(events)
    tests = [s for s in found if s.set == "test"]
    assert len(tests) == 42 and sum(bool(s.is_correct) for s in tests) >= 40
    assert len([s for s in found if s.set == "validation"]) == 28
    latency = [s for s in found if s.set == "latency"]
    assert len(latency) == 42 and all(s.total_seconds for s in latency)
    assert all(s.total_seconds is None for s in tests)
    assert {s.answer for s in latency} <= set(topic_task.labels)
    for s in tests:
        best = max(s.label_logprobs or {}, key=lambda label: (s.label_logprobs or {})[label])
        assert s.answer == best and s.is_format_valid is None
    (line,) = (e for e in events if isinstance(e, LedgerLine))
    assert line.purpose == "reference" and line.tokens == 0 and line.device_seconds > 0


def test_it_is_deterministic_and_ignores_test_labels(topic_task: Task) -> None:
    def blind(item: Item) -> Item:
        return dataclasses.replace(item, label="billing")

    hidden = dataclasses.replace(
        topic_task,
        items={**topic_task.items, "test": tuple(map(blind, topic_task.items["test"]))},
    )
    first = [s.answer for s in samples(tfidf(topic_task)) if s.set == "test"]
    second = [s.answer for s in samples(tfidf(hidden)) if s.set == "test"]
    assert first == second


def test_a_label_with_one_example(topic_task: Task) -> None:
    train = topic_task.items["train"]
    few = [item for item in train if item.label == "billing"][:4]
    few += [item for item in train if item.label == "food"][:1]
    task = dataclasses.replace(topic_task, items={**topic_task.items, "train": tuple(few)})
    assert {s.answer for s in samples(tfidf(task))} <= {"billing", "food"}


def test_tfidf_is_for_classification(topic_task: Task) -> None:
    check_tfidf(topic_task, arm="tfidf")
    with pytest.raises(ConfigError, match="classification"):
        check_tfidf(dataclasses.replace(topic_task, kind=TaskKind.generation), arm="tfidf")


def write(path: Path, task: Task, *, drop: int = 0) -> Path:
    rows = [(i.id, i.label if k % 3 else "food") for k, i in enumerate(task.items["test"])][drop:]
    if path.suffix == ".csv":
        path.write_text("id,answer,extra\n" + "".join(f"{a},{b},x\n" for a, b in rows))
    else:
        lines = [json.dumps({"id": a, "answer": b}) for a, b in rows]
        path.write_text("\n".join([*lines, '{"id": "other", "answer": "x"}', ""]))
    return path


@pytest.mark.parametrize("name", ["given.csv", "given.jsonl"])
def test_given_predictions(tmp_path: Path, topic_task: Task, name: str) -> None:
    found = samples(given(write(tmp_path / name, topic_task), topic_task))
    wanted = [k % 3 != 0 or i.label == "food" for k, i in enumerate(topic_task.items["test"])]
    assert [s.is_correct for s in found] == wanted
    assert all(s.is_format_valid is None and s.total_seconds is None for s in found)


def test_json_answers_may_be_objects(tmp_path: Path, topic_task: Task) -> None:
    file = write(tmp_path / "a.jsonl", topic_task)
    first = topic_task.items["test"][0].id
    lines = file.read_text().splitlines()
    lines[0] = json.dumps({"id": first, "answer": {"a": 1}})
    file.write_text("\n".join(lines))
    assert read_given(file, topic_task)[first] == '{"a": 1}'


def test_missing_answers_are_counted(tmp_path: Path, topic_task: Task) -> None:
    with pytest.raises(DataError, match="5 of 42 test items, e.g. test-0, test-1, test-2"):
        list(given(write(tmp_path / "a.csv", topic_task, drop=5), topic_task))


BAD = {
    "a.csv": (b"name,answer\n1,2\n", "columns name, answer"),
    "b.jsonl": (b'{"id": 1\n', "b.jsonl:1"),
    "c.jsonl": (b"[1]\n", "JSON list"),
    "d.csv": (b"id,answer\nx,\xff\n", "UTF-8"),
    "e.csv": (b"id,answer\nx,1\nx,2\n", "e.csv:3"),
    "f.csv": (b"", "42 of 42"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(tmp_path: Path, topic_task: Task, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_given(tmp_path / name, topic_task)


def test_a_missing_file(tmp_path: Path, topic_task: Task) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_given(tmp_path / "none.csv", topic_task)


def test_by_arm(tmp_path: Path, topic_task: Task) -> None:
    def arm(name: str, method: Method) -> Arm:
        return Arm(
            name=name,
            method=method,
            model=ModelConfig(name="tiny"),
            engine=EngineConfig(name="scripted"),
            trainer=TrainerConfig(),
            zero=ZeroConfig(),
            is_same_base=True,
        )

    file = write(tmp_path / "a.csv", topic_task)
    for wanted in (arm("bag", TfidfMethod()), arm("now", GivenMethod(path=str(file)))):
        found = list(reference("job-1", wanted, task=topic_task))
        assert {s.arm for s in samples(found)} == {wanted.name}
        (line,) = (e for e in found if isinstance(e, LedgerLine))
        assert (line.job, line.arm) == ("job-1", wanted.name)
