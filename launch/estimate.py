"""What each job is expected to take, before anything starts: tokens, seconds, money, memory.

Exact token counts where the model's tokenizer is here, else from characters, and marked so. Rates
are those of launch/rates.py: they come with a range, and seconds inherit it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from conf.choices import AnswerBy, TaskKind
from conf.resolve import Arm
from conf.schema import RunConfig
from evaluation.models import ModelPlace
from evaluation.prepare import context_for
from evaluation.prompts import Ask, Think, first_call, get_style
from evaluation.prompts.rendering import Renderer
from evaluation.tasks import Task
from launch.placement import Machine, workers_of
from launch.planned import LEG, SEARCH_KINDS, STEPPING_KINDS, Estimate, Job, Plan
from launch.probing import num_asked
from launch.rates import (
    Rate,
    device_facts,
    known_rate,
    memory_of_device,
    price_of,
    rate_file,
    rate_of,
)
from launch.search.estimate import leg_estimate, scoring_tokens, search_estimate, search_size
from launch.search.prompt_search import prompt_halving
from launch.search.trials import Trial
from launch.train_plan import model_sizes, plan_training, training_job
from launch.waves import share_of
from training.job import PASS_TOKENS

if TYPE_CHECKING:
    from training.estimate import TrainEstimate
    from training.job import TrainJob
    from training.shapes import ModelSize

# A decoded token reads all weights for few rows: measured, it costs about as much as 4 prompt rows.
PROMPT_ROWS_PER_DECODED_TOKEN = 4.0
SAMPLE_ITEMS = 24
MEASURED_RANGE = (0.8, 1.2)  # around a rate that was measured on such a training
CHARACTERS_PER_TOKEN = 4.0
START_SECONDS = {"train": 9.0, "evaluate": 6.0, "model": 30.0, "reference": 4.0}
# Of an item with its choices, by SmolLM2's: 13.3 of the general set, 20.4 of the two probes.
ITEM_TOKENS = {"general": 14.0, "probes": 21.0}


@dataclass(kw_only=True, slots=True, frozen=True)
class ArmTokens:
    """Tokens of one request of an arm: prompt (mean), the part all requests share, completion.

    longest: of a training row, prompt and answer. is_about: counted from characters. label_rows: of
    an item whose labels are scored, beyond its prompt.
    """

    prompt: float
    shared: float
    completion: float
    longest: int
    is_about: bool
    label_rows: int = 0


class _Seconds(TypedDict, total=False):
    """Seconds with their range; empty where no rate is known."""

    seconds: float
    low_seconds: float
    high_seconds: float


@dataclass(kw_only=True, slots=True, frozen=True)
class _Means:
    """What the estimates of all jobs share."""

    config: RunConfig
    task: Task
    machine: Machine
    rate: Rate | None
    price: float | None  # USD per device-second
    memory_bytes: int | None  # of a worker's device
    mix_sizes: Mapping[str, int]

    def timed(self, flops: float, *, devices: int, start: float) -> _Seconds:
        """Seconds of so many operations on so many devices, with the range of the rate."""
        if self.rate is None:
            return _Seconds()
        work = flops / max(1, devices)
        return _Seconds(
            seconds=start + work / self.rate.flops_per_second,
            low_seconds=start + work / self.rate.high,
            high_seconds=start + work / self.rate.low,
        )


def with_estimates(
    plan: Plan,
    *,
    config: RunConfig,
    arms: dict[str, Arm],
    task: Task,
    places: Mapping[str, ModelPlace],
    machine: Machine,
    mix_sizes: Mapping[str, int] | None = None,
    searches: Mapping[str, Sequence[Trial]] | None = None,
) -> Plan:
    """The plan with an estimate on each job that has one.

    mix_sizes: training rows of the arms that train on a mix of sources. searches: the trials of
    the arms that are searched.

    Raises:
        ConfigError: a training that does not fit the devices.
    """
    facts = device_facts(config)
    workers = workers_of(config, machine)
    per_node = -(-workers * machine.devices_per_node // max(1, machine.devices))
    means = _Means(
        config=config,
        task=task,
        machine=machine,
        rate=rate_of(machine, facts),
        price=price_of(config, machine),
        memory_bytes=memory_of_device(machine, facts, workers_per_node=per_node),
        mix_sizes=mix_sizes or {},
    )
    renderers: dict[object, Renderer] = {}
    tokens = {
        name: arm_tokens(arms[name], task, _renderer(arms[name], place, renderers))
        for name, place in places.items()
    }
    sizes = {name: model_sizes(arms[name].model, place) for name, place in places.items()}
    jobs = []
    for job in plan.jobs:
        estimate = Estimate(seconds=START_SECONDS.get(job.kind))
        if job.arm in tokens and job.kind != "reference":
            name = job.arm
            trials = (searches or {}).get(name, ())
            arm = next((t.arm for t in trials if t.number == job.trial), arms[name])
            estimate = _estimate(job, arm, places[name], sizes[name], tokens[name], means)
            if job.kind in SEARCH_KINDS and plan.legs(name):
                estimate = Estimate(tokens=0, seconds=0.0)  # its legs have theirs
            elif job.kind in (*SEARCH_KINDS, LEG):
                estimate = _searching(job, trials, estimate, sizes[name], tokens[name], means)
        if estimate.seconds is not None and means.price is not None:
            usd = estimate.seconds * job.devices * means.price
            estimate = dataclasses.replace(estimate, usd=usd)
        jobs.append(dataclasses.replace(job, estimate=estimate))
    return Plan(jobs=tuple(jobs))


def _renderer(arm: Arm, place: ModelPlace, known: dict[object, Renderer]) -> Renderer | None:
    """The arm's renderer, loaded once per model; None where the model is not ready."""
    if place.kind != "ready":
        return None
    key = (place.path, arm.model.layout, arm.model.max_length)
    if key not in known:
        known[key] = Renderer.load(
            place.path, layout=arm.model.layout, max_length=arm.model.max_length
        )
    return known[key]


def _estimate(
    job: Job,
    arm: Arm,
    place: ModelPlace,
    size: ModelSize | None,
    tokens: ArmTokens,
    means: _Means,
) -> Estimate:
    if job.kind == "rows":
        return Estimate(tokens=0, seconds=1.0)
    if job.kind in STEPPING_KINDS:
        return _training(arm, place, size, tokens, means)
    task = means.task
    counts = {
        "evaluate": ("validation", "test"),
        "features": ("train", "validation", "test"),
        "curve": ("validation",),
        "prompt_search": ("validation",),
    }
    num_tests = round(len(task.items["test"]) * share_of(job.wave))
    num_items = sum(len(task.items[s]) for s in counts.get(job.kind, ()))
    if job.wave is not None:
        num_items = num_tests + (0 if job.wave else len(task.items["validation"]))
    num_items += arm.engine.latency_requests if job.kind == "latency" else 0
    num_items += num_asked(job.kind, means.config)
    if job.kind.removesuffix("_base") in ITEM_TOKENS:
        each = ITEM_TOKENS[job.kind.removesuffix("_base")]
        tokens = dataclasses.replace(
            tokens, prompt=each, shared=0.0, completion=0.0, is_about=False, label_rows=0
        )
    if arm.answering.self_consistency:  # at most: repeats stop when the vote is decided
        num_items *= arm.engine.repeats
    elif job.kind == "evaluate":
        num_items += num_tests * (arm.engine.repeats - 1)
    label_rows = 0 if job.kind == "features" else tokens.label_rows
    rows = tokens.shared + num_items * (tokens.prompt - tokens.shared + label_rows)
    decoded = num_items * tokens.completion
    computed = rows + PROMPT_ROWS_PER_DECODED_TOKEN * decoded
    if arm.engine.is_hosted:
        return _hosted(arm, means, prompt=num_items * tokens.prompt, completion=decoded)
    estimate = Estimate(tokens=round(rows + decoded), is_about=tokens.is_about)
    if size is None or means.rate is None:
        return estimate
    times = means.timed(2 * computed * size.body, devices=job.devices, start=6.0)
    return dataclasses.replace(estimate, rate=means.rate.source, **times)


def _hosted(arm: Arm, means: _Means, *, prompt: float, completion: float) -> Estimate:
    """By the token, without a discount; counted by another tokenizer than the model's own."""
    price = means.config.pricing.hosted.get(arm.engine.model or "")
    usd = None
    if price is not None:
        usd = prompt * price.input_usd_per_million + completion * price.output_usd_per_million
        usd /= 1e6
    return Estimate(tokens=round(prompt + completion), usd=usd, is_about=True)


def _searching(
    job: Job,
    trials: Sequence[Trial],
    one: Estimate,
    size: ModelSize | None,
    tokens: ArmTokens,
    means: _Means,
) -> Estimate:
    """A search of so many trials, or a leg of one, by the estimate of one."""
    halving = means.config.sweep.halving
    if job.kind == "prompt_search":
        num_items = len(means.task.items["validation"])
        length = search_size(trials, prompt_halving(halving, num_items=num_items))
        nothing = Estimate(tokens=0, flops=0, seconds=0.0, low_seconds=0.0, high_seconds=0.0)
        return search_estimate(one, nothing, length, start_seconds=START_SECONDS["evaluate"])
    scored = _scoring(size, tokens, means, devices=job.devices)
    start = START_SECONDS["train"]
    if job.rung is not None:
        return leg_estimate(one, scored, trials, halving, rung=job.rung, start_seconds=start)
    return search_estimate(one, scored, search_size(trials, halving), start_seconds=start)


def _scoring(size: ModelSize | None, tokens: ArmTokens, means: _Means, *, devices: int) -> Estimate:
    """One rung of one trial: each prompt once, and all its labels."""
    rows = scoring_tokens(
        num_items=len(means.task.items["validation"]),
        num_labels=len(means.task.labels),
        prompt=tokens.prompt,
        shared=tokens.shared,
        completion=tokens.completion,
        max_tokens=PASS_TOKENS[means.machine.device],
    )
    if size is None or means.rate is None:
        return Estimate(tokens=rows, is_about=True)
    flops = 2 * rows * size.body
    times = means.timed(flops, devices=devices, start=0.0)
    return Estimate(tokens=rows, flops=round(flops), is_about=True, **times)


def _training(
    arm: Arm, place: ModelPlace, size: ModelSize | None, tokens: ArmTokens, means: _Means
) -> Estimate:
    """A training's plan; only tokens where the model's sizes are not known."""
    from training.estimate import RowLengths, num_examples

    num_rows = means.mix_sizes.get(arm.name, len(means.task.items["train"]))
    targets = max(1.0, tokens.completion + 1)  # the end token is learnt too
    if size is None:
        mean = tokens.prompt + targets
        count = num_examples(num_rows, trainer=arm.trainer) * mean
        return Estimate(tokens=round(count), is_about=tokens.is_about)
    workers = workers_of(means.config, means.machine)
    job = training_job(
        arm,
        machine=means.machine,
        workers=workers,
        device_memory_bytes=means.memory_bytes,
        model_dir=str(place.path),
    )
    lengths = RowLengths(
        mean=tokens.prompt + targets,
        longest=max(tokens.longest, round(tokens.prompt + targets)),
        shared=round(tokens.shared),
        targets=targets,
    )
    plan, found = plan_training(size, job, num_rows=num_rows, rows=lengths)
    times, rate = _training_seconds(found, job, means)
    return Estimate(
        tokens=found.tokens,
        is_about=tokens.is_about,
        memory_bytes=plan.memory["total"],
        flops=found.flops,
        training=plan,
        rate=rate,
        **times,
    )


def _training_seconds(found: TrainEstimate, job: TrainJob, means: _Means) -> tuple[_Seconds, str]:
    """Seconds of a training by the rate that an earlier one left here, else by the assumed one."""
    start = START_SECONDS["train"]
    path = rate_file(Path(means.config.run.root), machine=means.machine, job=job)
    known = known_rate(path)
    if known is None:
        times = means.timed(found.flops_spent, devices=job.devices, start=start)
        return times, "" if means.rate is None else means.rate.source
    rate, date = known
    work = rate.seconds(flops=found.flops, steps=found.steps)
    low, high = MEASURED_RANGE
    times = _Seconds(
        seconds=start + work, low_seconds=start + low * work, high_seconds=start + high * work
    )
    return times, f"measured here on {date} over {rate.steps} steps of such a training"


def arm_tokens(arm: Arm, task: Task, renderer: Renderer | None) -> ArmTokens:
    """Mean tokens of one request, from the first call of the arm's style on some test items."""
    context = context_for(task, arm)
    style = get_style(arm.answering.prompt)
    items = task.items["test"][:SAMPLE_ITEMS]
    calls = [first_call(style, item, context) for item in items]
    thought = sum(c.max_new_tokens for c in calls if isinstance(c, Think)) / max(1, len(calls))
    answers = [context.answer_word(i) for i in task.items["train"][:SAMPLE_ITEMS]]
    if renderer is not None:
        prompts = [renderer.encode(renderer.render(c.messages, c.prefix)) for c in calls]
        written = [float(len(renderer.encode(a))) for a in answers]
        lengths = [float(len(p)) for p in prompts]
        shared = float(_common_prefix(prompts))
    else:
        texts = [_text(c) for c in calls]
        lengths = [len(t) / CHARACTERS_PER_TOKEN for t in texts]
        written = [len(a) / CHARACTERS_PER_TOKEN for a in answers]
        shared = _common_prefix(texts) / CHARACTERS_PER_TOKEN
    is_generated = task.kind in (TaskKind.generation, TaskKind.pairs)
    is_generated = is_generated or arm.engine.only_generates
    completion = _mean(written) if is_generated or arm.is_tuned else 0.0
    return ArmTokens(
        prompt=_mean(lengths),
        shared=shared,
        completion=completion + thought,
        longest=_longest_row(arm, task, renderer) if arm.is_tuned else 0,
        is_about=renderer is None,
        label_rows=_label_rows(arm, task, renderer),
    )


def _label_rows(arm: Arm, task: Task, renderer: Renderer | None) -> int:
    """Rows of the labels' tokens but the last of each, a common beginning once.

    77 labels of the embedded model's are 139 rows an item, where its prompt has 20.
    """
    if renderer is None or arm.answering.answer_by is AnswerBy.generate:
        return 0
    words = [tuple(renderer.encode(" " + task.word(label))) for label in task.labels]
    return len({word[:end] for word in words for end in range(1, len(word))})


def _longest_row(arm: Arm, task: Task, renderer: Renderer | None) -> int:
    """Tokens of the training row with the most characters, its answer included."""
    items = task.items["train"]
    if not items:
        return 0
    item = max(items, key=lambda i: len(i.input) + len(i.context or "") + len(i.answer_key))
    context = context_for(task, arm)
    call = first_call(get_style(arm.answering.prompt), item, context)
    answer = context.answer_word(item)
    if renderer is None:
        return round((len(_text(call)) + len(answer)) / CHARACTERS_PER_TOKEN) + 1
    prompt = renderer.encode(renderer.render(call.messages, call.prefix))
    return min(len(prompt) + len(renderer.encode(answer)) + 1, renderer.max_length or 10**9)


def _text(call: Ask | Think) -> str:
    return "\n".join(m.content for m in call.messages) + call.prefix


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _common_prefix(sequences: Sequence[Sequence[object]]) -> int:
    """Length of the longest prefix that all sequences share."""
    if not sequences:
        return 0
    low, high = min(sequences), max(sequences)  # type: ignore[type-var]
    count = 0
    for a, b in zip(low, high, strict=False):
        if a != b:
            break
        count += 1
    return count
