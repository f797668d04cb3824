"""The forest engine against plain forwards; its rows against sets of prefixes and the hook."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from conf.errors import JobFailed
from conf.groups import EngineConfig
from evaluation.engines import build_engine
from evaluation.engines.base import GenerateRequest, GenerateResult, ScoreRequest, ScoreResult
from evaluation.engines.forest_engine import ForestEngine
from evaluation.engines.forest_model import ForestModel
from tests.evaluation.plain_model import Codec, plain_greedy, plain_logprob, save_adapter

VOCABULARY = 300


def make_engine(model_dir: Path, *, impl: str = "auto", **config: object) -> ForestEngine:
    engine = build_engine(
        EngineConfig(name="forest", **config),
        model_dir=model_dir,
        adapter_dir=None,
        renderer=Codec(model_dir),
        dtype="float32",
        device="cpu",
        threads=1,
        task=None,
        kernels_impl=impl,
    )
    assert isinstance(engine, ForestEngine)
    return engine


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(tiny_model_dir)).eval()


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[ForestEngine]:
    yield make_engine(tiny_model_dir, batch_size=4, batch_tokens=24)


def score_requests(source: random.Random, count: int) -> list[ScoreRequest]:
    """Requests that share beginnings at two levels; labels may begin one another."""

    def text(least: int, most: int) -> tuple[int, ...]:
        return tuple(source.randrange(1, VOCABULARY) for _ in range(source.randint(least, most)))

    run, wordings = text(0, 20), [text(1, 5) for _ in range(2)]
    first = text(1, 3)
    labels = (first, (*first, 7), (*first, 7, 8), text(1, 4), text(4, 4))
    labels = tuple(dict.fromkeys(labels))
    return [
        ScoreRequest(
            id=str(index),
            prompt_ids=run + source.choice(wordings) + text(0, 8),
            label_ids=labels,
            label_offsets=tuple(source.uniform(-3, 3) for _ in labels),
        )
        for index in range(count)
    ]


def needed(requests: Sequence[ScoreRequest]) -> set[tuple[int, ...]]:
    found = set()
    for request in requests:
        prompt = request.prompt_ids
        found |= {prompt[:end] for end in range(1, len(prompt) + 1)}
        found |= {prompt + label[:end] for label in request.label_ids for end in range(len(label))}
    return found


def check_bill(engine: ForestEngine, results: Sequence[object], before: int) -> int:
    """Rows billed are rows counted by the hook; returns them."""
    spent = engine.take_shared()
    own = sum(result.computed_tokens for result in results)  # type: ignore[attr-defined]
    rows = engine.rows_computed - before
    assert own + spent.shared_tokens + spent.padding_tokens == rows
    return rows


def check_scores(
    engine: ForestEngine, model: PreTrainedModel, requests: Sequence[ScoreRequest]
) -> list[ScoreResult]:
    engine.take_shared()
    before = engine.rows_computed
    results = list(engine.score(requests))
    check_bill(engine, results, before)
    assert sorted(r.id for r in results) == sorted(r.id for r in requests)
    by_id = {r.id: r for r in results}
    for request in requests:
        result = by_id[request.id]
        assert result.error is None
        wanted = [plain_logprob(model, request.prompt_ids, label) for label in request.label_ids]
        assert result.label_logprobs == pytest.approx(wanted, abs=1e-4)
        firsts = [plain_logprob(model, request.prompt_ids, la[:1]) for la in request.label_ids]
        assert result.first_token_logprobs == pytest.approx(firsts, abs=1e-4)
    return results


@pytest.mark.parametrize("seed", range(6))
def test_scores_and_rows(
    tiny_model_dir: Path, engine: ForestEngine, plain: PreTrainedModel, seed: int
) -> None:
    """Log-probabilities of the plain path; rows computed are the distinct needed prefixes."""
    source = random.Random(seed)
    requests = score_requests(source, source.randint(1, 9))
    engine.set_adapter(None)  # forget what the test before left
    before, projected = engine.rows_computed, engine.rows_projected
    results = check_scores(engine, plain, requests)
    rows = needed(requests)
    assert engine.rows_computed - before == len(rows)
    scored = {
        request.prompt_ids + label[:end]
        for request in requests
        for label in request.label_ids
        for end in range(len(label))
    }
    assert engine.rows_projected - projected == len(scored)
    winners = {r.id: r for r in engine.score(requests, winner_only=True)}
    for request, result in zip(requests, sorted(results, key=lambda r: int(r.id)), strict=True):
        found = winners[request.id]
        values = [a + b for a, b in zip(result.label_logprobs, request.label_offsets, strict=True)]
        assert found.winner is not None and found.winner_logprob is not None
        assert values[found.winner] == pytest.approx(max(values), abs=1e-4)
        wanted = result.label_logprobs[found.winner]
        assert found.winner_logprob == pytest.approx(wanted, abs=1e-4)
        assert found.label_logprobs == ()


def test_the_reference_kernels_give_the_same(tiny_model_dir: Path, plain: PreTrainedModel) -> None:
    engine = make_engine(tiny_model_dir, impl="reference")
    assert set(engine.kernels) == {"shared_prefix_attention", "token_logprobs", "linear"}
    assert all(text.startswith("reference") for text in engine.kernels.values())
    check_scores(engine, plain, score_requests(random.Random(9), 5))


def test_an_earlier_call_leaves_its_prefix(tiny_model_dir: Path, plain: PreTrainedModel) -> None:
    """A later call, and a timed one, compute only what is new; another prefix replaces it."""
    engine = make_engine(tiny_model_dir)
    shared = tuple(range(10, 40))

    def ask(*lasts: int, prefix: tuple[int, ...] = shared) -> list[ScoreRequest]:
        return [
            ScoreRequest(id=str(last), prompt_ids=(*prefix, last), label_ids=((5,), (6, 7)))
            for last in lasts
        ]

    def rows(requests: list[ScoreRequest]) -> int:
        before = engine.rows_computed
        check_scores(engine, plain, requests)
        return engine.rows_computed - before

    assert rows(ask(1, 2)) == 30 + 2 * 2
    assert rows(ask(3, 4, 5)) == 3 * 2
    (timed,) = engine.score(ask(6), timed=True)
    assert timed.computed_tokens == 2 and timed.cached_tokens == 30
    assert timed.total_seconds is not None
    assert rows(ask(1, 2, prefix=shared[:10])) == 2 * 2
    assert rows(ask(3, 4)) == 20 + 2 * 2
    off = make_engine(tiny_model_dir, prefix_cache=False)
    check_scores(off, plain, ask(1, 2))
    assert off.rows_computed == 34
    check_scores(off, plain, ask(1, 2))
    assert off.rows_computed == 68


def generate_requests(
    source: random.Random, count: int, **options: object
) -> list[GenerateRequest]:
    scores = score_requests(source, count)
    return [
        GenerateRequest(
            id=request.id,
            prompt_ids=request.prompt_ids,
            max_new_tokens=source.randint(1, 9),
            seed=index,
            **options,  # type: ignore[arg-type]
        )
        for index, request in enumerate(scores)
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_greedy_equals_a_plain_loop(
    tiny_model_dir: Path, plain: PreTrainedModel, seed: int, slots: int
) -> None:
    """Whatever enters and leaves; prompt rows are computed once, answers one row a token."""
    source = random.Random(seed)
    requests = generate_requests(source, 8)
    requests.append(GenerateRequest(id="same", prompt_ids=requests[0].prompt_ids, max_new_tokens=7))
    engine = make_engine(tiny_model_dir, batch_size=slots, batch_tokens=16)
    results = list(engine.generate(requests))
    by_id = {result.id: result for result in results}
    for request in requests:
        wanted = plain_greedy(plain, request.prompt_ids, request.max_new_tokens, end=0)
        assert list(by_id[request.id].completion_ids) == wanted
    prompts = {r.prompt_ids[:end] for r in requests for end in range(1, len(r.prompt_ids) + 1)}
    answers = sum(result.completion_tokens - 1 for result in results)
    assert check_bill(engine, results, 0) == len(prompts) + answers


def test_slots_grow_when_answers_are_long(tiny_model_dir: Path, plain: PreTrainedModel) -> None:
    requests = [
        GenerateRequest(id=str(i), prompt_ids=(5, 6, 7 + i), max_new_tokens=70) for i in range(3)
    ]
    engine = make_engine(tiny_model_dir)
    for result in engine.generate(requests):
        prompt = requests[int(result.id)].prompt_ids
        assert list(result.completion_ids) == plain_greedy(plain, prompt, 70, end=0)


def completions(results: Sequence[GenerateResult]) -> dict[str, tuple[int, ...]]:
    return {result.id: result.completion_ids for result in results}


def test_a_sampled_answer_does_not_depend_on_its_batch(engine: ForestEngine) -> None:
    requests = generate_requests(random.Random(2), 9, temperature=1.0)
    together = completions(list(engine.generate(requests)))
    reversed_order = completions(list(engine.generate(requests[::-1])))
    alone = completions([r for request in requests for r in engine.generate([request])])
    assert together == reversed_order == alone
    greedy = completions(list(engine.generate(generate_requests(random.Random(2), 9))))
    assert together != greedy


def test_timed_answers(engine: ForestEngine) -> None:
    requests = generate_requests(random.Random(3), 3)
    results = list(engine.generate(requests, timed=True))
    assert [r.id for r in results] == [r.id for r in requests]
    for result in results:
        assert result.first_token_seconds is not None and result.total_seconds is not None
        assert 0 < result.first_token_seconds <= result.total_seconds


@pytest.mark.parametrize("limit", [1, 5, 20])
def test_out_of_memory_loses_nothing(
    tiny_model_dir: Path, plain: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Passes of more than `limit` rows fail late; scores, answers and the bill stay right."""
    real = ForestModel._run

    def limited(self, tokens, places, state):  # type: ignore[no-untyped-def]
        hidden = real(self, tokens, places, state)
        if len(tokens) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden

    engine = make_engine(tiny_model_dir, batch_size=8)
    monkeypatch.setattr(ForestModel, "_run", limited)
    requests = score_requests(random.Random(5), 6)
    check_scores(engine, plain, requests)
    answers = generate_requests(random.Random(6), 6)
    before = engine.rows_computed
    results = list(engine.generate(answers))
    check_bill(engine, results, before)
    found = completions(results)
    for request in answers:
        wanted = plain_greedy(plain, request.prompt_ids, request.max_new_tokens, end=0)
        assert list(found[request.id]) == wanted


def test_a_request_that_never_fits_fails_alone(
    tiny_model_dir: Path, plain: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ForestModel._run

    def poisoned(self, tokens, places, state):  # type: ignore[no-untyped-def]
        hidden = real(self, tokens, places, state)
        if 299 in tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden

    engine = make_engine(tiny_model_dir)
    monkeypatch.setattr(ForestModel, "_run", poisoned)
    prompts = [(5, 6, 7), (5, 6, 299, 8), (5, 6, 9)]
    scores = [
        ScoreRequest(id=str(i), prompt_ids=p, label_ids=((1,), (2, 3)))
        for i, p in enumerate(prompts)
    ]
    results = {r.id: r for r in engine.score(scores)}
    assert results["1"].error is not None and results["1"].label_logprobs == ()
    check_bill(engine, list(results.values()), 0)
    for index in (0, 2):
        wanted = [plain_logprob(plain, prompts[index], label) for label in ((1,), (2, 3))]
        assert results[str(index)].label_logprobs == pytest.approx(wanted, abs=1e-4)
    answers = [
        GenerateRequest(id=str(i), prompt_ids=p, max_new_tokens=3) for i, p in enumerate(prompts)
    ]
    before = engine.rows_computed
    made = list(engine.generate(answers))
    assert {r.id for r in made if r.error} == {"1"} and len(made) == 3
    check_bill(engine, made, before)


def test_logits_that_are_not_finite_stop_the_job(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ForestModel._run
    engine = make_engine(tiny_model_dir)
    monkeypatch.setattr(ForestModel, "_run", lambda *a: real(*a) * float("nan"))
    with pytest.raises(JobFailed, match="not finite"):
        list(engine.score(score_requests(random.Random(1), 2)))
    with pytest.raises(JobFailed, match="not finite"):
        list(engine.generate(generate_requests(random.Random(1), 2)))


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True, "lora_alpha": 3}, {"use_dora": True}, {"lora_bias": True}],
    ids=str,
)
def test_adapters_are_swapped_and_taken_off(
    tiny_model_dir: Path, plain: PreTrainedModel, tmp_path: Path, config: dict[str, object]
) -> None:
    from peft import PeftModel

    engine = make_engine(tiny_model_dir)
    requests = score_requests(random.Random(8), 3)
    base = check_scores(engine, plain, requests)
    for seed in (1, 2):
        path = tmp_path / str(seed)
        save_adapter(tiny_model_dir, path, seed=seed, **config)
        engine.set_adapter(path)
        fresh = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir))
        reference = PeftModel.from_pretrained(fresh, str(path)).eval()
        tuned = check_scores(engine, reference, requests)
        assert tuned[0].label_logprobs != base[0].label_logprobs
    engine.set_adapter(None)
    assert check_scores(engine, plain, requests)[0].label_logprobs == base[0].label_logprobs


def test_an_adapter_on_the_head(
    tiny_model_dir: Path, plain: PreTrainedModel, tmp_path: Path
) -> None:
    from peft import PeftModel

    engine = make_engine(tiny_model_dir)
    save_adapter(tiny_model_dir, tmp_path, seed=3, target_modules=["q_proj", "lm_head"])
    engine.set_adapter(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir))
    reference = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    requests = score_requests(random.Random(8), 3)
    check_scores(engine, reference, requests)
    engine.set_adapter(None)
    check_scores(engine, plain, requests)


def test_grouped_heads(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Six query heads on two key heads, and biases, in trees, slots and on the stack."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(str(tmp_path))
    (tmp_path / "tokenizer.json").write_bytes((tiny_model_dir / "tokenizer.json").read_bytes())
    engine = make_engine(tmp_path, batch_tokens=16)
    check_scores(engine, model, score_requests(random.Random(4), 6))
    for result in engine.generate(generate_requests(random.Random(4), 5)):
        request = generate_requests(random.Random(4), 5)[int(result.id)]
        wanted = plain_greedy(model, request.prompt_ids, request.max_new_tokens, end=0)
        assert list(result.completion_ids) == wanted


@pytest.mark.parametrize("case", ["a window", "attention that cannot be set"])
def test_a_model_that_attends_otherwise_takes_the_transformers_engine(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """The reason is kept, and the answers are right."""
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

    torch.manual_seed(0)
    window = 4 if case == "a window" else None
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )
    model = MistralForCausalLM(config).eval()
    model.save_pretrained(str(tmp_path))
    (tmp_path / "tokenizer.json").write_bytes((tiny_model_dir / "tokenizer.json").read_bytes())
    if window is None:
        monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", lambda *_: None)
    engine = build_engine(
        EngineConfig(name="forest"),
        model_dir=tmp_path,
        adapter_dir=None,
        renderer=Codec(tiny_model_dir),
        dtype="float32",
        device="cpu",
        threads=1,
        task=None,
    )
    assert engine.name == "transformers"
    assert "instead of forest" in engine.kernels["engine"]  # type: ignore[attr-defined]
    check_scores(engine, model, score_requests(random.Random(2), 3))  # type: ignore[arg-type]
