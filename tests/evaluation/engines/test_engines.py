"""The transformers engine against plain forwards, and its bill against the hook."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.errors import ConfigError, ModelError
from conf.groups import EngineConfig
from evaluation.engines import build_engine
from evaluation.engines import forward as forward_module
from evaluation.engines.base import GenerateRequest, GenerateResult, ScoreRequest, ScoreResult
from evaluation.engines.rows import chain, common_prefix, label_tree, next_batch, paths
from evaluation.engines.transformers_engine import TransformersEngine
from tests.evaluation.plain_model import Codec, plain_greedy, plain_logprob, save_adapter

VOCABULARY = 300


def make_engine(model_dir: Path, **config: object) -> TransformersEngine:
    settings = EngineConfig(name="transformers", batch_size=4)
    for key, value in config.items():
        setattr(settings, key, value)
    engine = build_engine(
        settings,
        model_dir=model_dir,
        adapter_dir=None,
        renderer=Codec(model_dir),
        dtype="float32",
        device="cpu",
        threads=1,
        task=None,
    )
    assert isinstance(engine, TransformersEngine)
    return engine


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> TransformersEngine:
    return make_engine(tiny_model_dir)


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(tiny_model_dir)).eval()


def check_scores(
    engine: TransformersEngine, model: PreTrainedModel, requests: list[ScoreRequest]
) -> list[ScoreResult]:
    before = engine.rows_computed
    engine.take_shared()
    results = list(engine.score(requests))
    spent = engine.take_shared()
    assert sorted(r.id for r in results) == sorted(r.id for r in requests)
    by_id = {r.id: r for r in results}
    for request in requests:
        result = by_id[request.id]
        assert result.error is None
        wanted = [plain_logprob(model, request.prompt_ids, label) for label in request.label_ids]
        assert result.label_logprobs == pytest.approx(wanted, abs=1e-4)
        firsts = [plain_logprob(model, request.prompt_ids, ids[:1]) for ids in request.label_ids]
        assert result.first_token_logprobs == pytest.approx(firsts, abs=1e-4)
        assert result.cached_tokens <= len(request.prompt_ids) - 1
    own = sum(r.computed_tokens for r in results)
    assert own + spent.shared_tokens + spent.padding_tokens == engine.rows_computed - before
    return results


ODD = {
    "one item": [((5, 6, 7), ((8,), (9,)))],
    "an item equal to the prefix": [((5, 6, 7), ((8,), (9,))), ((5, 6, 7, 10, 11), ((8,), (9,)))],
    "equal items": [((5, 6, 7), ((8,),)), ((5, 6, 7), ((8,),))],
    "no shared prefix": [((5, 6), ((8,), (9,))), ((7,), ((8,), (9,)))],
    "one-token prompts": [((5,), ((8,), (9,))), ((5,), ((8,), (9,)))],
    "a label that starts another": [((5, 6, 7, 1), ((8,), (8, 9), (8, 9, 10), (8, 12), (13, 9)))],
    "labels of one item are others' prompts": [
        ((5, 6, 7), ((8, 9), (10, 11, 12))),
        ((5, 6, 7, 8), ((9, 10), (9, 11), (12,))),
        ((5, 6, 20, 21, 22, 23, 24), ((9,), (9,))),
    ],
}


@pytest.mark.parametrize("case", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("is_sharing", [True, False])
def test_scores_equal_a_plain_forward(
    tiny_model_dir: Path,
    plain: PreTrainedModel,
    case: list[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]],
    is_sharing: bool,
) -> None:
    engine = make_engine(tiny_model_dir, prefix_cache=is_sharing)
    requests = [
        ScoreRequest(id=str(i), prompt_ids=prompt, label_ids=labels)
        for i, (prompt, labels) in enumerate(case)
    ]
    results = check_scores(engine, plain, requests)
    if not is_sharing:
        assert all(result.cached_tokens == 0 for result in results)


ids = st.integers(1, VOCABULARY)
label_sets = st.lists(st.lists(ids, min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(
    prefix=st.lists(ids, max_size=6),
    rests=st.lists(
        st.tuples(st.lists(ids, min_size=1, max_size=9), label_sets), min_size=1, max_size=9
    ),
)
def test_any_requests_on_one_engine(
    engine: TransformersEngine,
    plain: PreTrainedModel,
    prefix: list[int],
    rests: list[tuple[list[int], list[list[int]]]],
) -> None:
    # The engine is shared by all examples, so prefixes of earlier calls are cut and extended.
    check_scores(
        engine,
        plain,
        [
            ScoreRequest(
                id=str(i),
                prompt_ids=(*prefix, *rest),
                label_ids=tuple(tuple(label) for label in labels),
            )
            for i, (rest, labels) in enumerate(rests)
        ],
    )


def test_a_prefix_is_paid_for_once_and_then_cut(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir)

    def ask(*prompts: tuple[int, ...]) -> tuple[int, int]:
        requests = [
            ScoreRequest(id=str(i), prompt_ids=p, label_ids=((9,),)) for i, p in enumerate(prompts)
        ]
        results = list(engine.score(requests))
        return engine.take_shared().shared_tokens, results[0].cached_tokens

    assert ask((1, 2, 3, 4, 5), (1, 2, 3, 4, 6)) == (4, 4)
    assert ask((1, 2, 3, 4, 7), (1, 2, 3, 4, 8)) == (0, 4)  # still there
    assert ask((1, 2, 3, 9), (1, 2, 3, 8)) == (0, 3)  # cut
    assert ask((1, 2, 3, 9, 1, 2), (1, 2, 3, 9, 1, 3)) == (2, 5)  # extended
    assert ask((1, 2, 3, 9, 4)) == (0, 4)  # one request alone uses what is there


def test_labels_of_several_tokens_share_their_prompt(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir, prefix_cache=False)
    request = ScoreRequest(
        id="a", prompt_ids=(1, 2, 3), label_ids=((4, 5), (4, 6, 7), (8, 9), (10,))
    )
    (result,) = engine.score([request])
    assert result.computed_tokens == 3 + 3  # the prompt once, and the inner nodes 4, 4-6 and 8


def random_requests(count: int, *, seed: int, **fields: object) -> list[GenerateRequest]:
    source = random.Random(seed)
    return [
        GenerateRequest(
            id=str(i),
            prompt_ids=(3, 4, 5, *(source.randint(1, VOCABULARY) for _ in range(1 + i % 5))),
            max_new_tokens=3 + i % 4,
            seed=i,
            **fields,  # type: ignore[arg-type]
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("is_sharing", [True, False])
def test_greedy_equals_a_plain_loop(
    tiny_model_dir: Path, plain: PreTrainedModel, is_sharing: bool
) -> None:
    engine = make_engine(tiny_model_dir, prefix_cache=is_sharing)
    requests = random_requests(11, seed=1)
    # Some answers end early, so that rows leave batches at different times.
    first = plain_greedy(plain, requests[0].prompt_ids, 3, end=0)
    end = first[1]
    engine._codec = Codec(tiny_model_dir, end_ids=(end,))
    results = {r.id: r for r in engine.generate(requests)}
    spent = engine.take_shared()
    lengths = set()
    for request in requests:
        wanted = plain_greedy(plain, request.prompt_ids, request.max_new_tokens, end=end)
        result = results[request.id]
        assert list(result.completion_ids) == wanted
        has_end = len(wanted) < request.max_new_tokens
        assert result.completion_tokens == len(wanted) + has_end
        forwarded = len(request.prompt_ids) + result.completion_tokens - 1
        assert result.cached_tokens + result.computed_tokens == forwarded
        lengths.add(len(wanted))
    assert len(lengths) > 1
    own = sum(r.computed_tokens for r in results.values())
    assert own + spent.shared_tokens + spent.padding_tokens == engine.rows_computed


def texts(results: Sequence[GenerateResult]) -> dict[str, tuple[int, ...]]:
    return {result.id: result.completion_ids for result in results}


def test_a_sampled_answer_does_not_depend_on_its_batch(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir)
    requests = random_requests(9, seed=2, temperature=1.0)
    together = texts(list(engine.generate(requests)))
    reversed_order = texts(list(engine.generate(requests[::-1])))
    alone = texts([result for request in requests for result in engine.generate([request])])
    assert together == reversed_order == alone
    other = texts(list(engine.generate(random_requests(9, seed=2, temperature=0.0))))
    assert together != other


def test_sampling_follows_the_softmax(tiny_model_dir: Path, plain: PreTrainedModel) -> None:
    engine = make_engine(tiny_model_dir, batch_size=256)
    prompt = (3, 4, 5)
    requests = [
        GenerateRequest(id=str(i), prompt_ids=prompt, max_new_tokens=1, temperature=0.2, seed=i)
        for i in range(2000)
    ]
    drawn = [r.completion_ids for r in engine.generate(requests)]
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([prompt])).logits[0, -1]
    probabilities = (logits / 0.2).softmax(-1)
    token = int(probabilities[1:].argmax()) + 1  # 0 ends an answer and is not among its ids
    share = sum(ids == (token,) for ids in drawn) / len(drawn)
    wanted = float(probabilities[token])
    assert share == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / 2000) ** 0.5)


def test_a_stop_string_ends_and_is_cut(tiny_model_dir: Path, plain: PreTrainedModel) -> None:
    engine = make_engine(tiny_model_dir)
    codec = Codec(tiny_model_dir)
    prompt = tuple(codec.encode("My invoice has a problem"))
    free = codec.decode(plain_greedy(plain, prompt, 8, end=0))
    stop = free[len(free) // 2 : len(free) // 2 + 2]
    (result,) = engine.generate(
        [GenerateRequest(id="a", prompt_ids=prompt, max_new_tokens=8, stop=("\x00no", stop))]
    )
    assert result.text == free[: free.index(stop)]
    assert result.completion_tokens < 8 or free.endswith(stop)


def test_timed_requests_go_one_by_one(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir)
    generate = random_requests(4, seed=3)
    results = list(engine.generate(generate, timed=True))
    assert [r.id for r in results] == [r.id for r in generate]
    for result in results:
        assert result.first_token_seconds is not None and result.total_seconds is not None
        assert 0 < result.first_token_seconds <= result.total_seconds
        assert result.cached_tokens == 3
    assert engine.take_shared().padding_tokens == 0
    score = [ScoreRequest(id=r.id, prompt_ids=r.prompt_ids, label_ids=((7,),)) for r in generate]
    scored = list(engine.score(score, timed=True))
    assert all(r.first_token_seconds == r.total_seconds and r.total_seconds for r in scored)
    assert all(r.total_seconds is None for r in engine.score(score))


def test_out_of_memory_halves_the_batch(
    tiny_model_dir: Path, plain: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model_dir, batch_size=8, prefix_cache=False)
    real = forward_module.CountedModel._hidden
    failures = 0

    def limited(self, ids, **rest):  # type: ignore[no-untyped-def]
        nonlocal failures
        hidden = real(self, ids, **rest)
        if ids.shape[0] > 2 or 299 in ids:
            failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden

    monkeypatch.setattr(forward_module.CountedModel, "_hidden", limited)
    requests = [
        ScoreRequest(id=str(i), prompt_ids=tuple(range(1, 3 + i)), label_ids=((9, 10), (11,)))
        for i in range(7)
    ]
    check_scores(engine, plain, requests)
    assert failures == 2  # batches of 7 and 3 rows are lost, then one row at a time
    lost = list(engine.score([ScoreRequest(id="x", prompt_ids=(299,), label_ids=((1,),))]))
    assert lost[0].error is not None and lost[0].label_logprobs == ()
    answers = random_requests(5, seed=4)
    before = engine.rows_computed
    engine.take_shared()
    results = list(engine.generate(answers))
    spent = engine.take_shared()
    assert all(result.error is None for result in results)
    own = sum(result.computed_tokens for result in results)
    assert own + spent.padding_tokens == engine.rows_computed - before


def test_other_errors_are_not_swallowed(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model_dir)

    def broken(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(forward_module.CountedModel, "_hidden", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        list(engine.score([ScoreRequest(id="x", prompt_ids=(2,), label_ids=((1,),))]))


def test_adapters_are_swapped_and_taken_off(
    tiny_model_dir: Path, plain: PreTrainedModel, tmp_path: Path
) -> None:
    from peft import PeftModel

    engine = make_engine(tiny_model_dir)
    requests = [
        ScoreRequest(id=str(i), prompt_ids=(5, 6, 7, 8 + i), label_ids=((9, 10), (11,)))
        for i in range(3)
    ]
    base = check_scores(engine, plain, requests)
    seen = [base[0].label_logprobs]
    for seed in (1, 2):
        save_adapter(tiny_model_dir, tmp_path / str(seed), seed=seed)
        engine.set_adapter(tmp_path / str(seed))
        fresh = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir))
        reference = PeftModel.from_pretrained(fresh, str(tmp_path / str(seed))).eval()
        seen.append(check_scores(engine, reference, requests)[0].label_logprobs)
    engine.set_adapter(None)
    assert check_scores(engine, plain, requests)[0].label_logprobs == base[0].label_logprobs
    assert len(set(seen)) == 3


def test_a_pickled_adapter_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"not read")
    with pytest.raises(ModelError, match="safetensors"):
        make_engine(tiny_model_dir).set_adapter(tmp_path)


def test_engines_by_name(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.base_url"):
        make_engine(tiny_model_dir, name="openai")
    with pytest.raises(ConfigError, match="transformers, scripted"):
        make_engine(tiny_model_dir, name="magic")


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=5))
def test_common_prefix_by_brute_force(sequences: list[list[int]]) -> None:
    wanted = 0
    while all(len(s) > wanted for s in sequences) and len({s[wanted] for s in sequences}) == 1:
        wanted += 1
    assert common_prefix(sequences) == wanted


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=6))
def test_a_tree_and_its_paths_spell_the_labels(labels: list[list[int]]) -> None:
    rest = (7, 8)
    tree = label_tree(0, rest, labels)
    inner = {tuple(label[:k]) for label in labels for k in range(1, len(label))}
    assert len(tree.tokens) == len(rest) + len(inner)
    for rows in ([tree], paths(tree)):
        spelled: dict[int, list[int]] = {index: [] for index in range(len(labels))}
        for row in rows:
            for piece in row.pieces:
                context = []
                node = piece.node
                while node >= 0:
                    context.append(row.tokens[node])
                    node = row.parents[node]
                assert context[::-1][:2] == list(rest)
                assert context[::-1][2:] == labels[piece.label][: len(context) - 2]
                spelled[piece.label].append(piece.token)
        assert {k: sorted(v) for k, v in spelled.items()} == {
            index: sorted(label) for index, label in enumerate(labels)
        }
    assert all(row.is_chain for row in paths(tree))


@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(1, 20))
def test_batches_hold_all_rows_and_little_padding(lengths: list[int], size: int) -> None:
    pending = [chain(i, [1] * n) for i, n in enumerate(sorted(lengths, reverse=True))]
    seen = []
    while pending:
        batch = next_batch(pending, size=size, max_padding_share=0.1)
        assert 1 <= len(batch) <= size
        seen += batch
        pending = pending[len(batch) :]
        tokens = sum(len(row.tokens) for row in batch)
        padding = len(batch) * len(batch[0].tokens) - tokens
        # Only the row that brings a batch over the least number of tokens may be short.
        assert padding <= 0.1 * tokens or tokens - len(batch[-1].tokens) < 128
    assert [row.request for row in seen] == list(range(len(lengths)))


@pytest.mark.parametrize("count", [1, 6])
def test_models_without_a_free_mask(
    tiny_model_dir: Path, plain: PreTrainedModel, count: int
) -> None:
    engine = make_engine(tiny_model_dir)
    engine._model.is_free = engine._model._is_sharing = False  # as for a sliding window
    requests = [
        ScoreRequest(id=str(i), prompt_ids=(5, 6, *range(i)), label_ids=((9, 10), (9, 11), (1, 2)))
        for i in range(count)
    ]
    check_scores(engine, plain, requests)
    answers = random_requests(count, seed=5)
    for result in engine.generate(answers):
        request = answers[int(result.id)]
        wanted = plain_greedy(plain, request.prompt_ids, request.max_new_tokens, end=0)
        assert list(result.completion_ids) == wanted
