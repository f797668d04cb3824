"""What a worker leaves: a masked and bounded log, its words, and stacks where it hangs."""

from __future__ import annotations

import faulthandler
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ConfigError, JobFailed
from launch.logs import worker_log
from launch.logs.errors_file import clear_job_error, job_error, note_failure, write_job_error
from launch.logs.masking import MASK, is_secret_name, masked, secrets_of
from launch.logs.worker_log import MaskedLog, beat, logged

CANARY = "c4n4ry-Value-of-a-secret"


@pytest.mark.parametrize(
    "text",
    [
        f"api_key={CANARY}",
        f"{{'token': '{CANARY}'}}",
        f"Authorization: Bearer {CANARY}",
        f"https://user:{CANARY}@host/path",
        "sk-abcdefghijklmnop0123456789",
        "hf_abcdefghijklmnopqrstuvwx",
        "AKIAABCDEFGHIJKLMNOP",
    ],
)
def test_what_looks_like_a_secret_is_masked(text: str) -> None:
    clean = masked(text)
    assert MASK in clean
    assert CANARY not in clean and "abcdefghijkl" not in clean.lower()


def test_plain_log_lines_stay_as_they_are() -> None:
    lines = [
        "12:00:01 7/20 steps: loss 0.3, 370 tokens/s",
        "pad_token: <|endoftext|>, tokens: 123456789",
        "https://docs.ray.io/en/latest/ray-core/x.html",
        "token embedding of 49152 rows; key and value heads 3",
    ]
    assert [masked(line) for line in lines] == lines


def test_secrets_are_told_by_the_names_of_variables() -> None:
    assert all(map(is_secret_name, ("WANDB_API_KEY", "HF_TOKEN", "db_password", "SIGNING_KEY")))
    assert not any(map(is_secret_name, ("RAY_AUTH_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "PATH")))
    found = secrets_of(
        {"A_TOKEN": "12345678", "B_TOKEN": "123456789", "C_TOKEN": "short", "D": CANARY}
    )
    assert found == ("123456789", "12345678")


@given(cuts=st.lists(st.integers(0, 80), max_size=6), end=st.sampled_from(["\n", "\r", ""]))
def test_a_secret_written_in_parts_is_masked(
    cuts: list[int], end: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = f"a line with {CANARY} in it, and one more{end}"
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    path = tmp_path_factory.mktemp("log") / "0.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_API_KEY", CANARY)
        with MaskedLog(path) as log:
            for first, last in zip(edges, edges[1:], strict=False):
                log.write(text[first:last])
    assert path.read_bytes().decode() == text.replace(CANARY, MASK)


def test_a_log_is_bounded_and_keeps_its_newest_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_log, "MAX_LOG_BYTES", 1000)
    path = tmp_path / "0.log"
    with MaskedLog(path) as log:
        for i in range(500):
            print(f"line {i:04d}", file=log)
    files = [path, tmp_path / "0.log.old"]
    assert sum(f.stat().st_size for f in files) <= 2000
    kept = [int(x.split()[1]) for f in reversed(files) for x in f.read_text().splitlines()]
    assert kept == list(range(kept[0], 500)) and len(kept) >= 100


def test_output_of_libraries_goes_to_the_log_and_a_failure_leaves_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", CANARY)
    log = tmp_path / "logs" / "train-a" / "3.log"
    with pytest.raises(ValueError, match="odd"), logged(log):
        print("said something")
        raise ValueError(f"odd {CANARY}")
    assert capsys.readouterr().out == ""
    text = log.read_text()
    assert "said something" in text and "Traceback" in text and "ValueError: odd ***" in text
    words = json.loads((log.parent / "error-3.json").read_text())
    assert (words["global_rank"], words["exception"], words["message"]) == (
        3,
        "ValueError",
        "odd ***",
    )
    assert words["node"] and not words["is_own"]
    assert json.loads((log.parent / "worker-3.json").read_text())["pid"] == os.getpid()
    with logged(log):  # the next attempt
        pass
    assert not (log.parent / "error-3.json").exists()


def test_a_worker_that_hangs_dumps_its_stacks_and_one_that_ends_well_leaves_none(
    tmp_path: Path,
) -> None:
    log, stack = tmp_path / "0.log", tmp_path / "0.stack"

    def waits_for_others_in_vain() -> None:
        deadline = time.monotonic() + 20
        while not stack.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.01)

    with logged(log, stalled_seconds=0.05):
        waits_for_others_in_vain()
    assert not stack.exists()
    with pytest.raises(JobFailed), logged(log, stalled_seconds=0.05):
        waits_for_others_in_vain()
        raise JobFailed("cut off")
    assert "waits_for_others_in_vain" in stack.read_text()
    with logged(log, stalled_seconds=60.0):  # the next attempt, which ends well
        pass
    assert not stack.exists()
    assert "waits_for_others_in_vain" in (tmp_path / "0.stack.old").read_text()


def test_each_sign_of_life_puts_the_dump_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[float] = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda seconds, file: armed.append(seconds)
    )
    beat()  # outside a job it does nothing
    with logged(tmp_path / "0.log", stalled_seconds=7.0):
        beat()
        beat()
    assert armed == [7.0, 7.0, 7.0]


def test_error_json_names_the_worker_that_caused_the_failure(tmp_path: Path) -> None:
    directory = tmp_path / "train-a"
    directory.mkdir()
    note_failure(directory / "0.log", RuntimeError("Connection closed by peer"))
    note_failure(directory / "1.log", JobFailed("step 4: the loss is nan"))
    write_job_error(
        tmp_path,
        job="train:a",
        arm="a",
        error=JobFailed("step 4: the loss is nan"),
        reason="step 4: the loss is nan",
        attempts=2,
    )
    found = job_error(tmp_path, "train:a")
    assert found is not None
    assert (found.job, found.global_rank, found.attempts) == ("train:a", 1, 2)
    assert found.node and found.message == "step 4: the loss is nan" and "train-a" in found.remedy
    assert set(json.loads((directory / "error.json").read_text())) >= {
        *("job", "global_rank", "node", "exception", "message", "remedy", "time")
    }
    clear_job_error(tmp_path, "train:a")
    assert job_error(tmp_path, "train:a") is None


def test_error_json_keeps_the_remedy_of_a_refusal_and_does_without_a_worker(tmp_path: Path) -> None:
    error = ConfigError("task.path", found="x", expected="y", remedy="write z")
    write_job_error(tmp_path, job="rows:a", arm=None, error=error, reason=str(error), attempts=1)
    found = job_error(tmp_path, "rows:a")
    assert found is not None
    assert (found.remedy, found.node, found.global_rank) == ("write z", None, None)
