"""What is refused of an arm: its method, prompt, model, batches and steps; needs no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from conf.choices import Keep
from conf.errors import ConfigError, NotBuiltYet
from conf.methods import AnsweringMethod, GivenMethod, LoraMethod, PeftMethod, check_answering
from conf.resolve import Arm
from conf.schema import RunConfig
from evaluation.answering.calls import check_labels
from evaluation.answering.references import read_given
from evaluation.engines import check_engine
from evaluation.mix import Mix
from evaluation.models import ModelPlace
from evaluation.models.facts import ModelFacts
from evaluation.prompts import get_style
from evaluation.prompts.rendering import Renderer
from evaluation.scoring.voting import check_voting
from evaluation.tasks import Task
from launch.placement import Machine
from launch.vllm_server import check_vllm
from training.peft_methods import check_peft_method
from training.schedule import num_steps, save_steps


def check_arm(arm: Arm, task: Task) -> None:
    """Refuse an arm whose method, engine, prompt or given answers cannot work on this task."""
    if isinstance(arm.method, AnsweringMethod):
        check_engine(arm.engine)
        if arm.engine.name == "vllm":
            check_vllm(arm.engine)
        check_answering(f"arms.{arm.name}", arm.method, arm.engine)
        if arm.method.self_consistency:
            check_voting(task.scoring, key=f"arms.{arm.name}")
        get_style(arm.method.prompt, key=f"arms.{arm.name}.prompt")
        _check_prompt(arm, task)
        if isinstance(arm.method, PeftMethod):
            check_peft_method(f"arms.{arm.name}", arm.method)
    elif isinstance(arm.method, GivenMethod):
        read_given(Path(arm.method.path), task)


def check_hosted_price(config: RunConfig, arm: Arm) -> None:
    """A cap in money needs a price of each hosted model, or nobody could keep to it."""
    is_asked = isinstance(arm.method, AnsweringMethod) and arm.engine.is_hosted
    if is_asked and config.budget.max_usd is not None:
        model = arm.engine.model or ""
        if model not in config.pricing.hosted:
            raise ConfigError(
                "budget.max_usd",
                found=f"{config.budget.max_usd:g}, and no price of {model}'s tokens",
                expected="a price to spend it by",
                remedy=f"write '+pricing.hosted={{{model}:{{input_usd_per_million:..,"
                "output_usd_per_million:..,source:..,date:..}}', or leave the cap out",
            )


def _check_prompt(arm: Arm, task: Task) -> None:
    method = arm.answering
    if method.num_shots > len(task.items["train"]):
        raise ConfigError(
            f"arms.{arm.name}.num_shots",
            found=f"{method.num_shots} shots",
            expected=f"at most {len(task.items['train'])}, the training items there are",
        )
    if arm.engine.is_hosted and (arm.is_tuned or arm.on is not None):
        raise ConfigError(
            f"arms.{arm.name}.engine.name",
            found="a hosted model for an arm with weights of its own",
            expected="an engine that can load them",
            remedy=f"write arms.{arm.name}.engine.name=forest, or give the engine to one prompted "
            "arm only: arms.NAME.engine.name=openai",
        )
    if arm.is_tuned and arm.engine.name == "scripted":
        raise ConfigError(
            f"arms.{arm.name}",
            found="a fine-tuned arm with the scripted engine, which has no weights",
            expected="prompted arms only, or a real engine",
            remedy="type engine=forest model=tiny for a fast trial",
        )


def check_targets(arms: Mapping[str, Arm], ready: Mapping[str, ModelFacts]) -> None:
    """LoRA targets must exist; read from the headers of the weights, in milliseconds."""
    for name, arm in arms.items():
        if not isinstance(arm.method, LoraMethod) or name not in ready:
            continue
        known = sorted({m.rsplit(".", 1)[-1] for m in ready[name].linear_module_names})
        for target in arm.method.target_modules:
            if target not in known and target not in ready[name].linear_module_names:
                raise ConfigError(
                    f"arms.{name}.target_modules",
                    found=target,
                    expected=f"linear layers of the model: {', '.join(known)}",
                    remedy=f"write arms.{name}.target_modules=[{','.join(known[:2])}], or leave it "
                    "out for all linear layers",
                )


def check_label_tokens(
    arms: Mapping[str, Arm], ready: Mapping[str, ModelPlace], task: Task
) -> None:
    """Labels that a tokenizer makes empty or equal; once per model."""
    models = {
        (place.path, arms[name].model.layout): arms[name].model for name, place in ready.items()
    }
    for (path, layout), model in models.items():
        check_labels(task, Renderer.load(path, layout=layout, max_length=model.max_length))


def check_batches(arms: Mapping[str, Arm], *, workers: int) -> None:
    """Refuse batches that do not divide over the workers, or into their micro-batches."""
    for name, arm in arms.items():
        size = arm.trainer.batch_size
        if arm.is_tuned and size % workers:
            raise ConfigError(
                f"arms.{name}.trainer.batch_size",
                found=f"{size} examples over {workers} workers",
                expected="a multiple of the number of workers",
                remedy=f"write trainer.batch_size={-(-size // workers) * workers}",
            )
        micro = arm.trainer.micro_batch_size
        if arm.is_tuned and micro is not None and (size // workers) % micro:
            raise ConfigError(
                f"arms.{name}.trainer.micro_batch_size",
                found=f"{micro}, with {size // workers} examples per worker and step",
                expected="a divisor of the examples per worker and step",
            )


def check_quantization(arms: Mapping[str, Arm], machine: Machine) -> None:
    """Refuse 4-bit base weights without an accelerator and the package that multiplies with them.

    Raises:
        ConfigError: no CUDA, or no bitsandbytes.
        NotBuiltYet: a prompted arm on such a base.
    """
    for name, arm in arms.items():
        if not isinstance(arm.method, LoraMethod) or arm.method.quantization is None:
            continue
        above = [other for other, one in arms.items() if one.on == name]
        if above:
            raise NotBuiltYet(
                f"arms.{above[0]}.on={name} (prompts on a base in 4 bits)",
                instead=f"drop the arm (~method@arms.{above[0]}), or write "
                f"arms.{name}.quantization=null",
            )
        missing = []
        if machine.device != "cuda":
            missing.append(f"the device is {machine.device}")
        if importlib.util.find_spec("bitsandbytes") is None:
            missing.append("bitsandbytes is not installed")
        if missing:
            raise ConfigError(
                f"arms.{name}.quantization",
                found=f"{arm.method.quantization.name}, and {', '.join(missing)}",
                expected="CUDA and the package bitsandbytes, or null",
                remedy=f"write arms.{name}.quantization=null",
            )


def check_points(arms: Mapping[str, Arm], task: Task, mixes: Mapping[str, Mix]) -> None:
    """Refuse to choose among more checkpoints than a training has steps.

    Raises:
        ConfigError: with the number of steps.
    """
    for name, arm in arms.items():
        trainer = arm.trainer
        if not arm.is_tuned or trainer.keep is not Keep.best:
            continue
        num_rows = mixes[name].size if name in mixes else len(task.items["train"])
        steps = num_steps(num_rows, trainer=trainer)
        if len(save_steps(steps, num_points=trainer.num_points)) < trainer.num_points:
            raise ConfigError(
                f"arms.{name}.trainer.num_points",
                found=f"{trainer.num_points}, and a training of {steps} optimizer steps",
                expected="no more checkpoints to choose from than there are steps",
                remedy=f"write trainer.num_points={steps}"
                if steps > 1
                else "leave trainer.keep out: a training of one step has one checkpoint",
            )
