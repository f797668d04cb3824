"""Files of every format, the bad-data table, paths, the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from conf.groups import ColumnsConfig, FilesConfig, TaskConfig
from evaluation.tasks import load_task
from evaluation.tasks.loaders import PACKAGE_ROOT, as_source, resolve_path
from evaluation.tasks.readers import MAX_LINE_BYTES, read_rows

ROWS = [{"input": f"message {i}", "label": "ab"[i % 2]} for i in range(60)]


def write(directory: Path, name: str, content: str | bytes) -> Path:
    path = directory / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_text(rows: list[str]) -> str:
    return "\n".join(["input,label", *rows]) + "\n"


def many(prefix: str = "message", count: int = 40) -> list[str]:
    return [f"{prefix} {i},{'ab'[i % 2]}" for i in range(count)]


# --- what is read -------------------------------------------------------------------------------


def _write_as(directory: Path, suffix: str) -> Path:
    path = directory / f"data{suffix}"
    if suffix in (".csv", ".tsv"):
        by = "," if suffix == ".csv" else "\t"
        lines = [by.join(ROWS[0]), *(by.join(row.values()) for row in ROWS)]
        path.write_text("\n".join(lines))
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_formats_give_the_same_task(tmp_path: Path, suffix: str) -> None:
    task = load_task(TaskConfig(name="t", path=str(_write_as(tmp_path, suffix))))
    reference = load_task(TaskConfig(name="t", path=str(_write_as(tmp_path, ".jsonl"))))
    assert task.items == reference.items and task.sha256 == reference.sha256
    assert sum(map(len, task.items.values())) == 60


def test_csv_lines_are_counted_through_quoted_line_breaks(tmp_path: Path) -> None:
    path = write(
        tmp_path, "q.csv", 'input,label\r\n"two\r\nlines, and ""quotes""",a\r\n\r\nlast,b\r\n'
    )
    rows = read_rows(path, name="q.csv")
    assert [(r.where, dict(r.values)) for r in rows] == [
        ("q.csv:2", {"input": 'two\r\nlines, and "quotes"', "label": "a"}),
        ("q.csv:5", {"input": "last", "label": "b"}),
    ]


def test_semicolons_and_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, "s.csv", b"\xef\xbb\xbfinput;label\nwell, yes;a\n")
    assert dict(read_rows(path)[0].values) == {"input": "well, yes", "label": "a"}


def test_directory_and_files_keep_the_users_splits(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", csv_text(many("train")))
    write(tmp_path, "test.jsonl", json.dumps({"input": "one", "label": "a"}))
    task = load_task(TaskConfig(name="t", path=str(tmp_path)))
    assert [i.input for i in task.items["test"]] == ["one"]
    # No validation file: about a fifth of train, by content.
    assert 2 <= len(task.items["validation"]) <= 16
    assert len(task.items["train"]) + len(task.items["validation"]) == 40
    write(tmp_path, "dev.csv", csv_text(many("dev", 6)))
    files = FilesConfig(
        train=str(tmp_path / "train.csv"),
        validation=str(tmp_path / "dev.csv"),
        test=str(tmp_path / "test.jsonl"),
    )
    named = load_task(TaskConfig(name="t", files=files))
    assert {s: len(i) for s, i in named.items.items()} == {"train": 40, "validation": 6, "test": 1}


def test_package_paths_work_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_path("pkg:conf/examples/support_agent.csv").is_file()
    assert resolve_path("pkg:conf") == PACKAGE_ROOT / "conf"
    assert resolve_path("a.csv") == Path("a.csv")
    with pytest.raises(ConfigError, match="below the project"):
        resolve_path("pkg:../secret.csv")


def test_reading_needs_no_heavy_library(tmp_path: Path) -> None:
    path = _write_as(tmp_path, ".csv")
    code = (
        "import sys; from conf.groups import TaskConfig; from evaluation.tasks import load_task\n"
        f"load_task(TaskConfig(name='t', path={str(path)!r}))\n"
        "load_task(TaskConfig(name='o', source='orders'))\n"
        "heavy = {'torch', 'pandas', 'datasets', 'pyarrow', 'transformers', 'numpy', 'ray'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE_ROOT)


# --- what is refused: where, found, remedy ------------------------------------------------------

GOOD = csv_text(many())
BAD_FILES: dict[str, tuple[str, str | bytes, str, str, str]] = {
    # name: (file, content, where, found, remedy); {p} is the file's path
    "empty": ("a.csv", "", "{p}", "an empty file", "one example a line"),
    "blank": ("a.jsonl", " \n\n", "{p}", "an empty file", "one example a line"),
    "header only": ("a.csv", "input,label\n", "{p}", "a header and no row", "one example"),
    "latin-1": (
        "a.csv",
        GOOD.encode() + "caf\u00e9,a\n".encode("latin-1"),
        "{p}:42",
        f"byte 0xe9 at offset {len(GOOD) + 3}",
        "iconv -f WINDOWS-1252 -t UTF-8 {p}",
    ),
    "nul": ("a.csv", GOOD + "x\0y,a\n", "{p}:42", "a NUL character", "UTF-16"),
    "open quote": ("a.csv", GOOD + '"never closed,a\nmore,b\n', "{p}:42", "malformed CSV", "quote"),
    "cells": ("a.csv", GOOD + "one, two, three\n", "{p}:42", "3 cells", "double quotes"),
    "header twice": ("a.csv", "input,input\nx,y\n", "{p}:1", "two columns 'input'", "rename"),
    "header nameless": ("a.csv", "input,\nx,y\n", "{p}:1", "a nameless column", "rename"),
    "bad json line": (
        "a.jsonl",
        '{"input": "x", "label": "a"}\n{"input": "y", "label": }\n',
        "{p}:2",
        "malformed JSON: Expecting value at column 25",
        "quotes, commas and brackets",
    ),
    "json line list": ("a.jsonl", '["x", "a"]\n', "{p}:1", "a JSON list", "named fields"),
    "nan": ("a.jsonl", '{"input": NaN}\n', "{p}:1", "NaN", "quotes, commas"),
    "json lines in json": ("a.json", '{"a": 1}\n{"a": 2}\n', "{p}:2", "Extra data", ".jsonl"),
    "json object": ("a.json", '{"rows": []}', "{p}", "a JSON object", "one list"),
    "json number": ("a.json", '[{"input": "x"}, 5]', "{p}[1]", "a JSON number", "named fields"),
    "huge line": (
        "a.csv",
        csv_text([*many(count=3), "x" * MAX_LINE_BYTES + ",a"]),
        "{p}:5",
        f"a line of {MAX_LINE_BYTES + 2:,} bytes",
        "line breaks",
    ),
    "suffix": ("a.xlsx", "zip", "{p}", "ending in .xlsx", "save it as CSV"),
    "parquet": ("a.parquet", b"PAR1 not really", "{p}", "cannot be read", "save the rows as CSV"),
    "empty input": ("a.csv", GOOD + ",a\n", "{p}:42", "an empty cell in column input", "fill"),
    "empty label": ("a.csv", GOOD + "x, \n", "{p}:42", "an empty cell in column label", "fill"),
    "missing columns": (
        "a.csv",
        "body,category\n" + "\n".join(many()),
        "{p}",
        "columns body (40 different), category (2 different)",
        "python launch.py +exp=compare task.path={p} task.columns.input=body "
        "task.columns.label=category",
    ),
    "duplicate ids": (
        "a.csv",
        "id,input,label\n7,x,a\n8,y,b\n7,z,a\n",
        "{p}:4",
        "id '7', which {p}:2 has too",
        "make the ids unique",
    ),
    "one label": ("a.csv", csv_text(["x,a", "y,a"]), "{p}", "only the label 'a'", "another label"),
    "free text as label": (
        "a.csv",
        csv_text([f"question {i},answer {i}" for i in range(30)]),
        "{p}",
        "30 different labels in 30 rows",
        "task.columns.target=label",
    ),
    "too few": ("a.csv", csv_text(["x,a", "y,b"]), "{p}", "2 rows, and no", "add rows"),
    "choices": (
        "a.jsonl",
        '{"input": "q", "choices": ["x"], "label": "x"}\n',
        "{p}:1",
        "in column choices",
        "one|two",
    ),
    "no such choice": (
        "a.jsonl",
        '{"input": "q", "choices": "yes|no", "label": "Yes"}\n',
        "{p}:1",
        "'Yes', which is not among the choices yes | no",
        "write 'yes'",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path: Path, case: str) -> None:
    name, content, where, found, remedy = BAD_FILES[case]
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load_task(TaskConfig(name="t", path=str(path)))
    error = caught.value
    assert error.where == where.replace("{p}", str(path))
    assert found.replace("{p}", str(path)) in error.found
    assert remedy.replace("{p}", str(path)) in error.remedy
    assert error.expected and error.exit_code == 2


def refused(config: TaskConfig) -> DataError | ConfigError:
    with pytest.raises((DataError, ConfigError)) as caught:
        load_task(config)
    return caught.value


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "tickets.csv", GOOD)
    error = refused(TaskConfig(name="t", path=str(tmp_path / "ticket.csv")))
    assert error.where.endswith("ticket.csv") and "no such file" in error.found
    assert "tickets.csv" in error.remedy
    assert (
        "task=hub task.path=owner/name" in refused(TaskConfig(name="t", path="owner/name")).remedy
    )


def test_nothing_given_and_both_given(tmp_path: Path) -> None:
    error = refused(TaskConfig(name="t"))
    assert error.where == "task.path" and "python launch.py +exp=compare" in error.remedy
    both = refused(TaskConfig(name="t", path="x.csv", files=FilesConfig(train="y.csv")))
    assert both.where == "task.path" and "both" in both.found


def test_directory_without_test_or_with_two(tmp_path: Path) -> None:
    assert "nothing" in refused(TaskConfig(name="t", path=str(tmp_path))).found
    write(tmp_path, "train.csv", GOOD)
    assert refused(TaskConfig(name="t", path=str(tmp_path))).where == "task.files.test"
    write(tmp_path, "train.jsonl", json.dumps(ROWS[0]))
    error = refused(TaskConfig(name="t", path=str(tmp_path)))
    assert error.where.endswith("train.jsonl") and "second file for train" in error.found


def test_named_column_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", GOOD.replace("input", "body"))
    columns = ColumnsConfig(input="boddy")
    error = refused(TaskConfig(name="t", path=str(path), columns=columns))
    assert error.where == "task.columns.input" and "'boddy'" in error.found
    assert error.remedy == "task.columns.input=body"
    error = refused(TaskConfig(name="t", path=str(path), group="wh o"))
    assert error.where == "task.group"


def test_overlap_between_files_is_counted(tmp_path: Path) -> None:
    train = write(tmp_path, "train.csv", csv_text(many("same", 30)))
    write(tmp_path, "test.csv", csv_text([*many("other", 5), "SAME  3,b", "same 4,a", "same 5,b"]))
    error = refused(TaskConfig(name="t", path=str(tmp_path)))
    assert error.where == f"{train}:5" and f"{tmp_path}/test.csv:7" in error.found
    assert f"{train}:6, {train}:7" in error.found
    assert "3 x overlap of train and test" in error.found
    assert "remove these rows" in error.remedy


def test_label_in_test_but_not_in_train(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", csv_text(many("train", 30)))
    test = write(tmp_path, "test.csv", csv_text(["x,a", "y,c", "z,c"]))
    error = refused(TaskConfig(name="t", path=str(tmp_path)))
    assert error.where == f"{test}:3" and "'c', which is not in train: a, b" in error.found
    assert "2 x a label outside train" in error.found and "train rows" in error.remedy


def test_label_outside_the_set(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", csv_text([*many(), "x,hamm", "y,ham"]))
    error = refused(TaskConfig(name="t", path=str(path), labels=["a", "b", "ham"]))
    assert error.where == f"{path}:42" and "'hamm'" in error.found and "'ham'" in error.remedy


def test_all_problems_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", csv_text([*many(), ",a", "x,", ",b", *[",a"] * 7]))
    error = refused(TaskConfig(name="t", path=str(path)))
    assert error.where == f"{path}:42"
    assert "9 x empty input" in error.found and f"1 x empty label: {path}:43" in error.found


def test_a_cached_error_crosses_processes(tmp_path: Path) -> None:
    import pickle

    error = refused(TaskConfig(name="t", path=str(tmp_path / "none.csv")))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    "column", ["my body", 'say "it"', "a,b", "x=y", "it's", "caf\u00e9", "{a}", "back\\slash"]
)
def test_the_command_survives_shell_and_hydra(tmp_path: Path, column: str) -> None:
    import shlex

    from hydra.core.override_parser.overrides_parser import OverridesParser

    rows = [{column: f"a long message {i}", "kind of": "ab"[i % 2]} for i in range(40)]
    path = write(tmp_path, "my file.jsonl", "\n".join(json.dumps(row) for row in rows))
    words = shlex.split(refused(TaskConfig(name="t", path=str(path))).remedy)
    assert words[:3] == ["python", "launch.py", "+exp=compare"]
    overrides = OverridesParser.create().parse_overrides(words[3:])
    found: dict[str, Any] = {o.key_or_group: o.value() for o in overrides}
    assert found == {
        "task.path": str(path),
        "task.columns.input": column,
        "task.columns.label": "kind of",
    }


@pytest.mark.parametrize(
    ("columns", "kind", "expected"),
    [
        (("ticket_text", "Category"), "auto", {"input": "ticket_text", "label": "Category"}),
        (("question", "answer"), "auto", {"input": "question", "target": "answer"}),
        (("long_one", "short_one"), "auto", {"input": "long_one", "label": "short_one"}),
        (("question", "answer"), "pairs", {"prompt": "question", "completion": "answer"}),
        (("input", "kind_of"), "auto", {"input": "input", "label": "kind_of"}),
        (("context", "label"), "auto", {"input": "COLUMN", "label": "label"}),
    ],
)
def test_guess(
    tmp_path: Path, columns: tuple[str, str], kind: str, expected: dict[str, str]
) -> None:
    is_free = columns[1] == "answer"
    rows = [
        {
            columns[0]: f"a rather long text {i}",
            columns[1]: f"reply {i}" if is_free else "ab"[i % 2],
        }
        for i in range(30)
    ]
    path = write(tmp_path, "g.json", json.dumps(rows))
    error = refused(TaskConfig(name="t", path=str(path), kind=TaskKind[kind]))
    for field, column in expected.items():
        assert f"task.columns.{field}={column}" in error.remedy


# --- plugins' loaders and the hub ---------------------------------------------------------------


def test_what_a_loader_may_return() -> None:
    assert [r.where for r in as_source(ROWS[:2], name="mine").splits["all"]] == [
        "mine.all[0]",
        "mine.all[1]",
    ]
    assert set(as_source({"train": ROWS, "test": ROWS}, name="m").splits) == {"train", "test"}
    for wrong in ("text", {"dev": ROWS}, [1], {"train": "x"}, {}):
        with pytest.raises(DataError):
            as_source(wrong, name="mine")


def test_hub_without_network_says_what_to_do() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    error = refused(TaskConfig(name="t", source="hub", path="nobody/nothing"))
    assert error.where == "hub:nobody/nothing" and "local cache" in error.expected
    assert "datasets.load_dataset('nobody/nothing')" in error.remedy
    assert refused(TaskConfig(name="t", source="hub")).where == "task.path"


def test_hub_rows_labels_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features(
        {"input": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    for split, count in (("train", 40), ("validation", 8)):
        data = {
            "input": [f"{'same' if i == 0 else split} {i}" for i in range(count)],
            "label": [i % 2 for i in range(count)],
        }
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(data, features=features).to_parquet(
            str(tmp_path / "set" / f"{split}.parquet")
        )
    task = load_task(TaskConfig(name="t", source="hub", path=str(tmp_path / "set")))
    assert task.labels == ("no", "yes")
    assert len(task.items["test"]) == 8  # the publisher's validation stands in
    # An overlap that the user cannot mend is removed and counted, not refused.
    assert task.facts.num_overlap_removed == 1
    assert len(task.items["train"]) + len(task.items["validation"]) == 39


def test_hub_split_names() -> None:
    from evaluation.tasks.hub import chosen_splits

    assert chosen_splits({"train": 1}) == {"all": 1}
    assert chosen_splits({"train": 1, "dev": 2, "test": 3, "extra": 4}) == {
        "train": 1,
        "validation": 2,
        "test": 3,
    }
    with pytest.raises(DataError, match="splits left, right"):
        chosen_splits({"left": 1, "right": 2})
