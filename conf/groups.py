"""The configuration groups of task, model and arm: keys, types, defaults and own checks of each.

Defaults live here or in a preset of conf/, never in both and never in code. The classes are
`kw_only` and `slots` (slots is what makes a stray `+key=1` fail) and not frozen (Hydra replaces
presets in place).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.choices import Dtype, Keep, RepeatStopping, Schedule, TaskKind, ZeroStage, require


@dataclass(kw_only=True, slots=True)
class ColumnsConfig:
    """Which column of the user's file holds what."""

    id: str = "id"
    input: str = "input"
    context: str = "context"
    label: str = "label"
    target: str = "target"
    references: str = "references"
    choices: str = "choices"
    rationale: str = "rationale"
    group: str = "group"
    stereotype: str = "stereotype"  # the answer that a prejudice would give
    prompt: str = "prompt"
    completion: str = "completion"


@dataclass(kw_only=True, slots=True)
class FilesConfig:
    """One file per split, where the splits are the user's own."""

    train: str | None = None
    validation: str | None = None
    test: str | None = None


@dataclass(kw_only=True, slots=True)
class LimitConfig:
    """At most this many items per split, class-balanced for classification; null: all."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None

    def __post_init__(self) -> None:
        """Counts are positive."""
        for split in ("train", "validation", "test"):
            value = getattr(self, split)
            require(
                value is None or value > 0, f"task.limit.{split}", value, "a positive count or null"
            )


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """A problem set with a scoring rule."""

    name: str = MISSING
    source: str = "file"  # file | hub | sms_spam | orders | a loader registered by a plugin
    path: str | None = None  # a file, a directory with train/validation/test, or a hub id
    files: FilesConfig = field(default_factory=FilesConfig)
    subset: str | None = None  # hub only: the data set's configuration name
    revision: str | None = None  # hub only
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    kind: TaskKind = TaskKind.auto
    scoring: str = "auto"  # auto | exact | numeric | token_f1 | rouge_l | chrf | json | a plugin's
    instruction: str | None = None
    instructions: list[str] = field(default_factory=list)  # further wordings
    label_words: dict[str, str] = field(default_factory=dict)  # label -> the word a model writes
    labels: list[str] = field(
        default_factory=list
    )  # the label set; empty: those in the train split
    abstain_label: str | None = None  # the answer "it is not said"; null: by its usual words
    json_schema: str | None = None  # file with the schema that JSON answers must satisfy
    group: str | None = None  # column whose equal values stay in one split
    is_balanced: bool = False  # limit and split with equal counts per class
    near_duplicates: str = "count"  # count | remove
    limit: LimitConfig = field(default_factory=LimitConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks that need more than one field."""
        require(
            self.near_duplicates in ("count", "remove"),
            "task.near_duplicates",
            self.near_duplicates,
            "count or remove",
        )
        require(
            self.instruction is None or bool(self.instruction.strip()),
            "task.instruction",
            self.instruction,
            "a text, or null for one made from kind and labels",
        )


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The base model: a package's file, a local directory or a hub id."""

    name: str = MISSING
    source: str = "hub"  # hub (path is a directory or a hub id) | package | tiny
    path: str | None = None
    revision: str | None = None
    package: str | None = None  # source=package: distribution that ships the file
    dtype: Dtype = Dtype.auto
    layout: str = "auto"  # auto | chat (the model's template) | plain
    max_length: int | None = None  # tokens; null: the model's context
    facts: str | None = None  # a file of conf/facts: sizes to plan by where no weights are here
    note: str = ""  # shown in the report, e.g. that the weights come from 4 bits

    def __post_init__(self) -> None:
        """Checks on single fields."""
        require(
            self.layout in ("auto", "chat", "plain"),
            "model.layout",
            self.layout,
            "auto, chat or plain",
        )
        require(
            self.source in ("hub", "package", "tiny"),
            "model.source",
            self.source,
            "hub, package or tiny",
        )
        require(
            self.max_length is None or self.max_length >= 16,
            "model.max_length",
            self.max_length,
            "at least 16 tokens, or null for the model's context",
        )


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """How weights are trained; null learning_rate: the method's own default.

    A tenth of the steps warms up and the rest falls to zero in a line, as small sets want it
    (Mosbach et al. 2021, arXiv 2006.04884); AdamW without weight decay. Batches are small: LoRA
    falls behind full fine-tuning in large ones ("LoRA Without Regret", Schulman et al., 2025).
    """

    epochs: float = 2.0
    max_steps: int | None = None
    batch_size: int = 8  # examples per optimizer step over all workers
    micro_batch_size: int | None = None  # examples per worker and pass; null: as large as divides
    learning_rate: float | None = None
    schedule: Schedule = Schedule.linear
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    activation_checkpointing: bool = False
    num_points: int = 2  # checkpoints scored on validation, the last step included
    # last: the rate ends at zero there, and nothing is chosen on validation labels, so that arms
    # and numbers of labels compare as they are. best: early stopping, by the task's own metric.
    keep: Keep = Keep.last
    state_every_steps: int | None = None  # to resume from; null: as often as costs 3% of the time
    keep_states: int = 2  # newest states kept while training; a finished training needs none
    seed: int = 0

    def __post_init__(self) -> None:
        """Ranges."""
        for key in ("epochs", "batch_size", "clip_norm", "num_points", "keep_states"):
            require(getattr(self, key) > 0, f"trainer.{key}", getattr(self, key), "positive")
        for key in ("max_steps", "micro_batch_size", "state_every_steps"):
            value = getattr(self, key)
            require(value is None or value > 0, f"trainer.{key}", value, "a positive count or null")
        require(
            self.keep is Keep.last or self.num_points > 1,
            "trainer.keep",
            f"best of trainer.num_points={self.num_points}",
            "two or more points to choose from",
            "write trainer.num_points=4",
        )
        require(
            self.learning_rate is None or 0 < self.learning_rate < 10,
            "trainer.learning_rate",
            self.learning_rate,
            "a positive number below 10, or null for the method's default",
        )
        require(
            0 <= self.warmup_fraction < 1,
            "trainer.warmup_fraction",
            self.warmup_fraction,
            "a share in [0, 1)",
        )
        require(
            self.weight_decay >= 0,
            "trainer.weight_decay",
            self.weight_decay,
            "0 or a positive number",
        )


@dataclass(kw_only=True, slots=True)
class ZeroConfig:
    """How training state is sharded over workers (DeepSpeed ZeRO)."""

    stage: ZeroStage = ZeroStage.auto
    offload: bool = False  # optimizer and parameters to CPU memory, stage 3 only
    nvme_path: str | None = None  # offload to this directory on an NVMe disk instead

    def __post_init__(self) -> None:
        """Offload belongs to stage 3 here."""
        require(
            not self.offload or self.stage in (ZeroStage.zero3, ZeroStage.auto),
            "zero.offload",
            self.offload,
            "false, or zero.stage=3",
            "type zero=3_offload",
        )
        require(
            self.nvme_path is None or self.offload,
            "zero.nvme_path",
            self.nvme_path,
            "null where zero.offload is false",
            "type zero=3_offload",
        )


# Settings of an engine that its answers do not depend on.
NOT_ANSWER_KEYS = (
    *("actors", "api_key_env", "max_concurrency", "requests_per_minute"),
    *("timeout_seconds", "max_attempts", "vllm_python", "start_seconds"),
)


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """What turns prompts into scores and completions."""

    name: str = MISSING  # forest | transformers | scripted | openai | vllm
    batch_size: int | None = None  # requests at once; null: by itself, 32 for engine=transformers
    batch_tokens: int | None = None  # forest: rows per forward pass; null: from measured memory
    max_new_tokens: int | None = None  # null: from the longest target of the training split
    temperature: float = 0.0
    stop: list[str] = field(default_factory=list)
    repeats: int = 1  # sampled repeats of a generated answer; needs temperature > 0
    latency_requests: int = 8  # separate requests measured alone, one at a time; 0: none
    repeat_stopping: RepeatStopping = RepeatStopping.decided  # only where repeats vote
    winner_only: bool = False  # score the best label alone: no label distribution, no calibration
    too_long: str = "refuse"  # a prompt over the context: refuse | truncate (the item, counted)
    prefix_cache: bool = True  # prefill the prefix that all requests share once
    actors: int | None = None  # engine processes; null: one per accelerator, one on a CPU
    script: str = "constant"  # scripted only: how it answers, see evaluation/engines/scripted.py
    # openai: where it is served, up to /v1, and the model's name there
    base_url: str | None = None
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable with the key; "": none is needed
    # openai and vllm
    max_concurrency: int = 8  # requests under way at once
    requests_per_minute: float | None = None  # attempts included; null: no limit
    timeout_seconds: float = 120.0  # of one attempt, to the last byte of its answer
    max_attempts: int = 12  # of a request, whose waits double up to 30 s
    vllm_python: str | None = None  # vllm: the Python it is installed for; null: `vllm` on PATH
    start_seconds: float = 600.0  # vllm: how long the server may take until it answers

    def __post_init__(self) -> None:
        """Ranges."""
        for key in ("batch_size", "batch_tokens", "max_new_tokens", "actors"):
            value = getattr(self, key)
            require(value is None or value > 0, f"engine.{key}", value, "a positive count or null")
        for key in ("max_concurrency", "max_attempts", "timeout_seconds", "start_seconds"):
            require(getattr(self, key) > 0, f"engine.{key}", getattr(self, key), "positive")
        rate = self.requests_per_minute
        require(rate is None or rate > 0, "engine.requests_per_minute", rate, "positive, or null")
        require(
            self.too_long in ("refuse", "truncate"),
            "engine.too_long",
            self.too_long,
            "refuse or truncate",
        )
        for key in ("temperature", "latency_requests"):
            require(getattr(self, key) >= 0, f"engine.{key}", getattr(self, key), "0 or more")
        require(self.repeats > 0, "engine.repeats", self.repeats, "a positive count")
        require(
            self.repeats == 1 or self.temperature > 0,
            "engine.repeats",
            self.repeats,
            "1, since greedy repeats are all equal",
            "add engine.temperature=0.7",
        )

    @property
    def is_hosted(self) -> bool:
        """Whether it computes elsewhere, and is paid by token instead of by device-second."""
        return self.name == "openai"

    @property
    def only_generates(self) -> bool:
        """Whether it is reached over HTTP: it gives completions, and no labels' scores."""
        return self.name in ("openai", "vllm")

    def determining(self) -> EngineConfig:
        """The settings that determine answers: not where, how fast or how often it is asked."""
        plain = EngineConfig(name=self.name)
        return dataclasses.replace(self, **{key: getattr(plain, key) for key in NOT_ANSWER_KEYS})
