"""One class per kind of arm, and the overrides an arm may carry."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from conf.choices import (
    AnswerBy,
    Calibration,
    Normalisation,
    Pooling,
    Quantization,
    ShotSelection,
    Tunes,
    require,
)
from conf.groups import ColumnsConfig, EngineConfig, ModelConfig, TrainerConfig, ZeroConfig

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
    """What all arms have.

    kind: prompt | lora | full | peft | instruction | tfidf | linear_probe | given.
    """

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
        not engine.only_generates or method.answer_by is not AnswerBy.score,
        f"{key}.answer_by",
        f"score with engine={engine.name}, which gives no scores of all labels",
        "generate, or auto, which is generate there",
        f"write {key}.answer_by=generate",
    )
    require(
        not engine.only_generates or not engine.winner_only,
        f"{key}.engine.winner_only",
        f"true with engine={engine.name}, which scores no labels",
        "false",
    )
    require(
        not engine.is_hosted or engine.too_long == "refuse",
        f"{key}.engine.too_long",
        f"{engine.too_long} with engine={engine.name}, whose context is not known here",
        "refuse: the endpoint refuses an item that is too long for it",
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
    """Low-rank adapters train (Hu et al. 2021, arXiv 2106.09685); the base is frozen.

    On every linear layer but the head, alpha 32 over the rank: with these the best rate hardly
    depends on the rank, and small sets are learned as well as by full fine-tuning ("LoRA Without
    Regret", Schulman et al., Thinking Machines, 2025). Tuned alike, the variants end within 1 to 2%
    of it (arXiv 2602.04998): options, not defaults.
    """

    kind: str = "lora"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0  # packed passes and shared prefixes are exact without it
    target_modules: list[str] = field(default_factory=list)  # empty: all linear layers but the head
    use_rslora: bool = False  # scale alpha / sqrt(rank) for alpha / rank (arXiv 2312.03732)
    use_dora: bool = False  # direction by LoRA, a trained magnitude per output (arXiv 2402.09353)
    # LoRA+ (arXiv 2402.12354): the rate of B over that of A, 16 in the paper; null: equal rates
    lora_plus_ratio: float | None = None
    quantization: Quantization | None = None  # of the frozen base; nf4: QLoRA (arXiv 2305.14314)

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
        require(
            self.lora_plus_ratio is None or self.lora_plus_ratio >= 1,
            "arms.*.lora_plus_ratio",
            self.lora_plus_ratio,
            "1 or more, e.g. 16, or null for equal rates",
        )


@dataclass(kw_only=True, slots=True)
class PeftMethod(TunedMethod):
    """Any other method of peft that adapts layers, by its name there; the base is frozen.

    peft: keyword arguments of its configuration class; what is not given is peft's own default.
    """

    kind: str = "peft"
    peft_type: str = MISSING  # e.g. IA3, VERA, LOHA, LOKR, OFT, BOFT
    peft: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of a mix: what its rows are, and how much of the mix they should be.

    source: target (the task with the arm's own prompt), wordings (the task under its further
    instructions), instructions (embedded requests whose answers a program verifies), or a loader:
    file, hub, sms_spam, orders, one of a plugin.
    """

    source: str = "file"
    weight: float = 1.0  # relative to the other sources'
    path: str | None = None  # as task.path; all rows of a file, of a directory its train file
    subset: str | None = None  # hub only
    revision: str | None = None  # hub only
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    instruction: str | None = None  # null: the source's own, else one made from its kind

    def __post_init__(self) -> None:
        """A source without weight is left out by name, not by a zero."""
        require(
            self.weight > 0,
            "arms.*.sources.*.weight",
            self.weight,
            "a positive number",
            "to leave a source out, type ~arms.NAME.sources.SOURCE",
        )


@dataclass(kw_only=True, slots=True)
class InstructionMethod(LoraMethod):
    """Instruction tuning: a weighted mix of prompt/completion sources (evaluation/mix).

    What trains is `tunes`; the keys of LoRA hold where that is lora. The training room sees the
    rows and the settings of FullMethod or LoraMethod, nothing else. A source whose weight asks for
    more rows than it has is repeated, at most max_repeats times: up to 4 passes over repeated data
    are worth almost as much as new data (Muennighoff et al. 2023, arXiv 2305.16264).
    """

    kind: str = "instruction"
    tunes: Tunes = Tunes.lora
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    mix_size: int | None = None  # rows; null: so many that the task's training items come once
    max_repeats: int = 4
    mix_seed: int = 0

    def __post_init__(self) -> None:
        """At least one source; positive counts; no keys of LoRA where all weights train."""
        LoraMethod.__post_init__(self)
        require(
            self.mix_size is None or self.mix_size > 0,
            "arms.*.mix_size",
            self.mix_size,
            "a positive count, or null",
        )
        require(self.max_repeats > 0, "arms.*.max_repeats", self.max_repeats, "a positive count")
        own = self.lora_settings()
        plain = LoraMethod()
        changed = [f.name for f in _own_fields() if getattr(own, f.name) != getattr(plain, f.name)]
        require(
            self.tunes is Tunes.lora or not changed,
            f"arms.*.{changed[0] if changed else 'tunes'}",
            f"{getattr(own, changed[0]) if changed else ''} with tunes=full",
            "keys of LoRA with tunes=lora only",
            "write tunes=lora, or leave the key out",
        )

    def lora_settings(self) -> LoraMethod:
        """The same arm as plain LoRA."""
        names = [f.name for f in dataclasses.fields(LoraMethod) if f.name != "kind"]
        return LoraMethod(**{name: getattr(self, name) for name in names})

    def full_settings(self) -> FullMethod:
        """The same arm as full fine-tuning."""
        names = [f.name for f in dataclasses.fields(FullMethod) if f.name != "kind"]
        return FullMethod(**{name: getattr(self, name) for name in names})


def _own_fields() -> list[dataclasses.Field[Any]]:
    """Fields that LoraMethod adds to those of every fine-tuned arm."""
    shared = {f.name for f in dataclasses.fields(TunedMethod)}
    return [f for f in dataclasses.fields(LoraMethod) if f.name not in shared]


def trained_method(method: Method) -> Method:
    """What the training room is told of an arm: an instruction arm trains as full or LoRA."""
    if not isinstance(method, InstructionMethod):
        return method
    is_full = method.tunes is Tunes.full
    return method.full_settings() if is_full else method.lora_settings()


@dataclass(kw_only=True, slots=True)
class TfidfMethod(Method):
    """TF-IDF with logistic regression: what a bag of words reaches on the same labels."""

    kind: str = "tfidf"


@dataclass(kw_only=True, slots=True)
class LinearProbeMethod(AnsweringMethod):
    """Logistic regression on the base model's last hidden states of the arm's prompt."""

    kind: str = "linear_probe"
    prompt: str = "bare"
    pooling: Pooling = Pooling.mean

    def __post_init__(self) -> None:
        """It reads the base model, with one prompt for all items."""
        AnsweringMethod.__post_init__(self)
        require(self.on is None, "arms.*.on", self.on, "null: a probe reads the base model")
        require(
            self.shot_selection is not ShotSelection.retrieved,
            "arms.*.shot_selection",
            self.shot_selection.name,
            "balanced or random",
        )


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
    "peft": PeftMethod,
    "instruction": InstructionMethod,
    "tfidf": TfidfMethod,
    "linear_probe": LinearProbeMethod,
    "given": GivenMethod,
}
