"""The built-in prompt styles, each a small generator."""

from __future__ import annotations

from conf.choices import TaskKind
from conf.records import Item
from evaluation.plugins import prompt_style
from evaluation.prompts import Ask, Calls, Message, PromptContext, Think, conversation, item_text

# Kojima et al. 2022 (arXiv 2205.11916): the words that set reasoning going, and those that end it.
THINK_HINT = "First think step by step in one or two sentences, then give the answer."
THOUGHT_PREFIX = "Let's think step by step."
ANSWER_PREFIX = "So the answer is"
CLOZE_PREFIX = "The answer is"

PERSONAS = {
    TaskKind.classification: "You are an expert annotator who has sorted thousands of such texts.",
    TaskKind.multiple_choice: "You are a professor who answers exam questions in your own field.",
    TaskKind.generation: "You are a senior specialist, known for exact and complete answers.",
    TaskKind.pairs: "You are a senior specialist, known for exact and complete answers.",
}


@prompt_style("zero_shot")
def zero_shot(item: Item, context: PromptContext) -> Calls:
    """The instruction and the item."""
    answer = yield Ask(conversation(item, system=context.instruction))
    return answer


@prompt_style("few_shot")
def few_shot(item: Item, context: PromptContext) -> Calls:
    """The instruction, shots as turns of the chat, and the item (Brown et al. 2020)."""
    answer = yield Ask(
        conversation(
            item,
            system=context.instruction,
            shots=context.shots,
            answer_word=context.answer_word,
        )
    )
    return answer


@prompt_style("chain_of_thought")
def chain_of_thought(item: Item, context: PromptContext) -> Calls:
    """A short thought first, then the answer in the same turn (Wei et al. 2022)."""
    messages = conversation(
        item,
        system=f"{context.instruction} {THINK_HINT}",
        shots=context.shots,
        answer_word=lambda shot: reasoned(shot.rationale or "", context.answer_word(shot)),
    )
    thought = yield Think(
        messages, prefix=THOUGHT_PREFIX, max_new_tokens=context.max_thought_tokens
    )
    answer = yield Ask(messages, prefix=reasoned(thought))
    return answer


@prompt_style("role_play")
def role_play(item: Item, context: PromptContext) -> Calls:
    """A persona before the instruction; shots, where there are any, as turns."""
    persona = context.persona or PERSONAS[context.kind]
    answer = yield Ask(
        conversation(
            item,
            system=f"{persona} {context.instruction}",
            shots=context.shots,
            answer_word=context.answer_word,
        )
    )
    return answer


@prompt_style("bare")
def bare(item: Item, context: PromptContext) -> Calls:
    """The input only, for arms whose weights know the task.

    The empty system message keeps out a template's default one.
    """
    answer = yield Ask((Message("system", ""), Message("user", item_text(item))))
    return answer


@prompt_style("cloze")
def cloze(item: Item, context: PromptContext) -> Calls:
    """The question without its choices; the answer's turn is begun for the model.

    For scored answers. A small model that cannot pick a letter off a list still says what follows:
    SmolLM2-135M finds 27% of the general set's answers with the choices listed, and 78% so.
    """
    question = "\n".join(part for part in (item.context, item.input) if part)
    messages = (Message("system", context.instruction), Message("user", question))
    answer = yield Ask(messages, prefix=CLOZE_PREFIX)
    return answer


def reasoned(thought: str, answer: str = "") -> str:
    """One turn: the opening words, the thought on one line, and the words before the answer.

    A thought that runs on into an answer of its own is cut there.
    """
    thought = " ".join(thought.partition(ANSWER_PREFIX)[0].split())
    return " ".join(part for part in (THOUGHT_PREFIX, thought, ANSWER_PREFIX, answer) if part)
