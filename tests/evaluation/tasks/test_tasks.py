"""Kinds, scoring, instructions, words, slices, hashes, facts, and the shipped examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from conf.groups import ColumnsConfig, LimitConfig, TaskConfig
from conf.schema import RunConfig, register
from evaluation.tasks import Task, load_task
from evaluation.tasks.defaults import as_object, is_number, plain_words


def load(tmp_path: Path, rows: list[dict[str, Any]], **keys: Any) -> Task:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return load_task(TaskConfig(name="t", path=str(path), **keys))


def rows(**columns: Any) -> list[dict[str, Any]]:
    """60 rows; a column is a constant, a list to cycle through, or a template with {i}."""

    def cell(value: Any, i: int) -> Any:
        if isinstance(value, tuple):
            return value[i % len(value)]
        return value.format(i=i) if isinstance(value, str) else value

    return [{name: cell(value, i) for name, value in columns.items()} for i in range(60)]


# --- kinds --------------------------------------------------------------------------------------

CHOICES = ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("columns", "kind", "scoring"),
    [
        ({"input": "t {i}", "label": ("a", "b")}, "classification", "exact"),
        ({"prompt": "t {i}", "completion": "done {i}"}, "pairs", "exact"),
        (
            {"input": "t {i}", "choices": (CHOICES,), "label": ("red", "blue")},
            "multiple_choice",
            "exact",
        ),
        ({"input": "t {i}", "choices": "red|blue", "target": "red"}, "multiple_choice", "exact"),
        ({"input": "t {i}", "target": "a whole sentence {i}"}, "generation", "rouge_l"),
        (
            {"input": "t {i}", "context": "c", "target": "a whole sentence {i}"},
            "generation",
            "token_f1",
        ),
        ({"input": "t {i}", "target": "1,2{i}5"}, "generation", "exact"),
        ({"input": "t {i}", "target": ("7", "-3.5", "1,200", "$4")}, "generation", "numeric"),
        ({"input": "t {i}", "target": (7, 8.5)}, "generation", "numeric"),
        ({"input": "t {i}", "target": ({"a": 1}, {"b": [2]})}, "generation", "json"),
        ({"input": "t {i}", "target": ('{"a": 1}', "{}")}, "generation", "json"),
        ({"input": "t {i}", "label": ("a", "b"), "target": "x"}, "generation", "exact"),
    ],
)
def test_kind_and_scoring_by_columns(
    tmp_path: Path, columns: dict[str, Any], kind: str, scoring: str
) -> None:
    task = load(tmp_path, rows(**columns))
    assert (task.kind.name, task.scoring) == (kind, scoring)
    item = task.items["test"][0]
    assert (item.label is None) == (kind in ("generation", "pairs"))
    assert (item.label is None) != (item.target is None)


def test_named_label_wins_over_a_stray_target(tmp_path: Path) -> None:
    data = rows(input="t {i}", category=("a", "b"), target="x {i} y z w")
    task = load(tmp_path, data, columns=ColumnsConfig(label="category"))
    assert task.kind is TaskKind.classification and task.items["test"][0].target is None


def test_multiple_choice_items(tmp_path: Path) -> None:
    texts = ('["red", "blue"]', "red|blue", ["red", "blue"])
    task = load(tmp_path, rows(input="t {i}", choices=texts, label="red"))
    item = task.items["test"][0]
    assert task.labels == () and task.candidates(item) == ("red", "blue")
    assert task.word("red") == "red" and item.answer_key == "red"


def test_choices_and_context_are_part_of_the_content(tmp_path: Path) -> None:
    data = rows(input="same question", context="passage {i}", target="answer")
    assert sum(map(len, load(tmp_path, data).items.values())) == 60
    data = rows(input="same question", choices="yes|no {i}", label="yes")
    task = load(tmp_path, data)
    assert sum(map(len, task.items.values())) == 60
    assert len({i.sha256 for items in task.items.values() for i in items}) == 60


def test_near_duplicates_want_the_same_context(tmp_path: Path) -> None:
    data = rows(input="who won the match", context="passage {i}", target="we")
    assert load(tmp_path, data).facts.num_near_duplicates == 0
    data = rows(input="Who won match {i}?", context="passage", target="we")
    assert load(tmp_path, data).facts.num_near_duplicates == 59


def test_references_and_rationale(tmp_path: Path) -> None:
    data = rows(
        input="t {i}", target="4", references=(["4", "four"], "4|four"), rationale="2 + 2 = 4"
    )
    item = load(tmp_path, data).items["train"][0]
    assert item.references == ("4", "four") and item.rationale == "2 + 2 = 4"


# --- defaults -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("reverted_card_payment?", "reverted card payment"),
        ("AddToPlaylist", "add to playlist"),
        ("ham", "ham"),
        ("True", "True"),
        ("XMLFile_URL", "XML file URL"),
        ("physical-appearance", "physical-appearance"),
        ("C++", "C++"),
        ("spam?", "spam?"),
        ("not spam", "not spam"),
    ],
)
def test_plain_words(label: str, words: str) -> None:
    assert plain_words(label) == words


def test_label_words(tmp_path: Path) -> None:
    data = rows(input="t {i}", label=("pin_blocked", "lost_card"))
    task = load(tmp_path, data, label_words={"pin_blocked": "PIN"})
    assert task.label_words == {"lost_card": "lost card", "pin_blocked": "PIN"}
    assert task.word("lost_card") == "lost card"
    assert "lost card, PIN" in task.instruction
    clash = load(tmp_path, rows(input="t {i}", label=("lost_card", "LostCard")))
    assert clash.label_words == {"LostCard": "LostCard", "lost_card": "lost_card"}
    for bad in ({"none": "x"}, {"pin_blocked": " "}, {"pin_blocked": "lost card"}):
        with pytest.raises(ConfigError, match="task.label_words"):
            load(tmp_path, data, label_words=bad)


def test_labels_keep_the_order_given(tmp_path: Path) -> None:
    data = rows(input="t {i}", label=("a", "b"))
    task = load(tmp_path, data, labels=["b", "a", "never"])
    assert task.labels == ("b", "a", "never")
    assert task.facts.label_counts["test"]["never"] == 0
    with pytest.raises(ConfigError, match="task.labels"):
        load(tmp_path, rows(input="t {i}", target="x"), labels=["x"])


def test_instructions(tmp_path: Path) -> None:
    data = rows(input="t {i}", label=("a", "b"))
    assert (
        load(tmp_path, data).instruction == "Classify the text. Answer with exactly one of: a, b."
    )
    own = load(tmp_path, data, instruction="Do it.", instructions=["Do it now."])
    assert (own.instruction, own.instructions) == ("Do it.", ("Do it now.",))
    by_json = load(tmp_path, rows(input="t {i}", target={"item": 1, "city": "x"}))
    assert "JSON object with the fields item, city" in by_json.instruction
    assert "number" in load(tmp_path, rows(input="t {i}", target="5")).instruction


def test_numbers_and_objects() -> None:
    for text in ("5", "-1.5", "1,000,000", "$3", "40%", "\u20ac 2.50", ".5"):
        assert is_number(text), text
    for text in ("", "five", "1,00", "1.2.3", "-", "%", "3 cups", "12/05"):
        assert not is_number(text), text
    assert as_object('{"a": 1}') == {"a": 1}
    assert as_object("[1]") is None and as_object("{a}") is None


def test_unknown_scoring_and_source(tmp_path: Path) -> None:
    data = rows(input="t {i}", target="x")
    with pytest.raises(ConfigError, match="rouge_l") as caught:
        load(tmp_path, data, scoring="rouge")
    assert caught.value.where == "task.scoring"
    with pytest.raises(ConfigError, match="orders"):
        load_task(TaskConfig(name="t", source="order"))
    assert load(tmp_path, data, scoring="chrf").scoring == "chrf"


def test_strict_balance_wants_room_for_every_label(tmp_path: Path) -> None:
    data = rows(input="t {i}", label=("a", "b", "c"))
    with pytest.raises(ConfigError, match="at least 3") as caught:
        load(tmp_path, data, is_balanced=True, limit=LimitConfig(test=2))
    assert caught.value.where == "task.limit.test"


# --- slices, hashes, schema ---------------------------------------------------------------------


def test_slices(tmp_path: Path) -> None:
    data = rows(
        input="t {i}",
        label=("a", "b"),
        channel=("mail", "chat", None),
        constant="x",
        unique="u {i}",
        note=("a long text that is no category at all, really", "short"),
        tags=(["p"], ["q"]),
        level=(1, 2),
    )
    items = [i for found in load(tmp_path, data).items.values() for i in found]
    assert {name for i in items for name in i.slices} == {"channel", "level"}
    assert {i.slices.get("channel") for i in items} == {"mail", "chat", None}
    assert {i.slices["level"] for i in items} == {"1", "2"}


def test_label_beside_a_target_is_a_slice(tmp_path: Path) -> None:
    item = load(tmp_path, rows(input="t {i}", label=("a", "b"), target="x")).items["train"][0]
    assert item.answer_key == "x" and item.slices["label"] in ("a", "b")


def test_hash_follows_what_matters(tmp_path: Path) -> None:
    data = rows(input="t {i}", label=("a", "b"))
    base = load(tmp_path, data)
    assert base.sha256 == load(tmp_path, data).sha256
    changed = [{**data[0], "label": "b"}, *data[1:]]
    others = [
        load(tmp_path, changed),
        load(tmp_path, data, instruction="Else."),
        load(tmp_path, data, scoring="token_f1"),
        load(tmp_path, data, label_words={"a": "A"}),
        load(tmp_path, data, seed=1),
        load(tmp_path, data, limit=LimitConfig(test=5)),
    ]
    assert len({base.sha256, *(task.sha256 for task in others)}) == 7


def test_ids(tmp_path: Path) -> None:
    made = load(tmp_path, rows(input="t {i}", label=("a", "b")))
    ids = [i.id for items in made.items.values() for i in items]
    assert len(set(ids)) == 60
    given = load(
        tmp_path, rows(nr="n{i}", input="t {i}", label=("a", "b")), columns=ColumnsConfig(id="nr")
    )
    assert {i.id for items in given.items.values() for i in items} == {f"n{i}" for i in range(60)}


def test_conflicts_and_duplicates_are_counted(tmp_path: Path) -> None:
    data = rows(input="t {i}", label=("a", "b"))
    extra = [{"input": "T  3", "label": "a"}, {"input": "t 5", "label": "b"}]
    facts = load(tmp_path, data + extra).facts
    assert (facts.num_rows, facts.num_exact_duplicates, facts.num_conflicting_labels) == (62, 2, 1)
    assert facts.num_removed == 2 and facts.num_near_duplicates == 59


def test_counting_is_skipped_for_many_rows_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.tasks.MAX_ROWS_COUNTED", 59)
    data = rows(input="t {i}", label=("a", "b"))
    assert load(tmp_path, data).facts.num_near_duplicates is None
    with pytest.raises(DataError, match="60 rows, and no (train|validation) item"):
        load(tmp_path, data, near_duplicates="remove")  # asked for, so it runs: one content is left


SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}


def test_schema_of_the_user(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    data = rows(input="t {i}", target='{{"n": {i}}}')
    task = load(tmp_path, data, json_schema=str(schema))
    assert task.json_schema == SCHEMA
    data[7]["target"] = {"n": "seven"}
    with pytest.raises(DataError, match=r"'seven' is not of type 'integer' \(1 such"):
        load(tmp_path, data, json_schema=str(schema))
    for bad, found in (
        ("{", "Expecting"),
        ("[]", "no JSON object"),
        ('{"type": "nonsense"}', "nonsense"),
        ('{"$ref": "https://example.org/x.json"}', "example.org"),
        ('{"allOf": [{"$ref": "file:///x.json"}]}', "file:"),
    ):
        schema.write_text(bad)
        with pytest.raises(ConfigError) as caught:
            load(tmp_path, rows(input="t {i}", target="x"), json_schema=str(schema))
        assert caught.value.where == "task.json_schema" and found in caught.value.found


# --- the examples that ship ---------------------------------------------------------------------


def compose_example(name: str) -> RunConfig:
    register()
    with initialize_config_module("conf", version_base="1.3"):
        composed = compose("config", overrides=[f"+exp={name}"])
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    return config


EXAMPLES = {
    "example_translation": ("generation", "chrf", {"zero_shot", "few_shot"}),
    "example_support_agent": ("classification", "exact", {"zero_shot", "role_play"}),
    "example_instructions": ("pairs", "rouge_l", {"zero_shot", "lora"}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # works from any current directory
    config = compose_example(name)
    task = load_task(config.task)
    kind, scoring, arms = EXAMPLES[name]
    assert (task.kind.name, task.scoring, set(config.arms)) == (kind, scoring, arms)
    assert min(map(len, task.items.values())) >= 12 and len(task.items["test"]) >= 20
    assert task.name == name.removeprefix("example_")
    assert task.facts.num_exact_duplicates == 0


def test_example_translation_asks_the_question() -> None:
    config = compose_example("example_translation")
    asked = {i.input: i.target for i in load_task(config.task).items["test"]}
    assert asked["How are you?"] == "Comment allez-vous ?"
    assert config.arms["few_shot"].num_shots == 2  # type: ignore[attr-defined]


def test_example_support_agent_covers_every_team() -> None:
    config = compose_example("example_support_agent")
    counts = load_task(config.task).facts.label_counts
    assert set(counts["test"]) == {"refund", "delivery", "repair", "account"}
    assert min(counts["test"].values()) >= 5 and min(counts["train"].values()) >= 8
    assert "support agent" in config.arms["role_play"].persona  # type: ignore[attr-defined]
