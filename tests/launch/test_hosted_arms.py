"""Hosted arms beside others: what is planned and refused, and one run with a loopback endpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conf.errors import Refused
from launch.compose import compose_config
from launch.preflight import Checked, check
from tests.evaluation.endpoint_server import Behaviour, serving
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent.parent
# Nothing listens there: a plan that asked would fail.
NOWHERE = "http://127.0.0.1:9/v1"
PRICE = "{large:{input_usd_per_million:2,output_usd_per_million:8,source:here,date:'2026-01-01'}}"


def hosted(url: str) -> list[str]:
    return [
        "+exp=smoke",
        "+method@arms.big=few_shot",
        "arms.big.engine.name=openai",
        f"arms.big.engine.base_url={url}",
        "arms.big.engine.model=large",
    ]


def planned(tmp_path: Path, *overrides: str) -> Checked:
    config = compose_config([f"run.root={tmp_path}", *overrides])
    return check(config, exp="smoke", command="")


def test_a_plan_knows_hosted_arms_and_asks_nobody(tmp_path: Path) -> None:
    checked = planned(tmp_path, *hosted(NOWHERE), f"+pricing.hosted={PRICE}", "dry_run=true")
    jobs = {job.id: job for job in checked.plan.jobs if job.arm == "big"}
    assert all(job.devices == 0 for job in jobs.values())
    estimate = jobs["evaluate:big"].estimate
    assert estimate.usd is not None and estimate.usd > 0 and estimate.tokens
    assert 2e-6 * estimate.tokens <= estimate.usd <= 8e-6 * estimate.tokens
    assert not checked.arms["big"].is_same_base and checked.arms["zero_shot"].is_same_base
    assert list(tmp_path.iterdir()) == []


def test_how_it_is_asked_does_not_change_a_jobs_key(tmp_path: Path) -> None:
    def key(*overrides: str) -> str:
        plan = planned(tmp_path, *hosted(NOWHERE), *overrides).plan
        return plan.job("evaluate:big").key

    same = ["arms.big.engine.max_concurrency=3", "arms.big.engine.timeout_seconds=9"]
    assert key() == key(*same)
    assert key() != key("arms.big.engine.model=other")


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["arms.big.answer_by=score"], "arms.big.answer_by"),
        (["budget.max_usd=1"], "budget.max_usd"),
        (["arms.big.engine.base_url=https://example.com/v1"], "NO_KEY_HERE"),
        (["+method@arms.tuned=lora", "arms.tuned.engine.name=openai"], "arms.tuned"),
        (["arms.big.engine.too_long=truncate"], "too_long"),
    ],
)
def test_refusals(tmp_path: Path, overrides: list[str], where: str) -> None:
    endpoint = [f"engine.base_url={NOWHERE}", "engine.model=large"]
    with pytest.raises(Refused, match=where):
        planned(tmp_path, *hosted(NOWHERE), *endpoint, "engine.api_key_env=NO_KEY_HERE", *overrides)


@pytest.mark.slow
@pytest.mark.all_cores
def test_a_run_with_a_hosted_arm(tmp_path: Path) -> None:
    does = Behaviour(faults=0.2, slow_seconds=0.5)
    with serving(does) as url:
        command = [
            *(sys.executable, str(ROOT / "launch.py"), *hosted(url)),
            *(f"run.root={tmp_path}", "run.name=r", "pricing=cpu_core_hour", "budget.max_usd=5"),
            *(f"+pricing.hosted={PRICE}", "arms.big.engine.timeout_seconds=3"),
        ]
        environment = {**os.environ, "OPENAI_API_KEY": "sk-very-secret"}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            cwd=tmp_path,
            env=environment,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "r"
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    big = results["arms"]["big"]
    assert big["status"] == "done" and big["is_same_base"] is False
    assert big["tokens"]["completion"]["value"] == 3
    assert big["cost"]["request_usd"]["value"] == pytest.approx(
        (2 * big["tokens"]["prompt"]["value"] + 8 * 3) / 1e6
    )
    assert big["latency"]["p50_seconds"]["value"] is not None
    ledger = [line for line in results["ledger"] if line["arm"] == "big"]
    assert sum(line["usd"] for line in ledger) > 0
    assert sum(line["device_seconds"] for line in ledger) == 0
    journal = (run / "journal.jsonl").read_text(encoding="utf-8")
    assert journal.count('"attempt_failed"') == sum(does.kinds.values()) > 0
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not any(b"sk-very-secret" in path.read_bytes() for path in files)
