"""A canary in everything a secret comes from, and one in the data: where they may not be found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.errors import Refused
from launch.compose import compose_config
from launch.preflight import check
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.all_cores

FROM_ENVIRONMENT = "C4naryOfTheEnvironment77"
FROM_FILE = "C4naryOfTheDotEnvFile88"
SENTENCE = "the zebra striped canary lost its parcel"
# The files that hold texts by contract. They stay in the run's directory.
TEXTS = ("items.jsonl", "samples.jsonl", "prompts.jsonl", "agreement.jsonl")


def files_below(directory: Path) -> Iterator[Path]:
    return (p for p in directory.rglob("*") if p.is_file() and not p.is_symlink())


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with W&B offline and without texts in its report; what the terminal showed."""
    here = tmp_path_factory.mktemp("canary")
    (here / ".env").write_text(f"OPENAI_API_KEY={FROM_FILE}\n")
    rows = [f"{SENTENCE} number {n},{'lost' if n % 2 else 'found'}" for n in range(80)]
    (here / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "+exp=smoke", "task=file", "task.path=rows.csv"]
        + ["task.columns.input=text", "task.columns.label=label", "run.name=r", "report.text=none"]
        + ["task.limit.test=20", "tracking.wandb=offline"],
        cwd=here,
        env=os.environ | {"SOME_API_KEY": FROM_ENVIRONMENT, "MY_SECRET": FROM_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return here, done.stdout + done.stderr


@pytest.mark.slow
def test_no_secret_is_in_any_file_or_on_the_terminal(ran: tuple[Path, str]) -> None:
    here, terminal = ran
    for canary in (FROM_ENVIRONMENT, FROM_FILE):
        assert canary not in terminal
        found = [p for p in files_below(here / "outputs") if canary.encode() in p.read_bytes()]
        assert not found


@pytest.mark.slow
def test_the_users_texts_stay_in_the_files_that_hold_texts(ran: tuple[Path, str]) -> None:
    here, terminal = ran
    assert SENTENCE not in terminal
    run = here / "outputs/r"
    holding = {p.name for p in files_below(run) if SENTENCE.encode() in p.read_bytes()}
    assert "items.jsonl" in holding  # else the canary was in nothing
    assert holding <= set(TEXTS)
    assert any("wandb" in str(p) for p in files_below(run)), "nothing was tracked"


@pytest.mark.parametrize(
    "typed",
    [
        ("engine=openai", "engine.model=m", "engine.base_url=https://me:C4nary99@host/v1"),
        ("cluster=ray", "cluster.storage=/shared", "cluster.address=http://me:C4nary99@host:8265"),
        ("cluster=ray", "cluster.storage=/shared", "cluster.address=ray://me:C4nary99@host:10001"),
    ],
    ids=lambda typed: typed[-1].partition("=")[0],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(
    typed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(Refused, match="password") as caught:
        check(compose_config(["+exp=zero_shot", *typed]), exp="zero_shot", command="test")
    assert "C4nary99" not in str(caught.value)
