"""Built-in styles, the drawing of shots, and a style that a user adds from a file."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.choices import ShotSelection, TaskKind
from conf.errors import ConfigError, DataError
from conf.records import Item
from evaluation.plugins import STYLES, load_plugins
from evaluation.prompts import (
    Ask,
    PromptContext,
    Style,
    Think,
    draw_shots,
    first_ask,
    first_call,
    get_style,
    item_text,
    letter,
    style_sha256,
)
from evaluation.prompts.rendering import Renderer
from tests.evaluation.chat_models import make_item, make_task, spam_items, write_model

SHOTS = spam_items(2, rationale="It says so.")
CONTEXT = PromptContext(
    instruction="Ham or spam?",
    kind=TaskKind.classification,
    labels=("HAM", "SPAM"),
    shots=SHOTS,
    answer_word=lambda item: item.answer_key.upper(),
)
ITEM = make_item("win money", label="spam", rationale="It promises money.")


def calls_of(style: Style, item: Item, context: PromptContext, *replies: str) -> list[Ask | Think]:
    """All calls of a style, each answered by the next reply; the last reply is what it returns."""
    calls: list[Ask | Think] = []
    generator = style(item, context)
    calls.append(next(generator))
    for reply in replies[:-1]:
        calls.append(generator.send(reply))
    with pytest.raises(StopIteration) as end:
        generator.send(replies[-1])
    assert end.value.value == replies[-1]
    return calls


def turns(call: Ask | Think) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in call.messages]


def test_zero_shot_is_instruction_and_item() -> None:
    (call,) = calls_of(get_style("zero_shot"), ITEM, CONTEXT, "SPAM")
    assert turns(call) == [("system", "Ham or spam?"), ("user", "win money")]
    assert isinstance(call, Ask) and call.prefix == ""


def test_few_shot_shows_shots_as_turns_before_the_item() -> None:
    (call,) = calls_of(get_style("few_shot"), ITEM, CONTEXT, "SPAM")
    assert turns(call) == [
        ("system", "Ham or spam?"),
        ("user", "message number 0"),
        ("assistant", "HAM"),
        ("user", "message number 1"),
        ("assistant", "SPAM"),
        ("user", "win money"),
    ]


def test_chain_of_thought_thinks_then_asks_in_the_same_turn() -> None:
    thought = " Money is\n promised. So the answer is ham, or"
    think, ask = calls_of(get_style("chain_of_thought"), ITEM, CONTEXT, thought, "SPAM")
    assert isinstance(think, Think) and think.max_new_tokens == CONTEXT.max_thought_tokens
    assert isinstance(ask, Ask) and ask.messages == think.messages
    assert (
        ask.prefix == "Let's think step by step. Money is promised. So the answer is"
    ) and ask.prefix.startswith(think.prefix)
    assert "step by step" in think.messages[0].content
    assert turns(think)[2][1] == "Let's think step by step. It says so. So the answer is HAM"


def test_an_empty_thought_leaves_no_double_space() -> None:
    _, ask = calls_of(get_style("chain_of_thought"), ITEM, CONTEXT, " \n", "SPAM")
    assert ask.prefix == "Let's think step by step. So the answer is"


@pytest.mark.parametrize("kind", [kind for kind in TaskKind if kind is not TaskKind.auto])
def test_role_play_puts_a_persona_first(kind: TaskKind) -> None:
    (call,) = calls_of(get_style("role_play"), ITEM, replace(CONTEXT, kind=kind), "SPAM")
    system = call.messages[0].content
    assert system.startswith("You are ") and system.endswith("Ham or spam?")
    own = replace(CONTEXT, kind=kind, persona="You are a pirate.")
    (call,) = calls_of(get_style("role_play"), ITEM, own, "SPAM")
    assert call.messages[0].content == "You are a pirate. Ham or spam?"


def test_bare_is_the_input_only() -> None:
    (call,) = calls_of(get_style("bare"), ITEM, CONTEXT, "SPAM")
    assert turns(call) == [("system", ""), ("user", "win money")]


def test_item_text_has_context_input_and_lettered_choices() -> None:
    item = make_item("Which?", context="A text.", choices=("one", "two"), label="one")
    assert item_text(item) == "A text.\nWhich?\nA. one\nB. two"
    assert [letter(i) for i in (0, 25, 26, 27, 52)] == ["A", "Z", "AA", "AB", "BA"]


@pytest.mark.parametrize("name", ["zero_shot", "few_shot", "chain_of_thought", "role_play", "bare"])
def test_prompts_of_two_items_share_all_but_the_item(tmp_path: Path, name: str) -> None:
    renderer = Renderer.load(write_model(tmp_path))
    texts = []
    for item in (make_item("aaa", label="ham"), make_item("bbb", label="spam")):
        call = first_call(get_style(name), item, CONTEXT)
        texts.append(renderer.render(call.messages, call.prefix))
    before_a, before_b = texts[0].split("aaa")[0], texts[1].split("bbb")[0]
    assert before_a == before_b
    assert texts[0].count("aaa") == texts[1].count("bbb") == 1
    assert texts[0].replace("aaa", "bbb") == texts[1]


def test_first_ask_thinks_with_the_rationale_or_refuses() -> None:
    style = get_style("chain_of_thought")
    assert "It promises money." in first_ask(style, ITEM, CONTEXT).prefix
    assert first_ask(get_style("few_shot"), ITEM, CONTEXT).prefix == ""
    for rationale in (None, " "):
        with pytest.raises(DataError, match="rationale"):
            first_ask(style, replace(ITEM, rationale=rationale), CONTEXT)


def test_an_unknown_style_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="few_shot") as refusal:
        get_style("few_shots", key="arms.mine.prompt")
    assert refusal.value.where == "arms.mine.prompt"


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    draw=st.integers(0, 3),
    data=st.data(),
)
def test_balanced_shots(counts: list[int], draw: int, data: st.DataObject) -> None:
    pool = tuple(
        make_item(f"{label}-{i}", label=str(label))
        for label, count in enumerate(counts)
        for i in range(count)
    )
    labels = tuple(str(label) for label in range(len(counts)))
    task = make_task(labels=labels, items={"train": pool})
    wanted = data.draw(st.integers(0, len(pool)))
    shots = draw_shots(task, num_shots=wanted, draw=draw)
    assert len({shot.id for shot in shots}) == len(shots) == wanted
    drawn = Counter(shot.label for shot in shots)
    for a, available in enumerate(counts):
        for b in range(len(counts)):  # no label has two more than one that has items left
            is_left = drawn[str(b)] < counts[b]
            assert not (is_left and drawn[str(a)] > drawn[str(b)] + 1), (available, drawn)
    shuffled = make_task(labels=labels, items={"train": tuple(reversed(pool))})
    assert draw_shots(shuffled, num_shots=wanted, draw=draw) == shots


def test_draws_differ_and_orders_are_mixed() -> None:
    task = make_task(items={"train": spam_items(40)})
    for selection in (ShotSelection.balanced, ShotSelection.random):
        draws = [
            tuple(s.id for s in draw_shots(task, num_shots=8, selection=selection, draw=draw))
            for draw in range(20)
        ]
        assert len(set(draws)) == 20
    last = {draw_shots(task, num_shots=8, draw=draw)[-1].label for draw in range(20)}
    assert last == {"ham", "spam"}


def test_too_many_shots_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most the 12 items"):
        draw_shots(make_task(), num_shots=13)


PLUGIN = '''
from evaluation.plugins import prompt_style
from evaluation.prompts import Ask, Think, conversation


@prompt_style("two_steps")
def two_steps(item, context):
    """Ask for a summary first, then for the label of the summary."""
    messages = conversation(item, system="Summarise in five words.")
    summary = yield Think(messages, max_new_tokens=12)
    question = f"{context.instruction} Labels: {', '.join(context.labels)}."
    messages = conversation(item, system=question, layout=lambda item: summary)
    answer = yield Ask(messages, prefix="It is")
    return answer
'''


def test_a_style_from_a_users_file_end_to_end(tmp_path: Path) -> None:
    """A file outside the repository, 20 lines at most, from its path to rendered text."""
    assert len(PLUGIN.strip().splitlines()) <= 20
    path = tmp_path / "my_study.py"
    path.write_text(PLUGIN)
    assert load_plugins([path]) == load_plugins([str(path)])
    assert "two_steps" in STYLES
    think, ask = calls_of(get_style("two_steps"), ITEM, CONTEXT, "money, money", "SPAM")
    renderer = Renderer.load(write_model(tmp_path / "model"))
    assert renderer.render(think.messages, think.prefix) == (
        "<|im_start|>system\nSummarise in five words.<|im_end|>\n"
        "<|im_start|>user\nwin money<|im_end|>\n<|im_start|>assistant\n"
    )
    assert renderer.render(ask.messages, ask.prefix) == (
        "<|im_start|>system\nHam or spam? Labels: HAM, SPAM.<|im_end|>\n"
        "<|im_start|>user\nmoney, money<|im_end|>\n<|im_start|>assistant\nIt is"
    )


@pytest.mark.parametrize("body", ["return ['no call']", "yield 'no call'", "if 0: yield"])
def test_a_style_that_yields_no_call_is_refused(body: str) -> None:
    names: dict[str, Style] = {}
    exec(f"def broken(item, context):\n    {body}", names)
    with pytest.raises(ConfigError, match="yield Ask"):
        first_call(names["broken"], ITEM, CONTEXT)


def test_a_styles_hash_is_its_name_or_its_files_content(tmp_path: Path) -> None:
    path = tmp_path / "p.md"
    path.write_text("# layout\n{{ input }}")
    first = style_sha256(str(path))
    path.write_text("# layout\nSay: {{ input }}")
    assert len({first, style_sha256(str(path)), style_sha256("bare"), style_sha256("x")}) == 4
