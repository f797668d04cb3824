"""From messages to one text: a model's own chat template, or a plain layout for models without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from conf.errors import ModelError
from evaluation.prompts import Message
from evaluation.prompts.sandbox import Sandbox, TemplateFault

# Two words that a template can trim and wrap but has no reason to change.
USER_MARK = "Kestrel"
ANSWER_MARK = "Bramble"


class Layout(Protocol):
    """How messages become text.

    opening: the text that asks for an answer, up to the end of the prompt. gap: what stands
    between it and the answer. closing: what follows a finished answer. stop: strings that end one.
    """

    kind: str
    opening: str
    gap: str
    closing: str
    stop: tuple[str, ...]

    def text(self, messages: Sequence[Message], *, is_open: bool = True) -> str:
        """The messages as text; is_open: with the opening of the next answer."""
        ...


class PlainLayout:
    """`Input:` and `Answer:` lines, for models that have learnt no chat."""

    kind = "plain"
    opening = "Answer:"
    gap = " "
    closing = ""
    stop: tuple[str, ...] = ("\n\n", "\nInput:")

    def text(self, messages: Sequence[Message], *, is_open: bool = True) -> str:
        """System text as it is, one block per question with its answer, blank lines between."""
        text = ""
        for message in messages:
            if message.role == "system":
                text += f"{message.content}\n\n" if message.content else ""
            elif message.role == "user":
                text += f"Input: {message.content}\n"
            else:
                text += f"Answer: {message.content}\n\n"
        return text + self.opening if is_open else text


class ChatLayout:
    """A chat template, rendered as transformers renders it, in our sandbox.

    What the template does with a system message, and how its answers open and close, is found by
    rendering two probes. A template that refuses or drops a system message gets its text at the
    start of the first user message.
    """

    kind = "chat"
    stop: tuple[str, ...] = ()

    def __init__(self, template: str, *, special_tokens: Mapping[str, str], where: str) -> None:
        self._sandbox = Sandbox()
        self._special_tokens = dict(special_tokens)
        self._where = where
        try:
            self._template = self._sandbox.template(template)
        except TemplateFault as fault:
            raise self._refusal(fault) from None
        self._has_system = self._keeps_system()
        self._drops_blank_system = self._has_system and self._is_shorter_without_system()
        self.opening, self.gap, self.closing = self._ends()

    def text(self, messages: Sequence[Message], *, is_open: bool = True) -> str:
        """The messages through the template; ModelError where it fails or does too much."""
        try:
            return self._render(self._arranged(messages), is_open=is_open)
        except TemplateFault as fault:
            raise self._refusal(fault) from None

    def _arranged(self, messages: Sequence[Message]) -> list[Message]:
        """An empty system message asks for no system prompt, in the fewest tokens."""
        first, *rest = messages
        if first.role != "system" or (self._has_system and first.content):
            return list(messages)
        if not first.content:
            return rest if self._drops_blank_system or not self._has_system else list(messages)
        return [Message(rest[0].role, f"{first.content}\n\n{rest[0].content}"), *rest[1:]]

    def _render(self, messages: Sequence[Message], *, is_open: bool) -> str:
        values = {
            **self._special_tokens,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "tools": [],  # what transformers passes where there are none
            "documents": None,
            "add_generation_prompt": is_open,
            "enable_thinking": False,  # reasoning models answer at once
        }
        return self._sandbox.run(self._template, values)

    def _keeps_system(self) -> bool:
        probe = [Message("system", ANSWER_MARK), Message("user", USER_MARK)]
        try:
            return ANSWER_MARK in self._render(probe, is_open=True)
        except TemplateFault:
            return False

    def _is_shorter_without_system(self) -> bool:
        user = Message("user", USER_MARK)
        try:
            without = self._render([user], is_open=True)
        except TemplateFault:
            return False
        return len(without) <= len(self._render([Message("system", ""), user], is_open=True))

    def _ends(self) -> tuple[str, str, str]:
        """The opening, gap and closing of an answer, read off a probe with and without one."""
        user = Message("user", USER_MARK)
        prompt = self.text([user])
        whole = self.text([user, Message("assistant", ANSWER_MARK)], is_open=False)
        if USER_MARK not in prompt or ANSWER_MARK not in whole:
            raise self._refusal(TemplateFault("a message's content is missing in what it makes"))
        before, _, closing = whole.rpartition(ANSWER_MARK)
        gap = before.removeprefix(prompt) if before.startswith(prompt) else ""
        opening = prompt.rpartition(USER_MARK)[2]
        return opening, gap if gap.isspace() else "", closing

    def _refusal(self, fault: TemplateFault) -> ModelError:
        where = self._where if fault.line is None else f"{self._where}:{fault.line}"
        return ModelError(
            where,
            found=f"a chat template that fails: {fault.reason}",
            expected="a template that renders system, user and assistant messages",
            remedy="write model.layout=plain to go without it, or mend the template",
        )
