"""Several engine processes against one: same results, none lost and none twice when one dies."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.choices import TaskKind
from conf.errors import ConfigError, JobFailed, ModelError
from conf.groups import EngineConfig
from conf.records import JournalEvent, SampleRecord
from conf.resolve import resolve_arms
from conf.row_meter import announced_rows
from evaluation.engines.base import Engine, GenerateRequest, Overhead, ScoreRequest, ScoreResult
from evaluation.prompts.rendering import Renderer
from evaluation.tasks import Task
from launch import cluster, sharded_engine, workers
from launch.compose import compose_config
from launch.engine_process import EngineSpec, Part
from launch.jsonl import read_lines
from launch.placement import Machine, engine_actors
from launch.plan import build_plan
from launch.planned import ModelSource, Plan, TaskFacts
from launch.sharded_engine import MAX_RESTARTS, ShardedEngine
from launch.store import JobDirectory, RunDirectory, renamed
from tests.launch.embedding_hook import hooked, passes

pytestmark = pytest.mark.all_cores

CPU = Machine(devices=2, devices_per_node=2, device="cpu", name="2 x test")
GPU = Machine(devices=4, devices_per_node=4, device="cuda", name="4 x test")


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the embeddings of all processes count, see embedding_hook.py."""
    return tmp_path_factory.mktemp("counts")


@pytest.fixture(scope="module")
def ray_cluster(counts: Path) -> Iterator[Any]:
    """A private Ray with two CPUs, started as a run starts it."""
    before = dict(os.environ)
    os.environ.update(hooked(counts))
    cluster.start(CPU)
    import ray

    yield ray
    cluster.stop()
    os.environ.clear()
    os.environ.update(before)


def spec(model_dir: Path, task: Task, **config: Any) -> EngineSpec:
    return EngineSpec(
        config=EngineConfig(**{"name": "scripted", "script": "noisy", **config}),
        model_dir=model_dir,
        layout="plain",
        max_length=None,
        dtype="float32",
        device="cpu",
        threads=1,
        task=task,
    )


def sharded(built_by: EngineSpec, tmp_path: Path) -> ShardedEngine:
    return ShardedEngine(built_by, actors=2, log_dir=tmp_path)


def score_requests(model_dir: Path, task: Task) -> list[ScoreRequest]:
    renderer = Renderer.load(model_dir, layout="plain")
    labels = tuple(tuple(renderer.encode(" " + label)) for label in task.labels)
    return [
        ScoreRequest(
            id=f"{item.id}|0|0",
            prompt_ids=tuple(renderer.encode(f"{task.instruction}\n{item.input}\nTopic:")),
            label_ids=labels,
        )
        for item in task.items["test"]
    ]


def check_counts(engine: Engine, results: Sequence[Any]) -> None:
    """Every row on a bill: of one result, shared, or padding."""
    extra = engine.take_shared()
    own = sum(result.computed_tokens for result in results)
    assert own + extra.shared_tokens + extra.padding_tokens == engine.rows_computed


def logprobs(results: Sequence[ScoreResult]) -> dict[str, tuple[float, ...]]:
    found = {result.id: result.label_logprobs for result in results}
    assert len(found) == len(results), "no result came twice"
    return found


def assert_close(
    found: dict[str, tuple[float, ...]], expected: dict[str, tuple[float, ...]]
) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=2e-5)


def save_adapter(model_dir: Path, path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(str(model_dir))
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(str(path), safe_serialization=True)


@pytest.mark.parametrize("name", ["transformers", pytest.param("forest", marks=pytest.mark.slow)])
def test_two_processes_answer_as_one_with_the_model_kept_and_adapters_swapped(
    name: str, ray_cluster: Any, tiny_model_dir: Path, topic_task: Task, tmp_path: Path
) -> None:
    built_by = spec(tiny_model_dir, topic_task, name=name)
    one, two = built_by.build(), sharded(built_by, tmp_path)
    requests = score_requests(tiny_model_dir, topic_task)

    results = list(two.score(requests))
    base = logprobs(results)
    assert_close(base, logprobs(list(one.score(requests))))
    check_counts(two, results)
    processes = dict(two.process_ids)
    assert len(set(processes.values())) == 2

    generations = [
        GenerateRequest(id=r.id, prompt_ids=r.prompt_ids, max_new_tokens=4, temperature=t, seed=i)
        for i, (r, t) in enumerate(zip(requests[:10], [0.0, 0.9] * 5, strict=True))
    ]
    found = {r.id: r.completion_ids for r in two.generate(generations)}
    assert found == {r.id: r.completion_ids for r in one.generate(generations)}

    save_adapter(tiny_model_dir, tmp_path / "adapter")
    for engine in (one, two):
        engine.set_adapter(tmp_path / "adapter")
    tuned = logprobs(list(two.score(requests)))
    assert_close(tuned, logprobs(list(one.score(requests))))
    assert any(abs(tuned[r.id][0] - base[r.id][0]) > 1e-3 for r in requests)
    two.set_adapter(None)
    assert_close(logprobs(list(two.score(requests))), base)
    assert two.process_ids == processes, "the processes and their models were kept"

    one.set_adapter(None)
    winners = {r.id: r.winner for r in two.score(requests, winner_only=True)}
    assert winners == {r.id: r.winner for r in one.score(requests, winner_only=True)}
    assert None not in winners.values()
    two.close()


def kill(process_id: int) -> None:
    """End a process for good, and come back when it is gone."""
    os.kill(process_id, signal.SIGKILL)
    for _ in range(200):
        try:
            state = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.01)
    raise AssertionError(f"{process_id} lives")


def test_a_process_killed_within_its_shard_loses_nothing_and_repeats_nothing(
    ray_cluster: Any,
    tiny_model_dir: Path,
    topic_task: Task,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slow = spec(tiny_model_dir, topic_task, script="noisy+sleep:0.06")
    two, requests = sharded(slow, tmp_path), score_requests(tiny_model_dir, topic_task)
    results: list[ScoreResult] = []
    killed: int | None = None
    for result in two.score(requests):
        results.append(result)
        if killed is None:
            (number, killed) = next(iter(two.process_ids.items()))
            kill(killed)
    assert killed is not None
    assert killed not in two.process_ids.values()
    quick = spec(tiny_model_dir, topic_task).build()
    assert logprobs(results) == logprobs(list(quick.score(requests)))
    check_counts(two, results)
    said = capsys.readouterr().out
    assert f"engine process {number} died (ActorDiedError" in said
    sent = int(said.split(";")[1].split()[0])
    assert 0 < sent < len(requests) / 2 + 2, "only what had no result was sent again"

    again = list(two.score(requests))  # the new process goes on serving
    assert logprobs(again) == logprobs(results)
    two.close()


@pytest.mark.slow
def test_rows_of_a_killed_process_are_counted_to_the_last(
    ray_cluster: Any, counts: Path, tiny_model_dir: Path, topic_task: Task, tmp_path: Path
) -> None:
    """Killed when it has told of nothing but its check of the loaded model."""
    two = sharded(spec(tiny_model_dir, topic_task, name="transformers"), tmp_path)
    two.rows_dir = tmp_path / "rows"
    requests, before = score_requests(tiny_model_dir, topic_task) * 20, sum(passes(counts))
    requests = [replace(r, id=f"{n}") for n, r in enumerate(requests)]
    results: list[ScoreResult] = []
    for result in two.score(requests):
        if not results:
            kill(two.process_ids[0])
        results.append(result)
    assert sorted(r.id for r in results) == sorted(r.id for r in requests)
    check_counts(two, results)
    assert two.rows_computed == sum(passes(counts)) - before
    assert announced_rows(tmp_path / "rows") == two.rows_computed
    two.close()


@pytest.mark.slow
def test_what_kills_its_process_every_time_fails_the_job_with_the_reason(
    ray_cluster: Any, tiny_model_dir: Path, topic_task: Task, tmp_path: Path
) -> None:
    slow = spec(tiny_model_dir, topic_task, script="noisy+sleep:0.25")
    engine = ShardedEngine(slow, actors=1, log_dir=tmp_path)
    killed: set[int] = set()
    with pytest.raises(JobFailed, match=f"died {MAX_RESTARTS + 1} times with .* requests open"):
        for _ in engine.score(score_requests(tiny_model_dir, topic_task)[:12]):
            process = engine.process_ids[0]
            if process not in killed:
                killed.add(process)
                kill(process)
    assert len(killed) == MAX_RESTARTS + 1


def test_parts_add_up_and_rows_of_a_dead_process_without_a_result_are_padding(
    tiny_model_dir: Path, topic_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_engine, "_kill", lambda actor: None)
    engine = sharded(spec(tiny_model_dir, topic_task), tmp_path)
    engine._actors[0] = "a process"
    requests = score_requests(tiny_model_dir, topic_task)[:2]
    shard = sharded_engine._Shard(number=0, pending={r.id: r for r in requests})
    result = ScoreResult(
        id=requests[0].id,
        label_logprobs=(),
        first_token_logprobs=(),
        cached_tokens=0,
        computed_tokens=30,
    )
    overhead = Overhead(shared_tokens=20, padding_tokens=5)
    kernels = {"linear": "cpu: 198 GFLOP/s"}
    part = Part(results=[result], overhead=overhead, rows=100, kernels=kernels, process_id=1)
    assert list(engine._take(shard, part)) == [result]
    for other in ("cpu: 201 GFLOP/s", "reference: wrong by 1e-1 here"):
        more = replace(part, results=[], rows=0, overhead=Overhead(), kernels={"linear": other})
        assert list(engine._take(shard, more)) == []
    assert engine.kernels == {"linear": "cpu: 198 GFLOP/s | reference: wrong by 1e-1 here"}
    engine._bury(shard, RuntimeError("gone"))
    assert engine.take_shared() == Overhead(shared_tokens=20, padding_tokens=5 + 45)
    assert engine.rows_computed == 100
    assert list(shard.pending) == [requests[1].id]
    assert engine.take_shared() == Overhead()


def test_timed_requests_go_to_one_process_alone(
    ray_cluster: Any, tiny_model_dir: Path, topic_task: Task, tmp_path: Path
) -> None:
    two = sharded(spec(tiny_model_dir, topic_task, script="noisy+sleep:0.01"), tmp_path)
    requests = score_requests(tiny_model_dir, topic_task)[:6]
    results = list(two.score(requests, timed=True))
    assert set(two.process_ids) == {0}
    assert all(r.total_seconds is not None and r.total_seconds >= 0.01 for r in results)
    assert [r.id for r in results] == [requests[i].id for i in order_of(requests)]
    two.close()


def order_of(requests: Sequence[ScoreRequest]) -> list[int]:
    return sorted(range(len(requests)), key=lambda i: requests[i].prompt_ids)


def test_an_error_of_an_engine_comes_as_it_was_raised(
    ray_cluster: Any, tiny_model_dir: Path, topic_task: Task, tmp_path: Path
) -> None:
    missing = replace(spec(tiny_model_dir, topic_task), model_dir=tmp_path / "nothing")
    two = sharded(missing, tmp_path)
    with pytest.raises(ModelError, match="nothing"):
        list(two.score(score_requests(tiny_model_dir, topic_task)))
    logs = [path.read_text() for path in tmp_path.glob("engine-*.log")]
    assert any("ModelError" in text for text in logs)


def answer_work(model_dir: Path, task: Task, log_path: Path, *, actors: int) -> workers.AnswerWork:
    overrides = ["+exp=zero_shot", "engine=scripted", "engine.script=noisy", "model.layout=plain"]
    arm = resolve_arms(compose_config(overrides))["zero_shot"]
    return workers.AnswerWork(
        job="evaluate:zero_shot",
        arm=arm,
        sets=("validation", "test"),
        task=task,
        model_dir=model_dir,
        adapter_dir=None,
        step=None,
        train_seed=None,
        machine=CPU,
        devices=2,
        plugins=(),
        rule=None,
        num_labels=None,
        usd_per_device_second=None,
        done=(),
        log_path=log_path,
        actors=actors,
    )


def test_an_evaluator_with_two_engine_processes_leaves_its_devices_when_it_ends(
    ray_cluster: Any, tiny_model_dir: Path, topic_task: Task, tmp_path: Path
) -> None:
    answered: dict[int, dict[tuple[str, str, str], Any]] = {}
    for actors in (2, 1):  # the second waits for both devices of the first
        work = answer_work(tiny_model_dir, topic_task, tmp_path / "0.log", actors=actors)
        actor = workers.evaluator(CPU, actors=actors)
        answered[actors] = {}
        for reference in actor.answer.options(num_returns="streaming").remote(work):
            for event in ray_cluster.get(reference):
                if isinstance(event, SampleRecord):
                    key = (event.set, event.item_id, event.answer_by)
                    assert key not in answered[actors]
                    answered[actors][key] = (event.answer, event.label_logprobs)
        ray_cluster.kill(actor, no_restart=True)
    assert answered[1] == answered[2]
    assert len(answered[1]) >= len(topic_task.items["test"])


class WithKernels:
    """An engine that knows its kernels after its first result."""

    def __init__(self) -> None:
        self.kernels: dict[str, str] = {}


def test_the_kernels_of_a_job_are_told_once_and_stand_in_the_journal(
    tiny_model_dir: Path, topic_task: Task, tmp_path: Path
) -> None:
    engine = WithKernels()

    def events() -> Iterator[str]:
        yield "first"
        engine.kernels = {"token_logprobs": "reference: off by 1e-1 here"}
        yield from ("second", "third")

    work = answer_work(tiny_model_dir, topic_task, tmp_path / "0.log", actors=1)
    first, told, *rest = workers._with_kernels(events(), engine, work)
    assert [first, *rest] == ["first", "second", "third"]
    assert isinstance(told, JournalEvent)

    cached = JobDirectory(tmp_path, "key")
    cached.begin(keeps_records=False)
    cached.append(told)
    cached.close()
    run = RunDirectory(tmp_path, "run")
    run.open()
    for event in cached.events():
        shown = renamed(event, job="evaluate:other", arm="other", is_reused=True)
        run.append(shown, job="evaluate:other", arm="other")
    run.close()
    (line,) = read_lines(run.path / "journal.jsonl")
    assert line["event"] == "kernels"
    assert (line["job"], line["arm"]) == ("evaluate:other", "other")
    assert line["data"] == {"token_logprobs": "reference: off by 1e-1 here"}


@functools.cache
def plan(machine: Machine, *overrides: str) -> Plan:
    config = compose_config(["+exp=zero_shot", *overrides])
    arms = resolve_arms(config)
    return build_plan(
        config,
        arms,
        task=TaskFacts(sha256="t", kind=TaskKind.classification),
        models={name: ModelSource(key="m", is_ready=True) for name in arms},
        plugins=(),
        machine=machine,
    )


@pytest.mark.parametrize(
    ("machine", "overrides", "evaluate", "latency"),
    [
        (CPU, (), 2, 2),
        (CPU, ("engine.actors=2",), 2, 1),
        (GPU, (), 4, 1),
        (GPU, ("engine.actors=3",), 3, 1),
        (GPU, ("engine=scripted",), 1, 1),
    ],
)
def test_a_job_reserves_the_devices_of_its_engine_processes(
    machine: Machine, overrides: tuple[str, ...], evaluate: int, latency: int
) -> None:
    found = plan(machine, *overrides)
    assert found.job("evaluate:zero_shot").devices == evaluate
    assert found.job("latency:zero_shot").devices == latency


def test_other_kernels_answer_anew() -> None:
    assert not {j.key for j in plan(CPU).jobs} & {
        j.key for j in plan(CPU, "kernels.impl=reference").jobs
    }


def test_answers_are_found_whatever_number_of_processes_gave_them() -> None:
    one, two = plan(CPU), plan(CPU, "engine.actors=2")
    assert one.job("evaluate:zero_shot").key == two.job("evaluate:zero_shot").key
    assert one.job("latency:zero_shot").key != two.job("latency:zero_shot").key


def test_more_engine_processes_than_devices_are_refused() -> None:
    arm = resolve_arms(compose_config(["+exp=zero_shot", "engine.actors=3"]))["zero_shot"]
    with pytest.raises(ConfigError, match=r"engine\.actors"):
        engine_actors(arm, CPU)


def test_a_loaded_engine_serves_what_only_requests_differ_in(
    tiny_model_dir: Path, topic_task: Task
) -> None:
    base = spec(tiny_model_dir, topic_task)
    warm = spec(tiny_model_dir, topic_task, temperature=0.7, repeats=3, stop=["x"])
    assert warm.identity() == base.identity()
    for key, value in (("batch_size", 3), ("script", "echo"), ("prefix_cache", False)):
        assert spec(tiny_model_dir, topic_task, **{key: value}).identity() != base.identity()
