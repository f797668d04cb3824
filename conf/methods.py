"""One class per kind of arm, and the overrides an arm may carry."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from conf.choices import AnswerBy, Calibration, Normalisation, ShotSelection, require
from conf.groups import EngineConfig, ModelConfig, TrainerConfig, ZeroConfig

MIN_VOTES = 3  # of two answers that differ the first would always win


def all_null(cls: type) -> type:
    """A twin of a schema class whose fields all default to null: an arm's override of a group.

    Made rather than written, so that an override cannot lag behind the group it overrides. The
    checks of the original run when the override is merged (conf/resolve.py).
    """
    hints = typing.get_type_hints(cls)
    fields: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        fields.append((f.name, hint | None, field(default=None)))
    twin = dataclasses.make_dataclass(
        f"{cls.__name__.removesuffix('Config')}Override", fields, kw_only=True, slots=True
    )
    twin.__module__ = __name__  # so that it can be pickled by name
    return twin


ModelOverride: Any = all_null(ModelConfig)

TrainerOverride: Any = all_null(TrainerConfig)

ZeroOverride: Any = all_null(ZeroConfig)

EngineOverride: Any = all_null(EngineConfig)


@dataclass(kw_only=True, slots=True)
class Method:
    """What all arms have. kind: prompt | lora | full | tfidf | given."""

    kind: str = MISSING


@dataclass(kw_only=True, slots=True)
class AnsweringMethod(Method):
    """An arm whose answers come from a language model, through a prompt."""

    prompt: str = "zero_shot"  # a style's name, or a file of the user's own
    on: str | None = None  # another arm's name, or a checkpoint directory
    answer_by: AnswerBy = AnswerBy.auto
    normalisation: Normalisation = Normalisation.auto  # of labels' scores
    calibration: Calibration = Calibration.auto
    self_consistency: bool = False  # generate engine.repeats answers to an item and let them vote
    num_shots: int = 0
    shot_selection: ShotSelection = ShotSelection.balanced
    draw: int = 0  # seed of the shots
    persona: str | None = None  # role_play; null: one made from the task
    max_thought_tokens: int = 32  # chain_of_thought: length of the reasoning
    instruction: str | None = None  # null: the task's
    model: ModelOverride = field(default_factory=ModelOverride)
    engine: EngineOverride = field(default_factory=EngineOverride)

    def __post_init__(self) -> None:
        """Ranges."""
        require(self.num_shots >= 0, "arms.*.num_shots", self.num_shots, "0 or a positive count")
        require(
            self.max_thought_tokens > 0,
            "arms.*.max_thought_tokens",
            self.max_thought_tokens,
            "a positive count",
        )
        is_plain = self.normalisation in (Normalisation.auto, Normalisation.sum)
        require(
            is_plain or self.calibration in (Calibration.auto, Calibration.none),
            "arms.*.calibration",
            f"{self.calibration.name} with normalisation={self.normalisation.name}",
            "auto or none, since calibration is fitted on sums of log-probabilities",
            "write normalisation=sum, or calibration=none",
        )
        require(
            not self.self_consistency or self.answer_by is not AnswerBy.score,
            "arms.*.self_consistency",
            "true with answer_by=score",
            "answer_by=generate, since only generated answers differ between repeats",
            "write answer_by=generate",
        )


def check_answering(key: str, method: AnsweringMethod, engine: EngineConfig) -> None:
    """Refuse what an arm's method and its engine cannot do together; key: e.g. arms.few_shot.

    Raises:
        ConfigError: calibration, normalisation or a rule that needs all labels' scores where
            engine.winner_only leaves them out; a vote of fewer than three answers.
    """
    wanted = {"calibration": method.calibration, "normalisation": method.normalisation}
    without_others = {
        "calibration": (Calibration.auto, Calibration.none),
        "normalisation": (Normalisation.auto, Normalisation.sum),
    }
    for name, value in wanted.items():
        require(
            not engine.winner_only or value in without_others[name],
            f"{key}.{name}",
            f"{value.name} with engine.winner_only=true, which gives no label distribution",
            " or ".join(choice.name for choice in without_others[name]),
            f"write {key}.engine.winner_only=false",
        )
    require(
        not method.self_consistency or (engine.repeats >= MIN_VOTES and engine.temperature > 0),
        f"{key}.self_consistency",
        f"true with engine.repeats={engine.repeats} and temperature={engine.temperature:g}",
        f"{MIN_VOTES} or more repeats, sampled",
        f"write {key}.engine.repeats=5 {key}.engine.temperature=0.7",
    )


@dataclass(kw_only=True, slots=True)
class PromptMethod(AnsweringMethod):
    """The weights stay; the prompt changes."""

    kind: str = "prompt"


@dataclass(kw_only=True, slots=True)
class TunedMethod(AnsweringMethod):
    """The weights change."""

    trainer: TrainerOverride = field(default_factory=TrainerOverride)
    zero: ZeroOverride = field(default_factory=ZeroOverride)


@dataclass(kw_only=True, slots=True)
class FullMethod(TunedMethod):
    """All parameters train."""

    kind: str = "full"


@dataclass(kw_only=True, slots=True)
class LoraMethod(TunedMethod):
    """Low-rank adapters train (Hu et al. 2021, arXiv 2106.09685); the base is frozen."""

    kind: str = "lora"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: list[str] = field(default_factory=list)  # empty: all linear layers but the head

    def __post_init__(self) -> None:
        """Ranges."""
        AnsweringMethod.__post_init__(self)
        require(self.lora_rank > 0, "arms.*.lora_rank", self.lora_rank, "a positive count")
        require(self.lora_alpha > 0, "arms.*.lora_alpha", self.lora_alpha, "a positive number")
        require(
            0 <= self.lora_dropout < 1,
            "arms.*.lora_dropout",
            self.lora_dropout,
            "a share in [0, 1)",
        )


@dataclass(kw_only=True, slots=True)
class InstructionMethod(TunedMethod):
    """Instruction tuning on a mix of prompt/completion sources; not built yet, refused by name."""

    kind: str = "instruction"


@dataclass(kw_only=True, slots=True)
class TfidfMethod(Method):
    """TF-IDF with logistic regression: what a bag of words reaches on the same labels."""

    kind: str = "tfidf"


@dataclass(kw_only=True, slots=True)
class GivenMethod(Method):
    """The user's present system: a file of predictions, with its own costs."""

    kind: str = "given"
    path: str = MISSING  # CSV or JSONL with columns id and answer
    request_usd: float | None = None
    fixed_usd: float | None = None

    def __post_init__(self) -> None:
        """Costs are not negative."""
        for key in ("request_usd", "fixed_usd"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"arms.*.{key}", value, "0 or more, or null")


METHODS: dict[str, type[Method]] = {
    "prompt": PromptMethod,
    "full": FullMethod,
    "lora": LoraMethod,
    "instruction": InstructionMethod,
    "tfidf": TfidfMethod,
    "given": GivenMethod,
}
