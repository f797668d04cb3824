"""Model directories, tasks and arms for tests of prompts: small, and made in a moment."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from conf.choices import TaskKind
from conf.groups import EngineConfig, ModelConfig, TrainerConfig, ZeroConfig
from conf.methods import AnsweringMethod, LoraMethod, PromptMethod
from conf.records import Item
from conf.resolve import Arm
from evaluation.tasks import Task, TaskFacts

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a very helpful and friendly helper<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No system role, trimmed contents, a begin token, a gap of one space: as Llama 2 and Gemma do.
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif message.role == 'user' %}[INST] {{ message.content | trim }} [/INST]"
    "{% else %} {{ message.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# A template that drops what it is told about the system, with a macro, namespace and whitespace.
MACRO = """{%- set ns = namespace(count=0) -%}
{%- macro turn(role, text) -%}
<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro -%}
{%- for m in messages if m.role != 'system' -%}
{%- set ns.count = ns.count + 1 -%}
{{ turn(m['role'], m.content) }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

CORPUS = (
    "So the answer is spam. So the answer is ham.\nspam\nham\nnot spam\n",
    "assistant\nspam assistant\nham assistant\nspammer assistant\nhamster",
    "The message is spam and the answer is ham; hamster, spammer, not ham.",
)


def train_tokenizer(*, merges_across_words: bool, vocabulary: int = 420) -> Tokenizer:
    """A byte-level BPE; across words: no pre-tokenisation, so that tokens span any boundary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=not merges_across_words
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|im_start|>", "<|im_end|>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(text, special=True) for text in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(CORPUS) * 4, trainer)
    return tokenizer


def write_model(
    directory: Path,
    *,
    template: str | None = CHATML,
    merges_across_words: bool = False,
    begins: bool = False,
    is_template_in_config: bool = False,
    max_length: int = 512,
    **config: Any,
) -> Path:
    """A model directory without weights; begins: `<s>` goes before every text."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(merges_across_words=merges_across_words)
    if begins:
        start = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", start)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "bos_token": "<s>",
        "model_max_length": max_length,
        **config,
    }
    if template is not None and is_template_in_config:
        values["chat_template"] = template
    elif template is not None:
        (directory / "chat_template.jinja").write_text(template)
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return directory


def make_item(text: str, **fields: Any) -> Item:
    """An item whose id and hash follow from its text."""
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    values: dict[str, Any] = {"id": sha256[:8], "split": "train", "sha256": sha256, **fields}
    return Item(input=text, **values)


def spam_items(count: int = 12, **fields: Any) -> tuple[Item, ...]:
    """Items labelled ham, spam, ham, ..."""
    return tuple(
        make_item(f"message number {i}", label=("ham", "spam")[i % 2], **fields)
        for i in range(count)
    )


def make_task(**fields: Any) -> Task:
    """A ham-or-spam task; any field can be given another value."""
    items = spam_items()
    values: dict[str, Any] = {
        "name": "mail",
        "kind": TaskKind.classification,
        "scoring": "exact",
        "instruction": "Is it ham or spam?",
        "labels": ("ham", "spam"),
        "label_words": {"ham": "ham", "spam": "spam"},
        "items": {"train": items, "validation": items[:2], "test": items[:2]},
        "facts": TaskFacts(source="tests"),
        "sha256": "0" * 64,
    }
    return Task(**{**values, **fields})


def free_task(scoring: str, **fields: Any) -> Task:
    """A task of free answers under a scoring rule."""
    values: dict[str, Any] = {"kind": TaskKind.generation, "labels": (), "label_words": {}}
    return make_task(scoring=scoring, **{**values, **fields})


def make_arm(prompt: str = "zero_shot", *, is_tuned: bool = False, **fields: Any) -> Arm:
    """An arm named `mine` with that prompt; fields go to its method."""
    method_class: type[AnsweringMethod] = LoraMethod if is_tuned else PromptMethod
    return Arm(
        name="mine",
        method=method_class(prompt=prompt, **fields),
        model=ModelConfig(name="m"),
        engine=EngineConfig(name="e"),
        trainer=TrainerConfig(),
        zero=ZeroConfig(),
        is_same_base=True,
    )
