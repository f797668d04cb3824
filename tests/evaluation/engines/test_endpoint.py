"""Hosted engines against a loopback endpoint with faults, limits and kills."""

from __future__ import annotations

import datetime
import email.utils
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conf.errors import BudgetReached, ConfigError, JobFailed
from conf.groups import EngineConfig
from conf.run_groups import HostedPrice
from evaluation.engines import endpoint_retry
from evaluation.engines.base import GenerateRequest, GenerateResult, ScoreRequest, Usage
from evaluation.engines.endpoint_ceiling import Ceiling, EndpointPlace, cost_usd, most_usd
from evaluation.engines.endpoint_check import check_endpoint
from evaluation.engines.endpoint_client import _retry_after
from evaluation.engines.endpoint_hosted import HostedEngine
from evaluation.engines.endpoint_store import AnswerStore, Reply
from tests.evaluation.endpoint_server import Behaviour, answer_to, serving
from tests.waiting import HANG_SECONDS

PRICE = HostedPrice(
    input_usd_per_million=100.0,
    cached_input_usd_per_million=10.0,
    output_usd_per_million=1000.0,
    source="test",
    date="2026-01-01",
)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setattr(endpoint_retry, "LONGEST_WAIT_SECONDS", 0.02)


def engine(url: str, answers: Path, **given: Any) -> HostedEngine:
    place = {k: given.pop(k) for k in ("price", "spend", "limit_usd") if k in given}
    config = EngineConfig(name="openai", base_url=url, model="big", **given)
    return HostedEngine(config, place=EndpointPlace(answers=answers, **place))


def ask(prompt: str, **given: Any) -> GenerateRequest:
    fields: dict[str, Any] = {"id": f"{prompt}|0|0", "max_new_tokens": 8} | given
    turns = (("system", "Answer."), ("user", prompt))
    return GenerateRequest(prompt_ids=(1,), messages=turns, **fields)


def texts(results: list[GenerateResult]) -> dict[str, str]:
    return {result.id.split("|")[0]: result.text for result in results}


def test_every_request_is_answered_under_faults(tmp_path: Path) -> None:
    does = Behaviour(faults=0.3)
    prompts = [f"prompt {i}" for i in range(200)]
    with serving(does) as url:
        asked = engine(url, tmp_path, timeout_seconds=0.3, max_concurrency=16)
        results = list(asked.generate([ask(p) for p in prompts]))
    assert texts(results) == {p: answer_to(p) for p in prompts}
    assert all(r.error is None for r in results)
    assert set(does.kinds) == {"429", "500", "drop", "slow", "malformed"}  # all were met
    attempts = asked.take_attempts()
    injected = sum(does.kinds.values())
    # On a busy machine an honest answer may come too late as well: an attempt more, never one less.
    is_late = ["Timeout" in a["reason"] or "no end of the" in a["reason"] for a in attempts]
    late = sum(is_late) - does.kinds["slow"]
    assert late >= 0
    assert injected <= len(attempts) <= injected + late
    assert injected <= sum(does.requests.values()) - 200 <= len(attempts)
    statuses = Counter(attempt["status"] for attempt in attempts)
    for status in (429, 500):
        assert does.kinds[str(status)] - late <= statuses[status] <= does.kinds[str(status)]
    assert all(a["usd"] == (0.0 if a["status"] == 429 else None) for a in attempts)
    # Slow ones are given up, not ended.
    assert does.most_under_way <= 16 + does.kinds["slow"] + late


def test_tokens_are_the_endpoints_own_and_unknown_ones_are_null(tmp_path: Path) -> None:
    with serving(Behaviour()) as url:
        (known,) = engine(url, tmp_path / "a").generate([ask("hello")])
    with serving(Behaviour(usage=False)) as url:
        asked = engine(url, tmp_path / "b", price=PRICE)
        (unknown,) = asked.generate([ask("hello")])
    assert known.usage == Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=3)
    assert known.computed_tokens == 10 - 4 + 3 - 1
    assert unknown.usage == Usage()
    assert asked.take_paid().usd is None


@pytest.mark.parametrize("status", [401, 403, 404, 429])
def test_what_no_waiting_mends_ends_the_job_at_once(tmp_path: Path, status: int) -> None:
    does = Behaviour(refuse=(status, '{"error": {"code": "insufficient_quota"}}'))
    with serving(does) as url:
        asked = engine(url, tmp_path, max_concurrency=1)
        with pytest.raises(JobFailed, match=str(status)) as caught:
            list(asked.generate([ask(f"p{i}") for i in range(50)]))
    assert sum(does.requests.values()) <= 2  # the second may be under way when the first ends
    assert "sk-very-secret" not in str(caught.value)


def test_a_bad_request_is_one_failed_item_that_is_asked_once(tmp_path: Path) -> None:
    does = Behaviour(refuse=(400, '{"error": {"message": "too long"}}'))
    with serving(does) as url:
        for _ in range(2):  # an error is no answer, so it is not kept
            (result,) = engine(url, tmp_path).generate([ask("x")])
            assert result.error is not None and "too long" in result.error
    assert does.requests == {"x": 2}


def test_attempts_are_bounded(tmp_path: Path) -> None:
    does = Behaviour(refuse=(503, "{}"))
    with serving(does) as url:
        (result,) = engine(url, tmp_path, max_attempts=3).generate([ask("x")])
    assert result.error is not None and does.requests == {"x": 3}


def test_retry_after_is_obeyed(tmp_path: Path) -> None:
    does = Behaviour(refuse=(429, "{}"), retry_after="0.3")
    with serving(does) as url:
        list(engine(url, tmp_path, max_attempts=2).generate([ask("x")]))
    assert does.times[1] - does.times[0] >= 0.3
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    seconds = _retry_after(email.utils.format_datetime(later, usegmt=True))
    assert seconds is not None and 60 < seconds <= 90
    assert _retry_after("soon") is None and _retry_after(None) is None


def test_limits_of_rate_and_concurrency(tmp_path: Path) -> None:
    does = Behaviour(seconds=0.02)
    with serving(does) as url:
        list(
            engine(url, tmp_path / "a", max_concurrency=3).generate(
                [ask(str(i)) for i in range(12)]
            )
        )
        assert does.most_under_way <= 3
        does.times.clear()
        paced = engine(url, tmp_path / "b", max_concurrency=8, requests_per_minute=1200)
        list(paced.generate([ask(str(i)) for i in range(10)]))
    assert does.times[-1] - does.times[0] >= 0.9 * 9 * 60 / 1200


def test_the_key_is_sent_and_written_nowhere(tmp_path: Path) -> None:
    does = Behaviour()
    with serving(does) as url:
        asked = engine(url, tmp_path, price=PRICE, spend=tmp_path / "spend", limit_usd=1.0)
        list(asked.generate([ask("x")]))
    assert does.authorization == ["Bearer sk-very-secret"]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"secret" not in written and b"word" in written


def test_the_newer_name_of_the_limit_is_learnt(tmp_path: Path) -> None:
    does = Behaviour(newer_limit=True)
    with serving(does) as url:
        asked = engine(url, tmp_path, max_concurrency=1)
        results = list(asked.generate([ask("a"), ask("b")]))
    assert [r.error for r in results] == [None, None]
    assert [("max_tokens" in b, b.get("max_completion_tokens")) for b in does.bodies] == [
        (True, None),
        (False, 8),
        (False, 8),
    ]


def test_the_stores_key_holds_all_that_determines_an_answer(tmp_path: Path) -> None:
    does = Behaviour()
    other = ask("q", stop=("\n",)), ask("q", max_new_tokens=9), ask("other")
    sampled = [ask("q", temperature=0.5, seed=seed, id=f"q|{seed}|0") for seed in (1, 2)]
    with serving(does) as url:
        for request in (ask("q"), *other, *sampled):
            list(engine(url, tmp_path).generate([request]))
        assert sum(does.requests.values()) == 6
        for request in (ask("q"), *other, *sampled):
            list(engine(url, tmp_path).generate([request]))
        assert sum(does.requests.values()) == 6
        HostedEngine(  # another model at the same address
            EngineConfig(name="openai", base_url=url, model="small"),
            place=EndpointPlace(answers=tmp_path),
        ).generate([ask("q")]).__next__()
    assert sum(does.requests.values()) == 7


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    does = Behaviour()
    with serving(does) as url:
        asked = engine(url, tmp_path, price=PRICE)
        results = list(asked.generate([ask("q", id="a|0|0"), ask("q", id="b|0|0")]))
        paid = asked.take_paid()
        again = engine(url, tmp_path, price=PRICE)
        list(again.generate([ask("q", id="a|0|0")]))
    assert {r.id for r in results} == {"a|0|0", "b|0|0"} and does.requests == {"q": 1}
    usd = (2 * 100 + 4 * 10 + 3 * 1000) / 1e6  # 6 prompt tokens of which 4 are cached, 3 written
    assert (paid.usd, paid.reused_usd) == (pytest.approx(usd), 0.0)
    assert (again.take_paid(), sum(r.computed_tokens for r in results)) == (
        again.take_paid().__class__(usd=0.0, reused_usd=pytest.approx(usd)),
        asked.rows_computed,
    )


def test_timed_requests_are_streamed_one_at_a_time(tmp_path: Path) -> None:
    does = Behaviour(seconds=0.02)
    requests = [ask("q", id=f"{i}|0|0") for i in range(3)]
    with serving(does) as url:
        results = list(engine(url, tmp_path).generate(requests, timed=True))
        again = list(engine(url, tmp_path).generate(requests, timed=True))
    assert does.most_under_way == 1 and does.requests == {"q": 3}
    assert again == results and all(r.text == answer_to("q") for r in results)
    for result in results:
        assert result.usage is not None and result.usage.prompt_tokens == 6
        assert result.first_token_seconds is not None and result.total_seconds is not None
        assert 0.02 <= result.first_token_seconds <= result.total_seconds


def test_labels_are_not_scored(tmp_path: Path) -> None:
    asked = engine("http://127.0.0.1:1/v1", tmp_path)
    with pytest.raises(ConfigError, match="answer_by=generate"):
        asked.score([ScoreRequest(id="a", prompt_ids=(1,), label_ids=((2,),))])


@pytest.mark.parametrize("limit_usd", [0.4, 0.8])
def test_the_ceiling_is_never_passed_with_16_workers(tmp_path: Path, limit_usd: float) -> None:
    does = Behaviour(faults=0.2, seconds=0.002)
    with serving(does) as url:
        asked = engine(
            url,
            tmp_path,
            price=PRICE,
            spend=tmp_path / "spend",
            limit_usd=limit_usd,
            max_concurrency=16,
            timeout_seconds=0.3,
        )
        with pytest.raises(BudgetReached, match="budget.max_usd"):
            list(asked.generate([ask(f"prompt {i}") for i in range(300)]))
    charged = sum(
        cost_usd(PRICE, prompt_tokens=p, cached_tokens=0, completion_tokens=c) or 0.0
        for p, c in does.charged_tokens
    )
    assert 0.1 * limit_usd < charged <= limit_usd


def reserve_all(path: str, limit_usd: float, found: Any) -> None:
    ceiling = Ceiling(Path(path), limit_usd=limit_usd)
    found.put(sum(ceiling.reserve(1.0) is not None for _ in range(100)))


def test_processes_share_a_ceiling(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    given = (str(tmp_path / "spend"), 70.5, found)
    processes = [context.Process(target=reserve_all, args=given) for _ in range(3)]
    for process in processes:
        process.start()
    assert sum(found.get(timeout=HANG_SECONDS) for _ in processes) == 70
    for process in processes:
        process.join()
    assert Ceiling(tmp_path / "spend", limit_usd=70.5).reserve(0.6) is None


def test_a_broken_line_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    store = AnswerStore(path)
    store.put("a", Reply(text="one"))
    store.close()
    path.write_bytes(path.read_bytes() + b'{"key": "b", "te')
    store = AnswerStore(path)
    assert (store.get("a"), store.get("b")) == (Reply(text="one"), None)
    store.put("c", Reply(text="three"))
    assert AnswerStore(path).get("c") == Reply(text="three")
    spend = tmp_path / "spend"
    ceiling = Ceiling(spend, limit_usd=3.0)
    assert ceiling.reserve(2.0) is not None
    spend.write_bytes(spend.read_bytes() + b'{"id": "x", "us')
    assert ceiling.reserve(2.0) is None and ceiling.reserve(1.0) is not None
    assert Ceiling(spend, limit_usd=3.0).reserve(0.1) is None


def answer_500(url: str, answers: str, spend: str) -> None:
    asked = engine(url, Path(answers), price=PRICE, spend=Path(spend), limit_usd=100.0)
    list(asked.generate([ask(f"prompt {i}") for i in range(500)]))


def num_lines(directory: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in directory.glob("*.jsonl"))


def stored_texts(directory: Path) -> set[str]:
    lines = [line for path in directory.glob("*.jsonl") for line in path.read_bytes().splitlines()]
    found = set()
    for line in lines:
        try:
            found.add(json.loads(line)["text"])
        except ValueError:
            continue
    return found


def test_nothing_stored_is_paid_twice_over_20_kills(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers, draw = tmp_path / "answers", random.Random(5)
    by_text = {answer_to(f"prompt {i}"): f"prompt {i}" for i in range(500)}
    stops = sorted(draw.sample(range(5, 480), 20))
    does, settled = Behaviour(allowed=0), dict[str, int]()
    with serving(does) as url:
        given = (url, str(answers), str(tmp_path / "spend"))
        for stop in stops:
            process = context.Process(target=answer_500, args=given)
            process.start()
            does.allow(stop)
            does.wait_until_held()
            time.sleep(draw.uniform(0.0, 0.01))
            assert process.pid is not None and process.is_alive()
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            for text in stored_texts(answers):
                settled.setdefault(by_text[text], does.requests[by_text[text]])
        assert 200 < len(settled) < 480
        does.allow(None)
        last = context.Process(target=answer_500, args=given)
        last.start()
        last.join()
    assert last.exitcode == 0 and len(stored_texts(answers)) == 500
    assert {prompt: does.requests[prompt] for prompt in settled} == settled
    assert num_lines(answers) - 500 <= 20  # a kill leaves at most a broken line
    assert sum(does.requests.values()) - 500 <= 20 * EngineConfig(name="openai").max_concurrency


def test_prices() -> None:
    tokens = {"prompt_tokens": 1000, "cached_tokens": 400, "completion_tokens": 10}
    assert cost_usd(PRICE, **tokens) == pytest.approx((600 * 100 + 400 * 10 + 10 * 1000) / 1e6)
    free = HostedPrice(input_usd_per_million=100.0, output_usd_per_million=1000.0)
    assert cost_usd(free, **tokens) == pytest.approx((1000 * 100 + 10 * 1000) / 1e6)
    assert cost_usd(PRICE, **{**tokens, "completion_tokens": None}) is None
    # UTF-8 bytes are at least tokens of any byte-level tokenizer.
    most = most_usd(PRICE, prompt_bytes=1000, turns=2, max_new_tokens=10)
    assert most > (1000 * 100 + 10 * 1000) / 1e6


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"base_url": None}, "engine.base_url"),
        ({"base_url": "api.example.com/v1"}, "engine.base_url"),
        ({"base_url": "https://me:pass@example.com/v1"}, "engine.base_url"),
        ({"model": None}, "engine.model"),
        ({"api_key_env": "NO_SUCH_KEY"}, "engine.api_key_env"),
    ],
)
def test_endpoints_that_cannot_be_asked_are_refused(given: dict[str, Any], where: str) -> None:
    config = {"base_url": "https://example.com/v1", "model": "m"} | given
    with pytest.raises(ConfigError, match=where) as caught:
        check_endpoint(EngineConfig(name="openai", **config))
    assert "pass@" not in str(caught.value)
    check_endpoint(EngineConfig(name="openai", base_url="http://127.0.0.1:8/v1", model="m"))
