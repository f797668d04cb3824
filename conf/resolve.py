"""From the composed configuration to one complete, frozen description per arm (pure)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from conf.errors import ConfigError
from conf.groups import EngineConfig, ModelConfig, TrainerConfig, ZeroConfig
from conf.methods import AnsweringMethod, Method, TunedMethod, trained_method
from conf.schema import RunConfig

C = TypeVar("C")


@dataclass(kw_only=True, slots=True, frozen=True)
class Arm:
    """One approach of a run with everything it needs, run defaults and overrides merged."""

    name: str
    method: Method
    model: ModelConfig
    engine: EngineConfig
    trainer: TrainerConfig
    zero: ZeroConfig
    is_same_base: bool

    @property
    def kind(self) -> str:
        """The method's kind: prompt, lora, full, tfidf or given."""
        return self.method.kind

    @property
    def is_tuned(self) -> bool:
        """Whether the arm trains weights of its own."""
        return isinstance(self.method, TunedMethod)

    @property
    def training(self) -> Method:
        """The method that the training room sees: an instruction arm's is full or LoRA."""
        return trained_method(self.method)

    @property
    def on(self) -> str | None:
        """The arm or checkpoint directory that this arm's prompts run on."""
        return self.method.on if isinstance(self.method, AnsweringMethod) else None

    @property
    def answering(self) -> AnsweringMethod:
        """The method of an arm that answers through a language model."""
        assert isinstance(self.method, AnsweringMethod), f"{self.name} is a {self.kind} arm"
        return self.method


def merged(base: C, override: Any, *, key: str) -> C:
    """A group with an arm's non-null fields on top; the group's own checks run again."""
    if override is None:
        return base
    values = {
        f.name: getattr(override, f.name)
        for f in dataclasses.fields(override)
        if getattr(override, f.name) is not None
    }
    try:
        return dataclasses.replace(base, **values)  # type: ignore[type-var]
    except ConfigError as error:
        _, _, field = error.where.partition(".")
        raise ConfigError(
            f"{key}.{field}", found=error.found, expected=error.expected, remedy=error.remedy
        ) from None


def resolve_arms(config: RunConfig) -> dict[str, Arm]:
    """All arms of a run by name; an arm `on` another one inherits that arm's base model."""
    arms = {name: _resolve(config, name, method) for name, method in config.arms.items()}
    for name, arm in arms.items():
        if arm.on in arms:
            base = arms[arm.on]
            if not base.is_tuned:
                raise ConfigError(
                    f"arms.{name}.on",
                    found=f"{arm.on}, a {base.kind} arm",
                    expected="a fine-tuned arm of this run, or a checkpoint directory",
                    remedy=f"write arms.{name}.on=lora, and add +method@arms.lora=lora",
                )
            arms[name] = dataclasses.replace(arm, model=base.model, is_same_base=base.is_same_base)
    return arms


def _resolve(config: RunConfig, name: str, method: Method) -> Arm:
    key = f"arms.{name}"
    model, engine = config.model, config.engine
    trainer, zero = config.trainer, config.zero
    if isinstance(method, AnsweringMethod):
        model = merged(model, method.model, key=f"{key}.model")
        engine = merged(engine, method.engine, key=f"{key}.engine")
    if isinstance(method, TunedMethod):
        trainer = merged(trainer, method.trainer, key=f"{key}.trainer")
        zero = merged(zero, method.zero, key=f"{key}.zero")
    return Arm(
        name=name,
        method=method,
        model=model,
        engine=engine,
        trainer=trainer,
        zero=zero,
        is_same_base=model == config.model and not engine.is_hosted,
    )
