"""The harness judges rightly: counts, bounds, intervals, parity, workloads (no clock, no peers)."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from conf.errors import DataError, Refused
from tests.benchmarks import harness, ours, rows, run, workloads
from tests.benchmarks.bounds import Shape, Work, full_runs, needed
from tests.benchmarks.harness import Arm, Ratio, Result, Trace, measure, parity_of, ratio_of
from tests.benchmarks.parity import Answer, Completion, Parity, Scores, Winner, compare
from tests.benchmarks.scoring_peers import PlainBaseline, load_model
from tests.benchmarks.workloads import Builder, Workload

KEYS = (  # fixed by the contract: other tools read them
    "name work ours peer peer_version ratio ratio_low ratio_high floor bound unit parity hardware "
    "versions commit date command"
)
short_ids = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SETTLE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def builder(tiny_model_dir: Path) -> Builder:
    return Builder(tiny_model_dir, data=None)


def small(builder: Builder, *, labels: int = 9) -> Workload:
    (workload,) = builder.few_shot("banking77", shots=3, items=3, chunks=1)
    return workload.first(3, labels=labels)


# -- bounds ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(short_ids, short_ids), min_size=1, max_size=12))
def test_needed_rows_are_the_distinct_prefixes(pairs: list[tuple[tuple[int, ...], ...]]) -> None:
    prefixes, read = set(), set()
    for prompt, continuation in pairs:
        whole = prompt + continuation[:-1]
        prefixes |= {whole[:n] for n in range(1, len(whole) + 1)}
        read |= {whole[:n] for n in range(len(prompt), len(whole) + 1)}
    expected = Work(rows=len(prefixes), keys=sum(map(len, prefixes)), heads=len(read))
    assert needed((a, b) for a, b in pairs) == expected


def test_full_runs_share_only_equal_rows() -> None:
    pairs = [((1, 2), (3,)), ((1, 2), (4,)), ((1, 2), (3, 4, 5))]
    plain = full_runs(pairs, is_all_projected=False)
    assert plain == Work(rows=2 + 4, keys=3 + 10, heads=1 + 3)
    assert full_runs(pairs, is_all_projected=True).heads == 2 + 4


def test_operations_are_those_that_torch_counts(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir, is_shipped=True, attention="eager")
    length, read = 13, 4
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None], logits_to_keep=read)
    work = Work(rows=length, keys=length * length, heads=read)  # torch counts all keys
    assert Shape.read(tiny_model_dir).flops(work) == counter.get_total_flops()


# -- ratios ----------------------------------------------------------------------------------------


def test_ratio_is_the_median_of_pairs_with_its_bootstrap_interval() -> None:
    ours_seconds, peer_seconds = [1.0, 2.0, 4.0], [3.0, 10.0, 28.0]  # ratios 3, 5, 7
    found = ratio_of(ours_seconds, peer_seconds)
    medians = [statistics.median(draw) for draw in itertools.product([3, 5, 7], repeat=3)]
    assert found.median == 5
    assert min(medians) == found.low and max(medians) == found.high
    spread = ratio_of([1.0] * 9, [float(k) for k in range(1, 10)])
    assert 1 < spread.low < spread.median == 5 < spread.high < 9


def test_one_round_has_no_width() -> None:
    assert ratio_of([2.0], [5.0]) == Ratio(median=2.5, low=2.5, high=2.5)


def test_arms_are_interleaved_and_see_the_same_chunks(builder: Builder) -> None:
    chunks = builder.few_shot("arc_easy", shots=1, items=1, chunks=2)
    seen: list[tuple[str, int]] = []

    def make(name: str) -> Arm:
        def answer(workload: Workload) -> list[Answer]:
            seen.append((name, chunks.index(workload)))
            return [Scores(logprobs=(0.0,))]

        return Arm(name=name, version="", run=answer, prepare=lambda: seen.append((name, -1)))

    traces = measure([make("a"), make("b")], chunks, rounds=3)
    assert [s for s in seen if s[1] >= 0] == [
        ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 0), ("b", 0)
    ]  # fmt: skip
    assert seen[::2] == [(name, -1) for name, _ in seen[1::2]]
    assert all(len(trace.seconds) == 3 for trace in traces.values())


def result(**changes: object) -> Result:
    fields = {
        "name": "row", "work": "w", "ours": 1.0, "peer": 5.0, "peer_version": "p 1",
        "ratio": Ratio(median=5.0, low=4.0, high=6.0), "floor": 4.0, "aim": None, "bound": 8.0,
        "unit": "seconds per item", "parity": Parity(checked=3, ok=True, worst=0.0),
    }  # fmt: skip
    return Result(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"floor": 6.0}, ""),  # the interval still reaches it
        ({"floor": 6.1}, "floor 6.1x missed"),
        ({"bound": 4.6}, ""),  # within a tenth: the best rate was measured apart
        ({"bound": 4.5}, "broken benchmark"),
        ({"parity": Parity(checked=3, ok=False, worst=1.0, why="item 2")}, "parity: item 2"),
    ],
)
def test_a_row_fails_for_its_floor_its_bound_and_parity(
    changes: dict[str, object], words: str
) -> None:
    row = result(**changes)
    row.judge()
    assert [words in failure for failure in row.failures] == ([True] if words else [])


def test_the_written_keys_are_those_of_the_contract(tmp_path: Path) -> None:
    harness.write(result(), tmp_path)
    found = json.loads((tmp_path / "row.json").read_text())
    assert set(KEYS.split()) <= set(found)
    assert {"checked", "ok", "worst"} <= set(found["parity"])
    assert found["peer"] / found["ours"] == found["ratio"]


# -- parity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours_answer", "peer_answer", "is_ok", "ties"),
    [
        (Scores(logprobs=(-1.0, -2.0)), Scores(logprobs=(-1.00005, -2.0)), True, 0),
        (Scores(logprobs=(-1.0, -2.0)), Scores(logprobs=(-1.0003, -2.0)), False, 0),
        (Scores(logprobs=(-50.0, -60.0)), Scores(logprobs=(-50.004, -60.0)), True, 0),
        (Scores(logprobs=(-9.0, -9.0001)), Scores(logprobs=(-9.0002, -9.0)), True, 1),
        (Scores(logprobs=(-1.0, float("nan"))), Scores(logprobs=(-1.0, -2.0)), False, 0),
        (Scores(logprobs=(-1.0,)), Scores(logprobs=(-1.0, -2.0)), False, 0),
        (Winner(index=0, logprob=-1.0), Scores(logprobs=(-1.0, -2.0)), True, 0),
        (Winner(index=1, logprob=-2.0), Scores(logprobs=(-1.0, -2.0)), False, 1),
        (Winner(index=1, logprob=-1.0005), Scores(logprobs=(-1.0, -1.0005)), True, 1),
        (Winner(index=0, logprob=-1.2), Scores(logprobs=(-1.0, -2.0)), False, 0),
    ],
)
def test_scores_agree_within_tolerance_or_as_ties(
    ours_answer: Scores | Winner, peer_answer: Scores, is_ok: bool, ties: int
) -> None:
    found = compare([ours_answer], [peer_answer])
    assert (found.ok, found.ties, found.checked) == (is_ok, ties, 1)
    assert bool(found.why) != is_ok


def test_more_than_a_thousandth_of_ties_is_no_parity() -> None:
    same = (Winner(index=0, logprob=-1.0), Scores(logprobs=(-1.0, -2.0)))
    tie = (Winner(index=1, logprob=-1.0005), Scores(logprobs=(-1.0, -1.0005)))
    for pairs, is_ok in (([tie] + [same] * 9, True), ([tie] * 2 + [same] * 9, False)):
        a, b = zip(*pairs, strict=True)
        assert compare(a, b).ok is is_ok
    a, b = zip(*[tie] * 2, *[same] * 1998, strict=True)
    assert compare(a, b).ok


def test_completions_may_part_at_a_tie_only() -> None:
    asked: list[tuple[int, tuple[int, ...], int, int]] = []

    def gap(item: int, ids: tuple[int, ...], a: int, b: int) -> float:
        asked.append((item, ids, a, b))
        return 5e-4 if a == 8 else 0.1

    same = compare([Completion(ids=(1, 2))], [Completion(ids=(1, 2))], gap=gap)
    assert same.ok and not asked
    parted = [Completion(ids=(1, 8, 3))], [Completion(ids=(1, 9, 4))]
    assert compare(*parted, gap=gap).ok
    assert asked == [(0, (1,), 8, 9)]
    assert not compare(*reversed(parted), gap=gap).ok
    assert not compare([Completion(ids=(1,))], [Completion(ids=(1, 2))], gap=gap).ok


def test_missing_answers_are_no_parity() -> None:
    assert not compare([], [Scores(logprobs=(0.0,))]).ok


# -- workloads -------------------------------------------------------------------------------------


def test_workloads_tokenise_jointly_and_differ_by_chunk(builder: Builder) -> None:
    chunks = builder.few_shot("banking77", shots=8, items=4, chunks=3)
    prompts = [item.prompt_ids for chunk in chunks for item in chunk.items]
    assert len(set(prompts)) == 12
    for item in (item for chunk in chunks for item in chunk.items):
        assert len(item.label_ids) == len(set(item.label_ids)) == 77
        for ending, ids in zip(item.endings, item.label_ids, strict=True):
            assert builder.encode(item.context + ending) == item.prompt_ids + ids
    text = chunks[0].items[0].context
    shots = [line for line in text.splitlines() if line.startswith("Intent: ")]
    assert len(set(shots)) == len(shots) == 8


@pytest.mark.parametrize("name", ["banking77", "sms_spam", "arc_easy"])
def test_a_long_prefix_is_asked_for_in_tokens(builder: Builder, name: str) -> None:
    (chunk,) = builder.few_shot(name, shots=2, items=3, chunks=1, min_prefix=500)
    assert chunk.prefix_tokens >= 500


def test_each_wording_is_met_once(builder: Builder) -> None:
    assert len(set(workloads.WORDINGS)) == 20
    chunks = builder.wordings(items=3, chunks=5, shots=2)
    heads = [item.context.split("\n")[0] for chunk in chunks for item in chunk.items]
    assert {heads.count(wording) for wording in workloads.WORDINGS} == {3}


def test_new_tokens_run_from_16_to_48(builder: Builder) -> None:
    (chunk,) = builder.generation(items=32, chunks=1)
    assert (min(chunk.new_tokens), max(chunk.new_tokens), len(chunk.new_tokens)) == (16, 48, 32)


def test_rows_come_from_a_directory(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(DataError, match="train.jsonl"):
        Builder(tiny_model_dir, data=tmp_path).few_shot("banking77", shots=1, items=1, chunks=1)
    (tmp_path / "banking77").mkdir()
    for split in ("train", "test"):
        lines = [{"input": f"text {k}", "label": f"a_{k % 3}"} for k in range(6)]
        path = tmp_path / "banking77" / f"{split}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
    builder = Builder(tiny_model_dir, data=tmp_path)
    (chunk,) = builder.few_shot("banking77", shots=2, items=4, chunks=1)
    assert chunk.items[0].endings == (" a 0", " a 1", " a 2")
    with pytest.raises(DataError, match="6 test rows"):
        builder.few_shot("banking77", shots=1, items=4, chunks=2)


# -- our side and the plain baseline ---------------------------------------------------------------


def brute_force(model_dir: Path, workload: Workload) -> list[Scores]:
    model = load_model(model_dir, is_shipped=True).double()
    found = []
    for item in workload.items:
        sums = []
        for label in item.label_ids:
            ids = torch.tensor([item.prompt_ids + label])
            with torch.no_grad():
                logprobs = model(ids).logits[0].log_softmax(-1)
            at = range(len(item.prompt_ids) - 1, ids.shape[1] - 1)
            sums.append(sum(logprobs[i, ids[0, i + 1]].item() for i in at))
        found.append(Scores(logprobs=tuple(sums)))
    return found


@pytest.mark.parametrize("is_cached", [True, False])
def test_the_plain_baseline_is_right_in_any_batch(
    tiny_model_dir: Path, builder: Builder, is_cached: bool
) -> None:
    workload = small(builder)
    expected = brute_force(tiny_model_dir, workload)
    model = load_model(tiny_model_dir)
    for batch in (1, 4, 7):
        baseline = PlainBaseline(model, batch=batch, is_cached=is_cached)
        assert compare(baseline.score(workload), expected).ok
        assert bool(baseline.kv_bytes) is is_cached


@pytest.mark.parametrize("kind", ["all", "winner"])
def test_our_arm_is_right_and_computes_no_row_twice(
    tiny_model_dir: Path, builder: Builder, kind: str
) -> None:
    workload = small(builder)
    engine = ours.load_engine("forest", tiny_model_dir, builder, threads=1)
    arm = ours.our_arm(engine, kind=kind)
    for _ in range(2):  # the second run must not find what the first one left
        gate = ours.gate(engine, arm, workload)
        assert gate.is_exact if kind == "all" else gate.rows >= gate.needed.rows
        assert gate.kv_bytes > 0
    assert compare(arm.run(workload), brute_force(tiny_model_dir, workload)).ok


def test_lengths_of_generated_answers_are_fixed(tiny_model_dir: Path, builder: Builder) -> None:
    (workload,) = builder.generation(items=3, chunks=1, shots=2)
    engine = ours.load_engine("forest", tiny_model_dir, builder, threads=1)
    arm = ours.our_arm(engine, kind="generate")
    answers = arm.run(workload)
    assert [len(a.ids) for a in answers if isinstance(a, Completion)] == list(workload.new_tokens)
    assert ours.gate(engine, arm, workload).is_exact


def test_winners_narrow_what_is_needed(builder: Builder) -> None:
    workload = small(builder)
    winners = [Winner(index=0, logprob=0.0)] * 3
    assert ours.continued(workload, winners) == [
        (item.prompt_ids, item.label_ids[0]) for item in workload.items
    ]
    assert needed(ours.continued(workload, winners)).rows < needed(ours.continued(workload)).rows


# -- the command -----------------------------------------------------------------------------------


def test_names_find_benchmarks_and_their_rows() -> None:
    names = [row for of_it in rows.rows().values() for row in of_it]
    assert len(names) == len(set(names))
    assert rows.find("banking77_8shot_winner") == ["banking77_8shot"]
    assert rows.find("") == list(rows.benchmarks())
    with pytest.raises(Refused, match="banking77_8shot_all"):
        run.main(["nonsense"])


def test_the_table_shows_no_ratio_without_parity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, wrong = (
        result(name="good"),
        result(name="wrong", parity=Parity(checked=1, ok=False, worst=1.0, why="item 0")),
    )
    for row in (good, wrong):
        row.judge()
        harness.write(row, tmp_path)
    assert not run.report({"good": "", "gone": "absent"}, tmp_path)
    assert "5x" in capsys.readouterr().out
    assert run.report({"wrong": ""}, tmp_path)
    assert "4 to 6" not in capsys.readouterr().out
    assert run.report({"good": "", "lost": "broke (exit 1)"}, tmp_path)


def test_parity_is_over_all_rounds() -> None:
    source = random.Random(0)
    answers: list[list[Answer]] = [
        [Scores(logprobs=(source.random(), source.random()))] for _ in range(4)
    ]
    changed: list[list[Answer]] = [*answers[:3], [Scores(logprobs=(5.0, 6.0))]]
    assert parity_of(Trace(answers=answers), Trace(answers=answers)).checked == 4
    assert not parity_of(Trace(answers=answers), Trace(answers=changed)).ok
