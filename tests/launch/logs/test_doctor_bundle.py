"""The bundle of a run: no text of the user's, no secret, and all that a helper asks for."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import DataError
from launch.logs import bundle as doctor_bundle
from launch.logs.bundle import write_bundle
from launch.logs.text_filter import STRIDE, WINDOW, TextFilter
from launch.store import write_json

ITEM = "The zebra-striped canary invoice number ninety arrived twice on Tuesday"
PROMPT = "You are a patient auditor of canary invoices. Decide:"
COMPLETION = "probably a duplicated Löwenzahn booking"
SECRET = "C4n4ry/of+the=environment"
OVERRIDE_SECRET = "C4n4ryOfTheOverride99"
CONFIG_SECRET = "C4n4ryOfTheConfig77"
LABEL = "zq"


def make_run(root: Path) -> Path:
    run = root / "r"
    write_json(run / "plan.json", {"jobs": [{"id": "train:a", "key": "k"}]})
    write_json(
        run / "config.json",
        {
            "config": {
                "task": {"path": "tickets.csv", "instruction": PROMPT, "labels": [LABEL]},
                "engine": {"api_key": CONFIG_SECRET, "batch_size": 4, "stop": [ITEM[4:40]]},
            },
            "command": f"python launch.py +exp=lora engine.token={OVERRIDE_SECRET}",
            "versions": {"torch": "2.13"},
        },
    )
    jsonl(run / "items.jsonl", {"id": "1", "input": ITEM, "label": LABEL})
    jsonl(run / "prompts.jsonl", {"prompt_sha256": "x", "arm": "a", "text": f"{PROMPT}\n{ITEM}"})
    jsonl(
        run / "arms/a/samples.jsonl", {"completion": COMPLETION, "answer": LABEL, "target": LABEL}
    )
    jsonl(
        run / "journal.jsonl",
        {"time": 1.0, "event": "run_started", "data": {"command": f"x token={OVERRIDE_SECRET}"}},
        {
            "time": 2.0,
            "event": "answer_rule",
            "data": {"bias": {LABEL: 1.0}, "words": LABEL, "n": 7},
        },
        {"time": 3.0, "event": "job_failed", "data": {"error": f"line 1: found: {ITEM!r}\nodd"}},
    )
    log = run / "logs" / "train-a" / "0.log"
    log.parent.mkdir(parents=True)
    log.write_text(
        f"loss 0.5 at step 7\ncould not parse {COMPLETION.upper()}\n"
        f"key {SECRET}\n{json.dumps(ITEM + COMPLETION)}\nthe end\n"
    )
    write_json(log.parent / "error.json", {"job": "train:a", "message": f"bad: {ITEM[10:60]}"})
    (log.parent / "0.stack").write_text('File "loop.py", line 7 in train\n')
    (log.parent / "core").write_text(ITEM)
    (log.parent / "link.log").symlink_to(run / "items.jsonl")
    return run


def jsonl(path: Path, *lines: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, str], str]:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    assert write_bundle(make_run(tmp_path)) == 0
    with zipfile.ZipFile(tmp_path / "r-bundle.zip") as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    return files, capsys.readouterr().out


def test_no_secret_and_no_text_of_the_user_is_in_it(bundle: tuple[dict[str, str], str]) -> None:
    files, _ = bundle
    everything = "\n".join([*files, *files.values()]).casefold()
    for secret in (SECRET, OVERRIDE_SECRET, CONFIG_SECRET):
        assert secret.casefold() not in everything
    for word in ("zebra", "ninety", "auditor", "duplicated", "zahn", f'"{LABEL}"'):
        assert word not in everything, word


def test_what_a_helper_asks_for_is_in_it(bundle: tuple[dict[str, str], str]) -> None:
    files, said = bundle
    assert set(files) == {
        *("config.json", "plan.json", "journal.jsonl", "versions.json", "machine.json"),
        *("logs/train-a/0.log", "logs/train-a/0.stack", "logs/train-a/error.json"),
        "left_out.json",
    }
    assert files["logs/train-a/0.log"].splitlines()[0] == "loss 0.5 at step 7"
    assert files["logs/train-a/0.log"].splitlines()[-1] == "the end"
    config = json.loads(files["config.json"])
    assert config["config"]["engine"]["batch_size"] == 4
    assert config["config"]["task"]["path"] == "tickets.csv"
    assert config["command"].startswith("python launch.py +exp=lora")
    events = [json.loads(line) for line in files["journal.jsonl"].splitlines()]
    assert [e["event"] for e in events] == ["run_started", "answer_rule", "job_failed"]
    assert events[1]["data"] == {"n": 7} and events[2]["data"]["error"].endswith("\nodd")
    assert "torch" in json.loads(files["versions.json"])
    assert "r-bundle.zip: 9 files" in said and "KiB" in said
    assert "lines or values that hold text" in said and "other files of the run" in said
    assert json.loads(files["left_out.json"])["texts of the configuration"] == 2


def test_long_logs_are_cut_at_a_whole_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_bundle, "MAX_LOG_BYTES", 100)
    run = make_run(tmp_path)
    (run / "logs/train-a/0.log").write_text("".join(f"line {i:05d}\n" for i in range(1000)))
    write_bundle(run)
    with zipfile.ZipFile(tmp_path / "r-bundle.zip") as archive:
        lines = archive.read("logs/train-a/0.log").decode().splitlines()
    assert lines == [f"line {i:05d}" for i in range(1000 - len(lines), 1000)]
    assert 5 <= len(lines) <= 10
    assert "10900 bytes of long logs" in capsys.readouterr().out


def test_a_damaged_run_is_bundled_and_no_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "plan.json").write_text("{")
    (run / "journal.jsonl").write_text('{"time": 1, "event": "run_started"}\nnot json\n')
    assert write_bundle(run) == 0
    with pytest.raises(DataError, match="no plan.json"):
        write_bundle(tmp_path)


LETTERS = st.text("abcdefg häß中文字", min_size=WINDOW, max_size=80)


@given(text=LETTERS, before=st.text(max_size=20), after=st.text(max_size=20), data=st.data())
def test_any_part_of_a_text_that_is_long_enough_is_found(
    text: str, before: str, after: str, data: st.DataObject
) -> None:
    letters = "".join(text.split())
    if len(letters) < WINDOW + STRIDE - 1:
        return
    first = data.draw(st.integers(0, len(letters) - (WINDOW + STRIDE - 1)))
    part = letters[first : first + WINDOW + STRIDE - 1]
    quoted = data.draw(st.sampled_from([part, part.upper(), json.dumps(part), repr(part)]))
    if "ß" in part and quoted == part.upper():
        quoted = part
    assert TextFilter([text]).holds_text(f"{before} {quoted} {after}")


@given(text=LETTERS, line=st.text("hijklmnopq rst"))
def test_a_line_without_the_text_stays(text: str, line: str) -> None:
    alone = text.replace("h", "")
    assert not TextFilter([alone]).holds_text(line)
