"""The user's prompt file: what it can say, and what is refused with file and line."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from evaluation.prompts import Ask, PromptContext, first_call, get_style
from tests.evaluation.chat_models import make_item, spam_items

CONTEXT = PromptContext(
    instruction="Ham or spam?",
    kind=TaskKind.classification,
    labels=("ham", "spam"),
    shots=spam_items(1),
    answer_word=lambda item: item.answer_key,
)
ITEM = make_item(
    "win {{ money }}",
    label="spam",
    context="Inbox.",
    choices=("yes", "no"),
    slices={"language": "en"},
)


def ask_of(directory: Path, text: str, *, context: PromptContext = CONTEXT) -> Ask:
    path = directory / "prompt.md"
    path.write_text(text, encoding="utf-8")
    call = first_call(get_style(str(path)), ITEM, context)
    assert isinstance(call, Ask)
    return call


def refusal_of(directory: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as refusal:
        ask_of(directory, text)
    return refusal.value


def test_all_sections_with_placeholders(tmp_path: Path) -> None:
    context = replace(CONTEXT, shots=())
    ask = ask_of(
        tmp_path,
        "# System\nYou sort mail. {{ instruction }}\n\n## Notes\nBe brief.\n"
        '# instruction\nOne of: {{ labels | join(" or ") }}.\n'
        "# layout\n{% if context %}{{ context }} {% endif %}"
        "{{ slices.language | upper }}: {{ input }}\n"
        "{% for c in choices %}{{ loop.index }}) {{ c }}\n{% endfor %}{{ choices[0] }}\n",
        context=context,
    )
    system, user = ask.messages
    assert system.content == "You sort mail. One of: ham or spam.\n\n## Notes\nBe brief."
    assert user.content == "Inbox. EN: win {{ money }}\n1) yes\n2) no\nyes"


def test_shots_are_shown_in_the_same_layout(tmp_path: Path) -> None:
    ask = ask_of(tmp_path, "# layout\nMail: {{ input }}")
    assert [(m.role, m.content) for m in ask.messages] == [
        ("system", "Ham or spam?"),
        ("user", "Mail: message number 0"),
        ("assistant", "ham"),
        ("user", "Mail: win {{ money }}"),
    ]


def test_an_instruction_that_nothing_prints_follows_the_system_text(tmp_path: Path) -> None:
    assert ask_of(tmp_path, "# system\nBe kind.").messages[0].content == "Be kind.\n\nHam or spam?"
    asked = ask_of(tmp_path, "# system\nBe kind.\n# instruction\nSort it.")
    assert asked.messages[0].content == "Be kind.\n\nSort it."
    inside = ask_of(tmp_path, "# system\nBe kind.\n# layout\n{{ instruction }} {{ input }}")
    assert inside.messages[0].content == "Be kind."
    assert inside.messages[-1].content == "Ham or spam? win {{ money }}"
    # The word alone is no placeholder.
    word = ask_of(
        tmp_path, "# system\nFollow the instruction.\n# instruction\nAs {{ instruction }}"
    )
    assert word.messages[0].content == "Follow the instruction.\n\nAs Ham or spam?"


def test_fenced_headings_bom_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "prompt.md"
    path.write_bytes(
        b"\xef\xbb\xbf# system\r\n```\r\n# not a heading\r\n```\r\n# layout\r\n{{ input }}"
    )
    call = first_call(get_style(str(path)), ITEM, CONTEXT)
    assert call.messages[0].content == "```\n# not a heading\n```\n\nHam or spam?"


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("", 1, "no section"),
        ("hello\n# layout\n{{ input }}", 1, "text before"),
        ("# layout\n{{ input }}\n# sytem\nx", 3, "# sytem"),
        ("# layout\n{{ input }}\n# layout\n{{ input }}", 3, "a second"),
        ("# system\n\n# layout\n{{ input }}", 1, "nothing under # system"),
        ("# layout\nno item", 2, "without {{ input }}"),
        ("# layout\n{{ input }}\n{{ inptu }}", 3, "unknown placeholder 'inptu'"),
        ("# layout\n{{ input }}\n# system\n\n{{ input }}", 5, "unknown placeholder 'input'"),
        ("# layout\n{{ input }}\n\n{% if %}", 4, "Expected an expression"),
        ("# layout\n{{ input", 2, "unexpected end"),
        ("# layout\n{{ input | center(9) }}", 2, "center"),
        ("# layout\n{{ input }}{{ slices['a'] }}", 2, "index"),
        ("# layout\n{{ input }}{% for x in input %}{% endfor %}", 2, "loop"),
    ],
)
def test_mistakes_are_refused_with_their_line(
    tmp_path: Path, text: str, line: int, found: str
) -> None:
    error = refusal_of(tmp_path, text)
    assert error.where == f"{tmp_path / 'prompt.md'}:{line}"
    assert found in error.found


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ input.__class__ }}",
        "{{ input['__class__'] }}",
        "{{ slices.__class__ }}",
        "{{ loop.__class__ }}",
        "{{ (input | attr('__class__')) }}",
        "{{ 'a' * 10**9 }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ range(10**9) }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% for a in labels recursive %}{{ loop(labels) }}{% endfor %}",
        "{% for a in labels %}{% for b in labels %}{% for c in labels %}x{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{% set x = 'a' ~ input %}{{ x }}",
        "{{ input ~ input }}",
        "{{ input.upper() }}",
        "{{ input % 3 }}",
        "{{ '%999999999d' | format(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ self }}",
        "{{ cycler }}",
        "{{ [1, 2] }}",
        "{{ labels | map('upper') }}",
        "{% filter upper %}x{% endfilter %}",
        "{% with x = 1 %}{{ x }}{% endwith %}",
    ],
)
def test_hostile_templates_are_refused_at_once(tmp_path: Path, hostile: str) -> None:
    started = time.thread_time()
    error = refusal_of(tmp_path, f"# layout\n{{{{ input }}}}\n{hostile}\n")
    assert time.thread_time() - started < 2
    assert error.where.endswith(":3")


@pytest.mark.parametrize(
    "large",
    [
        "{{ input | replace('', input) | replace('', input) | replace('', input) }}" * 9,
        "{% for a in labels %}{% for b in labels %}" + "x" * 90_000 + "{% endfor %}{% endfor %}",
    ],
)
def test_output_is_bounded(tmp_path: Path, large: str) -> None:
    started = time.thread_time()
    path = tmp_path / "prompt.md"
    path.write_text(f"# layout\n{{{{ input }}}}\n{large}")
    item = make_item("x" * 400, label="spam")
    with pytest.raises(ConfigError):
        first_call(get_style(str(path)), item, CONTEXT)
    assert time.thread_time() - started < 3


def test_an_items_text_is_never_a_template(tmp_path: Path) -> None:
    item = make_item("{{ 1 / 0 }}{% raw %}", label="ham")
    path = tmp_path / "prompt.md"
    path.write_text("# layout\n<{{ input }}>")
    call = first_call(get_style(str(path)), item, CONTEXT)
    assert call.messages[-1].content == "<{{ 1 / 0 }}{% raw %}>"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        get_style(str(tmp_path / "missing.md"), key="arms.mine.prompt")
    assert refusal.value.where == "arms.mine.prompt"
    latin = tmp_path / "latin.md"
    latin.write_bytes(b"# layout\n\xe9{{ input }}")
    with pytest.raises(ConfigError, match="UTF-8"):
        get_style(str(latin))
    huge = tmp_path / "huge.md"
    huge.write_text("# layout\n{{ input }}" + "x" * 100_000)
    with pytest.raises(ConfigError, match="bytes"):
        get_style(str(huge))


def test_a_slice_that_an_item_lacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompt.md"
    path.write_text("# layout\n{{ slices.dialect }} {{ input }}")
    context = replace(CONTEXT, shots=())
    with pytest.raises(DataError, match="slices.dialect") as refusal:
        first_call(get_style(str(path)), ITEM, context)
    assert "language" in refusal.value.expected
