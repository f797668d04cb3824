"""What each job is expected to take, before anything starts: tokens, seconds, money, memory.

Exact token counts where the model's tokenizer is there, else from characters. Rates are those
measured on the machine that the README names; on an accelerator seconds stay unknown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from conf.choices import TaskKind
from conf.methods import FullMethod, LoraMethod
from conf.resolve import Arm
from evaluation.models import ModelPlace
from evaluation.prepare import context_for
from evaluation.prompts import Ask, Think, first_call, get_style
from evaluation.rendering import Renderer
from evaluation.tasks import Task
from launch.plan import Estimate, Job, Machine, Plan

# 970 tokens/s forward through 106M parameters on 2 cores is 103 GFLOP/s a core (fp32, AVX-512).
FLOPS_PER_CORE = 100e9
# A decoded token reads all weights for few rows: measured, it costs about as much as 4 prompt rows.
PROMPT_ROWS_PER_DECODED_TOKEN = 4.0
SAMPLE_ITEMS = 24
CHARACTERS_PER_TOKEN = 4.0
START_SECONDS = {"train": 9.0, "evaluate": 6.0, "model": 30.0, "reference": 4.0}


@dataclass(kw_only=True, slots=True, frozen=True)
class ArmTokens:
    """Tokens of one request of an arm: prompt (mean), the part all requests share, completion."""

    prompt: float
    shared: float
    completion: float


def with_estimates(
    plan: Plan,
    *,
    arms: dict[str, Arm],
    task: Task,
    places: dict[str, ModelPlace],
    machine: Machine,
    usd_per_device_second: float | None,
) -> Plan:
    """The plan with an estimate on each job that has one."""
    renderers: dict[object, Renderer] = {}
    tokens = {
        name: arm_tokens(arms[name], task, _renderer(arms[name], place, renderers))
        for name, place in places.items()
    }
    jobs = []
    for job in plan.jobs:
        estimate = Estimate(seconds=START_SECONDS.get(job.kind))
        if job.arm in tokens:
            estimate = _estimate(
                job, arms[job.arm], task, places[job.arm], tokens[job.arm], machine
            )
        if estimate.seconds is not None and usd_per_device_second is not None:
            usd = estimate.seconds * job.devices * usd_per_device_second
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
    job: Job, arm: Arm, task: Task, place: ModelPlace, tokens: ArmTokens, machine: Machine
) -> Estimate:
    if job.kind == "rows":
        return Estimate(tokens=0, seconds=1.0)
    if job.kind == "train":
        return _training(arm, task, place, tokens, machine)
    counts = {"evaluate": ("validation", "test"), "curve": ("validation",)}
    num_items = sum(len(task.items[s]) for s in counts.get(job.kind, ()))
    num_items += arm.engine.latency_requests if job.kind == "latency" else 0
    if arm.answering.self_consistency:  # at most: repeats stop when the vote is decided
        num_items *= arm.engine.repeats
    elif job.kind == "evaluate":
        num_items += len(task.items["test"]) * (arm.engine.repeats - 1)
    rows = tokens.shared + num_items * (tokens.prompt - tokens.shared)
    decoded = num_items * tokens.completion
    return Estimate(
        tokens=round(rows + decoded),
        seconds=_seconds(
            (rows + PROMPT_ROWS_PER_DECODED_TOKEN * decoded) * 2,
            place,
            job.devices,
            machine,
            start=START_SECONDS["evaluate"],
        ),
    )


def _training(
    arm: Arm, task: Task, place: ModelPlace, tokens: ArmTokens, machine: Machine
) -> Estimate:
    examples = len(task.items["train"])
    trainer = arm.trainer
    num = examples * trainer.epochs
    if trainer.max_steps is not None:
        num = min(num, trainer.max_steps * trainer.batch_size)
    own = tokens.prompt - tokens.shared + max(1.0, tokens.completion)
    count = num * own + num / trainer.batch_size * tokens.shared  # a batch shares its prefix
    # Forward 2, backward to the activations 2, to the weights 2 operations per parameter and token.
    flops = 4 if arm.kind == "lora" else 6
    return Estimate(
        tokens=round(count),
        seconds=_seconds(
            count * flops, place, machine.devices, machine, start=START_SECONDS["train"]
        ),
        memory_bytes=_training_memory(arm, place, tokens),
    )


def _training_memory(arm: Arm, place: ModelPlace, tokens: ArmTokens) -> int | None:
    from training.estimate import memory_bytes, model_size, trained_parameters

    if place.kind != "ready" or not isinstance(arm.method, (FullMethod, LoraMethod)):
        return None
    size = model_size(place.path)
    return memory_bytes(
        size,
        trained=trained_parameters(arm.method, size=size),
        is_lora=arm.kind == "lora",
        tokens_per_pass=round(arm.trainer.batch_size * (tokens.prompt + tokens.completion)),
        dtype="float32" if arm.model.dtype.name == "auto" else arm.model.dtype.name,
        stage=max(0, int(arm.zero.stage.value)),
        world_size=1,
        activation_checkpointing=arm.trainer.activation_checkpointing,
    ).total


def _seconds(
    operations_per_parameter: float,
    place: ModelPlace,
    devices: int,
    machine: Machine,
    *,
    start: float,
) -> float | None:
    if machine.device != "cpu" or place.kind != "ready":
        return None
    from training.estimate import model_size

    size = model_size(place.path)
    body = size.num_parameters - size.vocabulary * size.hidden
    return start + operations_per_parameter * body / (FLOPS_PER_CORE * max(1, devices))


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
    completion = _mean(written) if is_generated or arm.is_tuned else 0.0
    return ArmTokens(prompt=_mean(lengths), shared=shared, completion=completion + thought)


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
