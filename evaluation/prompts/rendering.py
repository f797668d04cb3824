"""From messages to token ids: the one rendering that training and evaluation share.

Light: jinja2 and tokenizers, no transformers. A chat prompt has the token ids that transformers'
`apply_chat_template(messages, add_generation_prompt=True)` gives (tests/evaluation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from conf.errors import DataError, ModelError
from conf.hashing import sha256_of
from evaluation.prompts import Message
from evaluation.prompts.layouts import ChatLayout, Layout, PlainLayout
from evaluation.prompts.tokenizer_files import (
    read_generation_ends,
    read_json,
    read_length_limit,
    read_special_tokens,
    read_template,
    read_tokenizer,
)

NO_GAP_AFTER = "([{\"'`"  # a prefix that ends so is continued without a space


class Renderer:
    """A model's tokenizer and chat template (or the plain layout).

    end_ids: tokens that end a completion; the first one is what a training completion ends with.
    stop: strings that end a completion where the layout has no end token of its own.
    max_length: tokens that prompt and completion may have together. sha256: of tokenizer,
    template, special tokens and layout.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        layout: Layout,
        special_tokens: Mapping[str, str],
        max_length: int,
        sha256: str,
        extra_end_ids: Sequence[int] = (),
        where: str = "tokenizer.json",
    ) -> None:
        self._tokenizer = tokenizer
        self._layout = layout
        self._added = {
            id_: token
            for id_, token in tokenizer.get_added_tokens_decoder().items()
            if token.content.strip()
        }
        self._start_ids = _start_ids(tokenizer) if layout.kind == "plain" else []
        self.layout = layout.kind
        self.stop = layout.stop
        self.max_length = max_length
        self.sha256 = sha256
        self.end_ids = self._find_end_ids(special_tokens, extra_end_ids, where=where)

    @classmethod
    def load(
        cls, model_dir: Path, *, layout: str = "auto", max_length: int | None = None
    ) -> Renderer:
        """Read tokenizer.json, tokenizer_config.json and the chat template of a model directory.

        Args:
            model_dir: a directory in the standard layout.
            layout: auto (chat where there is a template) | chat | plain.
            max_length: tokens; None: the model's context.

        Raises:
            ModelError: a file is missing or broken, the template fails, or there is no template.
            ConfigError: max_length is over the model's context.
        """
        tokenizer = read_tokenizer(model_dir / "tokenizer.json")
        config = read_json(model_dir / "tokenizer_config.json")
        template = read_template(model_dir, config)
        if layout == "chat" and template is None:
            raise ModelError(
                str(model_dir),
                found="no chat template",
                expected="chat_template.jinja, or chat_template in tokenizer_config.json",
                remedy="write model.layout=plain",
            )
        special_tokens = read_special_tokens(
            config, read_json(model_dir / "special_tokens_map.json")
        )
        chosen: Layout = PlainLayout()
        if template is not None and layout != "plain":
            chosen = ChatLayout(template, special_tokens=special_tokens, where=str(model_dir))
        used_template = template if chosen.kind == "chat" else None
        return cls(
            tokenizer,
            layout=chosen,
            special_tokens=special_tokens,
            max_length=read_length_limit(model_dir, config, max_length),
            sha256=sha256_of([tokenizer.to_str(), used_template, special_tokens, chosen.kind]),
            extra_end_ids=read_generation_ends(read_json(model_dir / "generation_config.json")),
            where=str(model_dir),
        )

    def render(self, messages: Sequence[Message], prefix: str = "") -> str:
        """The prompt's text: all messages, the opening of the answer, and how the answer begins.

        Spaces at the end of the prefix are dropped: they belong to the next token (see gap).
        """
        text = self._layout.text(messages)
        return text + self._layout.gap + prefix.rstrip(" ") if prefix.strip() else text

    def gap(self, prompt_text: str) -> str:
        """What stands between a prompt and its completion: a space, or nothing."""
        if prompt_text.endswith(self._layout.opening) and self._layout.opening:
            return self._layout.gap
        last = prompt_text[-1:]
        return "" if not last or last.isspace() or last in NO_GAP_AFTER else " "

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; the plain layout's begin-of-sequence token is put before it."""
        return self._start_ids + self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_continued(self, text: str, endings: Sequence[str]) -> list[list[int]]:
        """`encode(text + ending)` for each ending, with what lies before its last mark done once.

        An added token cuts a text in two that are tokenised apart, so only what follows the last
        one is tokenised again; where a tokenizer does not do so, all of it is.
        """
        whole = self.encode(text)
        cut = max((text.rfind(token.content) for token in self._cutting_tokens()), default=-1)
        anchor = self._tokenizer.encode(text[max(cut, 0) :], add_special_tokens=False).ids
        if cut <= 0 or not anchor or whole[-len(anchor) :] != anchor:
            return [self.encode(text + ending) for ending in endings]
        head = whole[: -len(anchor)]
        tails = self._tokenizer.encode_batch(
            [text[cut:] + ending for ending in endings], add_special_tokens=False
        )
        return [head + tail.ids for tail in tails]

    def decode(self, ids: Sequence[int], *, has_special_tokens: bool = False) -> str:
        """Text of token ids, without special tokens unless asked for."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not has_special_tokens)
        return text

    def _cutting_tokens(self) -> list[Any]:
        return [t for t in self._added.values() if t.special and not t.normalized]

    def _find_end_ids(
        self, special_tokens: Mapping[str, str], extra: Sequence[int], *, where: str
    ) -> tuple[int, ...]:
        """The token that closes an answer in the layout, then end-of-sequence tokens."""
        closing = self._tokenizer.encode(self._layout.closing, add_special_tokens=False).ids
        found = [id_ for id_ in closing if id_ in self._added][:1]
        eos = self._tokenizer.token_to_id(special_tokens.get("eos_token", ""))
        ends = tuple(dict.fromkeys([*found, *([] if eos is None else [eos]), *extra]))
        if not ends:
            raise ModelError(
                where,
                found="a tokenizer without an end-of-sequence token",
                expected="eos_token in tokenizer_config.json, or a template that closes a turn",
                remedy="add eos_token to tokenizer_config.json",
            )
        return ends


@dataclass(kw_only=True, slots=True, frozen=True)
class JointIds:
    """One tokenisation of a prompt with each of its completions.

    prompt_ids + completion_ids[i] are the ids of the text prompt + gap + completion i, then the end
    token if asked for. Where the last characters of the prompt merge into a completion's token, the
    prompt is shortened for all. prompt_tokens: ids of the prompt's text alone.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: list[tuple[int, ...]]
    prompt_tokens: int


def joint_ids(
    renderer: Renderer, prompt_text: str, completions: Sequence[str], *, end: bool | None = None
) -> JointIds:
    """Tokenise a prompt with its completions, exactly.

    Args:
        renderer: tokenizer, and the gap between prompt and completion.
        prompt_text: rendered prompt.
        completions: texts without the gap.
        end: put an end token after each completion; None: only where one completion's ids begin
            another's, which could not be told apart without.

    Raises:
        DataError: an empty completion, or two with the same tokens.
    """
    for completion in completions:
        if not completion.strip():
            raise _bad_word(f"{completion!r}, which has no text", "a word in every label")
    gap = renderer.gap(prompt_text)
    prompt = renderer.encode(prompt_text)
    wholes = renderer.encode_continued(prompt_text, [gap + text for text in completions])
    shared = min((_common_length(prompt, whole) for whole in wholes), default=len(prompt))
    ids = [tuple(whole[shared:]) for whole in wholes]
    if _begins_another(ids, completions) if end is None else end:
        ids = [(*completion, renderer.end_ids[0]) for completion in ids]
    return JointIds(
        prompt_ids=tuple(prompt[:shared]), completion_ids=ids, prompt_tokens=len(prompt)
    )


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _begins_another(ids: Sequence[tuple[int, ...]], completions: Sequence[str]) -> bool:
    """Whether one begins another; in sorted order such a pair has neighbours of the same sort."""
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    begins = False
    for i, j in zip(order, order[1:], strict=False):
        if ids[i] == ids[j]:
            raise _bad_word(
                f"{completions[i]!r} and {completions[j]!r}, which are the same tokens",
                "words that differ",
            )
        begins = begins or ids[j][: len(ids[i])] == ids[i]
    return begins


def _bad_word(found: str, expected: str) -> DataError:
    return DataError(
        "task.label_words",
        found=found,
        expected=expected,
        remedy="give each label its own word, e.g. +task.label_words.LABEL=word",
    )


def _start_ids(tokenizer: Tokenizer) -> list[int]:
    """Tokens that the tokenizer puts before any text (begin of sequence)."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full: list[int] = tokenizer.encode("a", add_special_tokens=True).ids
    starts = [k for k in range(len(full)) if full[k : k + len(bare)] == bare]
    return full[: starts[0]] if starts else []
