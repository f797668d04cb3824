"""The named choices of the configuration: every enum a key can hold, and how a value is refused."""

from __future__ import annotations

import enum

from conf.errors import ConfigError


def require(condition: bool, key: str, found: object, expected: str, remedy: str = "") -> None:
    """Refuse a key's value with the key, what was found and what is expected."""
    if not condition:
        raise ConfigError(key, found=repr(found), expected=expected, remedy=remedy)


class TaskKind(enum.Enum):
    """What an item asks for; auto reads it off the columns."""

    auto = "auto"
    classification = "classification"
    multiple_choice = "multiple_choice"
    generation = "generation"
    pairs = "pairs"


class AnswerBy(enum.Enum):
    """Score the labels, generate the answer, or take the better of the two on validation."""

    auto = "auto"
    score = "score"
    generate = "generate"


class Tunes(enum.Enum):
    """Which weights an instruction arm trains: adapters, or all."""

    lora = "lora"
    full = "full"


class Calibration(enum.Enum):
    """What is subtracted from the labels' log-probabilities; auto: the best on validation."""

    auto = "auto"
    none = "none"
    contextual = "contextual"
    batch = "batch"


class Normalisation(enum.Enum):
    """What a label's score is made of its tokens' log-probabilities; auto: the best on validation.

    sum: of all tokens. token, byte: the sum per token or per byte of the label. pmi: the sum less
    that under inputs without content. first_token: the first token's alone.
    """

    auto = "auto"
    sum = "sum"
    token = "token"
    byte = "byte"
    pmi = "pmi"
    first_token = "first_token"


class Quantization(enum.Enum):
    """How the frozen base of an adapter is held while it trains."""

    nf4 = "nf4"  # 4-bit NormalFloat, with quantised scales


# transformers' BitsAndBytesConfig for nf4, in training and in evaluation alike: as in QLoRA
# (Dettmers et al. 2023, arXiv 2305.14314).
NF4_ARGUMENTS = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


class RepeatStopping(enum.Enum):
    """When the voting repeats of an item stop early (evaluation/scoring/voting.py).

    decided: once the remaining ones cannot change the vote. likely: once the leading answer stays
    ahead with a probability over 0.95; may change the vote. never: all repeats are asked.
    """

    decided = "decided"
    likely = "likely"
    never = "never"


class ShotSelection(enum.Enum):
    """How shots are drawn from the training split."""

    balanced = "balanced"
    random = "random"
    retrieved = "retrieved"  # for each item the nearest ones, by TF-IDF


class Pooling(enum.Enum):
    """What a linear probe reads of a prompt's hidden states: their mean, or the last token's."""

    mean = "mean"
    last = "last"


class Schedule(enum.Enum):
    """Learning rate after the warm-up."""

    linear = "linear"
    cosine = "cosine"
    constant = "constant"


class Keep(enum.Enum):
    """Which checkpoint of a training answers: the last, or the best on validation."""

    last = "last"
    best = "best"


class Dtype(enum.Enum):
    """Number format of weights and arithmetic; auto: float32 on CPU, bfloat16 on GPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class ZeroStage(enum.Enum):
    """DeepSpeed ZeRO stage; auto: 0 where the model fits one device, else the smallest fitting."""

    auto = -1
    zero0 = 0  # integer values, so that `zero.stage=3` is looked up by value
    zero1 = 1
    zero2 = 2
    zero3 = 3


class Device(enum.Enum):
    """What a worker computes on; beyond cuda, accelerators of conf/devices.py by name."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    a100_40gb = "a100_40gb"
    a100_80gb = "a100_80gb"
    h100 = "h100"
    h200 = "h200"
    b200 = "b200"
    l4 = "l4"
    a10g = "a10g"
    rtx4090 = "rtx4090"

    @property
    def is_named(self) -> bool:
        """Whether it is one kind of accelerator, which a plan may be made for without having it."""
        return self not in (Device.auto, Device.cpu, Device.cuda)


class WandbMode(enum.Enum):
    """auto: online with a key, offline without one."""

    auto = "auto"
    online = "online"
    offline = "offline"
    off = "off"


class ReportText(enum.Enum):
    """Whether item texts, prompts and completions appear in the report."""

    full = "full"
    none = "none"


class KernelImpl(enum.Enum):
    """Which implementation of our kernels runs."""

    auto = "auto"
    cpu = "cpu"
    triton = "triton"
    reference = "reference"
