"""Mixes: shares against brute force, each item once, nothing that judges, counts, refusals."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from conf.methods import InstructionMethod, SourceConfig
from conf.records import Item
from conf.resolve import Arm
from evaluation.mix import Mix, drawn, make_mix, mixed_rows, shared_out
from evaluation.mix.sources import MixSource
from evaluation.prepare import training_rows
from evaluation.prompts import PromptContext
from evaluation.prompts.rendering import Renderer
from evaluation.tasks import Task
from evaluation.tasks.duplicates import masked
from evaluation.tasks.held_out import HeldOut
from tests.evaluation.chat_models import make_arm, make_item, make_task, spam_items, write_model


def arm_of(prompt: str = "zero_shot", **method: Any) -> Arm:
    sources = {
        name: config if isinstance(config, SourceConfig) else SourceConfig(**config)
        for name, config in method.pop("sources").items()
    }
    arm = make_arm(prompt, is_tuned=True)
    return replace(arm, method=InstructionMethod(prompt=prompt, sources=sources, **method))


def mix_of(task: Task, *, task_source: str = "tests", **method: Any) -> Mix:
    return make_mix(arm_of(**method), task, task_source=task_source)


def pairs_file(path: Path, pairs: Sequence[tuple[str, str]]) -> str:
    path.write_text(json.dumps([{"prompt": p, "completion": c} for p, c in pairs]))
    return str(path)


@pytest.fixture
def renderer(tmp_path: Path) -> Renderer:
    return Renderer.load(write_model(tmp_path / "model"))


TARGET = {"target": {"source": "target"}, "wordings": {"source": "wordings"}}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9).map(float), st.integers(0, 30)), min_size=1, max_size=4),
    st.integers(1, 60),
)
def test_shares_against_handing_out_row_by_row(
    sources: list[tuple[float, int]], total: int
) -> None:
    """An independent way: each next row goes to the source that is furthest behind its weight."""
    weights = {f"s{i}": weight for i, (weight, _) in enumerate(sources)}
    most = {f"s{i}": size for i, (_, size) in enumerate(sources)}
    given_rows = dict.fromkeys(weights, 0)
    for _ in range(min(total, sum(most.values()))):
        open_ = [name for name in weights if given_rows[name] < most[name]]
        given_rows[min(open_, key=lambda n: (given_rows[n] + 0.5) / weights[n])] += 1
    found = shared_out(weights, total, most=most)
    assert sum(found.values()) == min(total, sum(most.values()))
    assert all(0 <= found[name] <= most[name] for name in weights)
    assert all(abs(found[name] - given_rows[name]) <= len(weights) for name in weights)


def test_shares_by_hand() -> None:
    weights = {"a": 3.0, "b": 3.0, "c": 2.0, "d": 1.0}
    wide = dict.fromkeys(weights, 1000)
    assert shared_out(weights, 300, most=wide) == {"a": 100, "b": 100, "c": 67, "d": 33}
    narrow = {**wide, "c": 20}
    assert shared_out(weights, 300, most=narrow) == {"a": 120, "b": 120, "c": 20, "d": 40}
    assert shared_out(weights, 99, most=dict.fromkeys(weights, 5)) == dict.fromkeys(weights, 5)


@pytest.mark.parametrize("train", [12, 13, 35, 101])
@pytest.mark.parametrize("weights", [(3.0, 3.0, 2.0), (3.0, 3.0, 4.0), (1.0, 7.0, 0.5)])
def test_by_default_every_training_item_comes_once(
    train: int, weights: tuple[float, float, float]
) -> None:
    items = {"train": spam_items(train), "validation": (make_item("v v"),), "test": ()}
    a, b, c = weights
    sources = {
        "target": {"source": "target", "weight": a},
        "wordings": {"source": "wordings", "weight": b},
        "instructions": {"source": "instructions", "weight": c},
    }
    mix = mix_of(make_task(items=items), sources=sources)
    ids = [
        item.id
        for source in mix.sources
        if source.is_target
        for item, _, _ in drawn(source, mix.num_rows[source.name], seed=mix.seed)
    ]
    assert Counter(ids) == Counter(item.id for item in items["train"])
    assert mix.num_labels == train
    assert abs(mix.num_rows["instructions"] - train * c / (a + b)) <= 1


@given(
    size=st.integers(1, 12),
    count=st.integers(0, 50),
    wordings=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_no_item_comes_again_before_all_have_come(
    size: int, count: int, wordings: int, seed: int
) -> None:
    context = PromptContext(instruction="i", kind=TaskKind.pairs, answer_word=lambda i: "a")
    source = MixSource(
        name="s", source="file", weight=1.0, items=spam_items(size), contexts=(context,) * wordings
    )
    found = list(drawn(source, count, seed=seed))
    assert len(found) == count
    assert [r for _, _, r in found] == [i // size for i in range(count)]
    for _, group in itertools.groupby(found, key=lambda one: one[2]):
        ids = [item.id for item, _, _ in group]
        assert len(set(ids)) == len(ids)
    assert [w for _, w, _ in found] == [i % wordings for i in range(count)]
    assert found == list(drawn(source, count, seed=seed))


def test_the_seed_changes_the_draw_and_the_hash() -> None:
    task = make_task()
    one, same, other = (mix_of(task, sources=TARGET, mix_seed=s) for s in (0, 0, 1))
    assert one.sha256 == same.sha256 != other.sha256
    assert mix_of(task, sources=TARGET, mix_size=7).sha256 != one.sha256


def test_a_small_source_is_repeated_so_often_and_no_more(tmp_path: Path) -> None:
    path = pairs_file(tmp_path / "p.json", [(f"say {i} in words", f"w{i}") for i in range(5)])
    sources = {"target": {"source": "target"}, "mine": {"path": path, "weight": 9.0}}
    task = make_task(items={"train": spam_items(40), "validation": (), "test": ()})
    mix = mix_of(task, sources=sources, mix_size=100, max_repeats=3)
    assert mix.num_rows == {"target": 85, "mine": 15}
    assert mix.num_asked == {"target": 10, "mine": 90}


def test_rows_are_the_rows_of_the_ordinary_arm_and_counts_add_up(
    renderer: Renderer, tmp_path: Path
) -> None:
    task = make_task(instructions=("Ham? Or spam?", "Mail: ham or spam."))
    path = pairs_file(tmp_path / "p.json", [("name a colour", "red"), ("count to two", "1 2")])
    arm = arm_of(sources={**TARGET, "mine": {"path": path, "weight": 0.5}})
    mix = make_mix(arm, task, task_source="tests")
    made = mixed_rows(mix, arm, renderer)
    plain = training_rows(task, make_arm(is_tuned=True), renderer)
    by_id = {row.item_id: row for row in plain.rows}
    texts = {s.source: [] for s in made.sources}  # type: ignore[var-annotated]
    for row in made.rows:
        source, item_id, _, _ = row.item_id.split(":")
        texts[source].append(renderer.decode(row.input_ids))
        if source == "target":
            assert row.input_ids == by_id[item_id].input_ids
            assert row.target_mask == by_id[item_id].target_mask
    assert {t for t in texts["wordings"] if "Ham? Or spam?" in t}
    assert {t for t in texts["wordings"] if "Mail: ham or spam." in t}
    assert not [t for t in texts["wordings"] if "Is it ham" in t]
    assert all("Answer the request." in t for t in texts["mine"])
    assert sum(s.num_rows for s in made.sources) == len(made.rows)
    assert sum(s.tokens for s in made.sources) == sum(len(r.input_ids) for r in made.rows)
    assert sum(s.target_tokens for s in made.sources) == sum(sum(r.target_mask) for r in made.rows)
    assert made.prompt_sha256 == plain.prompt_sha256
    assert [s.source for s in made.sources] == ["target", "wordings", "mine"]
    ids = [row.item_id.split(":")[0] for row in made.rows]
    assert ids == sorted(ids, key=list(texts).index)  # in the order of the sources
    assert len({row.item_id for row in made.rows}) == len(made.rows)


def test_rows_over_the_context_are_dropped_and_counted(renderer: Renderer, tmp_path: Path) -> None:
    pairs = [(f"tell me about thing {i}", "word") for i in range(39)]
    path = pairs_file(tmp_path / "p.json", [*pairs, ("far " * 600, "too long")])
    arm = arm_of(sources={"mine": {"path": path}})
    made = mixed_rows(make_mix(arm, make_task(), task_source="tests"), arm, renderer)
    (source,) = made.sources
    assert (source.num_rows, source.num_dropped, source.truncated_tokens) == (39, 1, 0)
    assert source.dropped_tokens > renderer.max_length
    path = pairs_file(tmp_path / "q.json", [("far " * 600, "x"), ("near", "y")])
    arm = arm_of(sources={"mine": {"path": path}})
    with pytest.raises(DataError, match=r"arms\.mine\.sources\.mine(.|\n)*1 of 2 rows over 512"):
        mixed_rows(make_mix(arm, make_task(), task_source="tests"), arm, renderer)


def test_test_and_validation_items_never_enter(tmp_path: Path) -> None:
    secret = "call the number on the card now"
    checked = "the parcel waits at the office door"
    items = {
        "train": spam_items(6),
        "validation": (make_item(checked, label="ham"),),
        "test": (make_item(secret, label="spam"), make_item("ok", label="ham")),
    }
    pairs = [
        (secret, "spam"),
        (f"Ham or spam?\n\n{secret.upper()}!!", "spam"),
        (f"Read this: {checked}. Is it spam?", "ham"),
        ("ok", "ham"),
        ("it is ok to ask", "yes"),
        ("it is ok to ask", "no"),
        ("call the number on the card", "later"),
    ]
    sources = {"mine": {"path": pairs_file(tmp_path / "p.json", pairs)}}
    (source,) = mix_of(make_task(items=items), sources=sources).sources
    assert [i.input for i in source.items] == ["it is ok to ask", "call the number on the card"]
    assert (source.num_held_out, source.num_duplicates) == (4, 1)


@given(
    st.lists(st.text("ab .", min_size=1, max_size=24).filter(str.strip), min_size=1, max_size=5),
    st.text("ab .", max_size=40).filter(str.strip),
)
def test_held_out_against_looking_at_every_place(held: list[str], text: str) -> None:
    def words(value: str) -> list[str]:
        return masked(value).split()

    def is_in(short: list[str], long: list[str]) -> bool:
        if short == long:
            return True
        places = range(len(long) - len(short) + 1)
        return len(short) >= 4 and any(long[p : p + len(short)] == short for p in places)

    found = HeldOut(make_item(h) for h in held).has(make_item(text))
    assert found == any(is_in(words(h), words(text)) for h in held)


def test_sources_left_out_say_why() -> None:
    task = make_task()
    sources = {**TARGET, "sms_spam": {"source": "sms_spam"}, "mine": {}}
    mix = mix_of(task, task_source="sms_spam", sources=sources, prompt="bare")
    notes = {s.name: s.note for s in mix.sources}
    assert notes == {
        "target": "",
        "wordings": "prompt=bare shows no instruction",
        "sms_spam": "it is the target task",
    }
    assert mix.num_rows == {"target": 12, "wordings": 0, "sms_spam": 0}


def test_another_task_brings_its_training_split_and_words() -> None:
    sources = {"orders": {"source": "orders"}, "sms": {"source": "sms_spam"}}
    mix = mix_of(make_task(), sources=sources)
    from evaluation.tasks import load_task
    from evaluation.tasks.orders import SIZES
    from launch.compose import compose_config

    by_name = {s.name: s for s in mix.sources}
    assert len(by_name["orders"].items) == SIZES["train"]
    sms = load_task(compose_config(["task=sms_spam", "task.is_balanced=false"]).task)
    tests = {i.sha256 for split in ("test", "validation") for i in sms.items[split]}
    assert not tests & {i.sha256 for i in by_name["sms"].items}
    assert "ham or spam" in by_name["sms"].contexts[0].instruction
    assert mix.num_labels == 0  # the embedded sets cost the user no label


@pytest.mark.parametrize(
    ("rows", "where", "found"),
    [
        ('[{"prompt": "a b", "completion": ""}]', r"p\.json\[0\]", "empty cell"),
        ('[{"prompt": "a b", "completion": "c"}, {"prompt": "d"}]', r"p\.json\[1\]", "empty cell"),
        ('[{"question": "a", "reply": "b"}]', r"p\.json", "columns question"),
        ("[{]", r"p\.json:1", ""),
    ],
)
def test_bad_files_are_refused_with_their_place(
    tmp_path: Path, rows: str, where: str, found: str
) -> None:
    path = tmp_path / "p.json"
    path.write_text(rows)
    with pytest.raises(DataError, match=rf"{where}(.|\n)*{found}") as refusal:
        mix_of(make_task(), sources={"mine": {"path": str(path)}})
    if "columns" in found:
        assert "arms.mine.sources.mine.columns.prompt=NAME" in str(refusal.value)


def test_bad_sources_are_refused() -> None:
    with pytest.raises(DataError, match="no such file"):
        mix_of(make_task(), sources={"mine": {"path": "nowhere.json"}})
    with pytest.raises(ConfigError, match=r"sources\.mine\.source(.|\n)*no_such(.|\n)*sms_spam"):
        mix_of(make_task(), sources={"mine": {"source": "no_such"}})
    with pytest.raises(ConfigError, match=r"sources\.mine\.path"):
        mix_of(make_task(), sources={"mine": {"instruction": "Say it."}})
    with pytest.raises(ConfigError, match="no source with rows"):
        mix_of(make_task(), sources={"mine": {}})
    for weight in (0.0, -1.0):
        with pytest.raises(ConfigError, match=r"weight(.|\n)*~arms"):
            SourceConfig(weight=weight)


def test_made_wordings_keep_the_instruction() -> None:
    (source,) = mix_of(make_task(), sources={"w": {"source": "wordings"}}).sources
    texts = [context.instruction for context in source.contexts]
    assert len(set(texts)) == 3
    assert all("Is it ham or spam?" in t and t != "Is it ham or spam?" for t in texts)


def test_items_of_a_source_keep_their_answers(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("input,label\ngood film,fine_work\nbad film,poor\nnice film,fine_work\n")
    (source,) = mix_of(make_task(), sources={"mine": {"path": str(path)}}).sources
    (context,) = source.contexts
    item: Item = source.items[0]
    assert context.answer_word(item) == "fine work"
    assert context.instruction == "Classify the text. Answer with exactly one of: fine work, poor."
    assert mix_of(make_task(), sources={"mine": {"path": str(path)}}).num_labels == 3
