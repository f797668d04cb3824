"""Registries, and a user's file from outside the repository."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from conf.errors import ConfigError
from conf.groups import TaskConfig
from conf.hashing import sha256_of_file
from evaluation.plugins import LOADERS, SCORERS, STYLES, Registry, load_plugins
from evaluation.tasks import load_task

STYLE = """
from evaluation.plugins import prompt_style
from evaluation.prompts import Ask, Message


@prompt_style("shouting")
def shouting(item, context):
    answer = yield Ask(messages=(Message(role="user", content=item.input.upper()),))
    return answer
"""
SCORER = """
from evaluation.plugins import scorer


@scorer("same_length")
def same_length(answer, item, task):
    return float(len(answer) == len(item.answer_key))
"""
LOADER = """
from dataclasses import dataclass
from evaluation.plugins import loader


@dataclass
class Row:
    number: int


@loader("odd_numbers")
def odd_numbers(config):
    rows = [Row(number=i) for i in range(60)]
    return [{"input": f"Is {r.number} odd?", "label": "yn"[r.number % 2]} for r in rows]
"""


@pytest.fixture(autouse=True)
def _restored_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluation.plugins as plugins

    for registry in (plugins.STYLES, plugins.SCORERS, plugins.LOADERS, plugins.ADAPTERS):
        monkeypatch.setattr(registry, "_functions", dict(registry._functions))
    monkeypatch.setattr(plugins, "_executed", {})


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text)
    return path


def test_a_file_outside_the_repository_adds_all_three(tmp_path: Path) -> None:
    assert all(len(text.strip().splitlines()) <= 20 for text in (STYLE, SCORER, LOADER))
    paths = [
        write(tmp_path, f"{name}.py", text)
        for name, text in (("style", STYLE), ("scorer", SCORER), ("loader", LOADER))
    ]
    hashes = load_plugins(paths)
    assert hashes == tuple(sha256_of_file(path) for path in paths)
    assert STYLES.get("shouting", key="arms.a.prompt").__name__ == "shouting"
    task = load_task(
        TaskConfig(name="odd", source="odd_numbers", scoring="same_length"),
    )
    assert task.labels == ("n", "y") and task.scoring == "same_length"
    assert sum(map(len, task.items.values())) == 60
    item = task.items["test"][0]
    assert SCORERS.get("same_length", key="task.scoring")("n", item, task) == 1.0


def test_a_content_runs_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    text = f"with open({str(log)!r}, 'a') as log:\n    log.write('x')\n"
    first, copy = write(tmp_path, "a.py", text), write(tmp_path, "b.py", text)
    assert load_plugins([first, copy]) == load_plugins([first]) * 2
    assert log.read_text() == "x"
    assert load_plugins([]) == ()


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        LOADERS.get("sms_spamm", key="task.source")
    assert caught.value.where == "task.source" and caught.value.found == "'sms_spamm'"
    for name in ("file", "hub", "orders", "sms_spam"):
        assert name in caught.value.expected
    assert "@loader('sms_spamm')" in caught.value.remedy
    assert pickle.loads(pickle.dumps(caught.value)).where == "task.source"


def test_a_name_has_one_owner(tmp_path: Path) -> None:
    path = write(tmp_path, "taken.py", LOADER.replace("odd_numbers", "file"))
    before = LOADERS.get("file", key="task.source")
    with pytest.raises(ConfigError, match="a second loader named 'file'"):
        load_plugins([path])
    assert LOADERS.get("file", key="task.source") is before
    registry: Registry = Registry("scorer")
    registry.register("a")(len)
    registry.register("a")(len)  # the same function again is the same name
    with pytest.raises(ConfigError):
        registry.register(" ")(len)
    assert registry.names() == ("a",) and "a" in registry and list(registry) == ["a"]


def test_missing_file() -> None:
    with pytest.raises(ConfigError) as caught:
        load_plugins(["none/such.py"])
    assert caught.value.where == "plugins[0]" and "No such file" in caught.value.found


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("x = 1\ndef broken(:\n", 2, "SyntaxError"),
        ("x = 1\n\nimport no_such_module_at_all\n", 3, "No module named"),
        ("def f():\n    return 1 / 0\n\nf()\n", 2, "ZeroDivisionError"),
    ],
)
def test_broken_file_names_its_line(tmp_path: Path, text: str, line: int, found: str) -> None:
    path = write(tmp_path, "broken.py", text)
    with pytest.raises(ConfigError) as caught:
        load_plugins([path])
    assert caught.value.where == f"{path}:{line}" and found in caught.value.found


def test_a_failing_file_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write(tmp_path, "half.py", SCORER + "\nraise RuntimeError('later')\n")
    names = SCORERS.names()
    with pytest.raises(ConfigError, match="later"):
        load_plugins([path])
    assert SCORERS.names() == names
    path.write_text(SCORER)
    assert load_plugins([path]) and "same_length" in SCORERS
