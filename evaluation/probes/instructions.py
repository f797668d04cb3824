"""Requests with an instruction that a program verifies, in the manner of IFEval (pure).

Own-written, made from tables, the same on every machine. A request is a plain question and one
instruction on the form of its answer ("in upper case", "in exactly 4 words", "as JSON with the
key ..."). Only the form is judged, not the fact (Zhou et al. 2023, arXiv 2311.07911, "strict").
The requests to train on and the requests to judge share no question and no wording of an
instruction, and three kinds of instruction are never trained.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from conf.choices import AnswerBy, TaskKind
from conf.errors import DataError
from conf.hashing import sha256_of
from conf.methods import PromptMethod
from conf.records import Item
from conf.resolve import Arm
from evaluation.plugins import scorer
from evaluation.probes.instruction_tables import QUESTIONS, TEST_QUESTIONS, Question
from evaluation.scoring import Score
from evaluation.tasks import Task, TaskFacts
from evaluation.tasks.defaults import OBEYS, default_instruction
from evaluation.tasks.duplicates import content_sha256

SET = "instructions"
KIND, ARGUMENT = "instruction", "argument"  # an item's slices that say what is verified
SEED = 4
PUNCTUATION = ".,;:!?\"'()[]"


@dataclass(kw_only=True, slots=True, frozen=True)
class Instruction:
    """One kind of instruction.

    wordings: {} stands for the argument; the last is kept for the requests to judge. arguments: the
    last third is kept for them too; empty: the kind has none, or its answer decides. obey: the
    right answer to a question, and the argument. holds: whether a text obeys.
    """

    name: str
    wordings: tuple[str, ...]
    obey: Callable[[Question, str], tuple[str, str]]
    holds: Callable[[str, str], bool]
    arguments: tuple[str, ...] = ("",)
    is_trained: bool = True


def _plain(make: Callable[[Question, str], str]) -> Callable[[Question, str], tuple[str, str]]:
    return lambda question, argument: (make(question, argument), argument)


def _words(text: str) -> list[str]:
    return [word for part in text.split() if (word := part.strip(PUNCTUATION).casefold())]


def _counted(question: Question, argument: str) -> tuple[str, str]:
    """An answer of some number of words, and that number."""
    answer = {"short": question.short, "it": f"It is {question.short}."}.get(
        argument, question.sentence
    )
    return answer, str(len(answer.split()))


def _is_json_with(text: str, key: str) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and list(value) == [key] and value[key] not in ("", None)


def _is_enclosed(text: str, first: str, last: str) -> bool:
    return len(text) > 2 and text[0] == first and text[-1] == last


def _is_twice(text: str, argument: str) -> bool:
    parts = [part.strip(" .").casefold() for part in text.split(argument)]
    return len(parts) == 2 and parts[0] == parts[1] != ""


def _has_word(text: str, word: str) -> bool:
    pattern = rf"(?<!\w){re.escape(word.casefold())}(?!\w)"
    return re.search(pattern, text.casefold()) is not None


INSTRUCTIONS = (
    Instruction(
        name="upper_case",
        wordings=(
            "Write your answer in upper case.",
            "Use capital letters only.",
            "Answer in CAPITALS.",
        ),
        obey=_plain(lambda q, _: q.sentence.upper()),
        holds=lambda text, _: text != text.lower() and text == text.upper(),
    ),
    Instruction(
        name="end_word",
        wordings=(
            'End your answer with the word "{}".',
            'The last word of your answer must be "{}".',
            'Let your answer finish with the word "{}".',
        ),
        arguments=("indeed", "today", "friend", "thanks", "okay", "truly", "always", "cheers"),
        obey=_plain(lambda q, word: f"{q.sentence.rstrip('.')}, {word}."),
        holds=lambda text, word: _words(text)[-1:] == [word],
    ),
    Instruction(
        name="num_words",
        wordings=(
            "Answer in exactly {} words.",
            "Use {} words, no more and no less.",
            "Your answer must have {} words.",
        ),
        arguments=("short", "it", "sentence"),
        obey=_counted,
        holds=lambda text, count: len(text.split()) == int(count),
    ),
    Instruction(
        name="json_key",
        wordings=(
            'Answer as JSON with the key "{}".',
            'Give a JSON object with the one key "{}".',
            'Reply with JSON only, under the key "{}".',
        ),
        arguments=("answer", "result", "value", "reply", "output", "solution"),
        obey=_plain(lambda q, key: json.dumps({key: q.short}, ensure_ascii=False)),
        holds=_is_json_with,
    ),
    Instruction(
        name="quotes",
        wordings=(
            "Put your whole answer in double quotes.",
            "Wrap the answer in double quotation marks.",
            "Your answer must stand between double quotes.",
        ),
        obey=_plain(lambda q, _: f'"{q.sentence}"'),
        holds=lambda text, _: _is_enclosed(text, '"', '"'),
    ),
    Instruction(
        name="twice",
        wordings=(
            'Give the answer twice, with "{}" between.',
            'Write your answer two times with "{}" between them.',
            'Say it twice and put "{}" between the two.',
        ),
        arguments=("|", ";", "/"),
        obey=_plain(lambda q, mark: f"{q.short} {mark} {q.short}"),
        holds=_is_twice,
    ),
    Instruction(
        name="one_line",
        wordings=(
            "Answer in one line of at most 60 characters.",
            "Write a single line with no more than 60 characters.",
            "Keep to one line, 60 characters at most.",
        ),
        obey=_plain(lambda q, _: q.sentence),
        holds=lambda text, _: "\n" not in text and 0 < len(text) <= 60,
    ),
    Instruction(
        name="bullet",
        wordings=(
            'Answer as a list item that begins with "- ".',
            'Begin your answer with a dash and a space, "- ".',
            'Write the answer as a bullet that starts with "- ".',
        ),
        obey=_plain(lambda q, _: f"- {q.sentence}"),
        holds=lambda text, _: text.startswith("- ") and len(text) > 2,
    ),
    Instruction(
        name="lower_case",
        wordings=("Write your answer in lower case.",),
        obey=_plain(lambda q, _: q.sentence.lower()),
        holds=lambda text, _: text != text.upper() and text == text.lower(),
        is_trained=False,
    ),
    Instruction(
        name="first_word",
        wordings=('Begin your answer with the word "{}".',),
        arguments=("Well", "Certainly", "Sure"),
        obey=_plain(lambda q, word: f"{word}, {q.sentence[0].lower()}{q.sentence[1:]}"),
        holds=lambda text, word: _words(text)[:1] == [word.casefold()],
        is_trained=False,
    ),
    Instruction(
        name="brackets",
        wordings=("Put your whole answer in square brackets.",),
        obey=_plain(lambda q, _: f"[{q.sentence}]"),
        holds=lambda text, _: _is_enclosed(text, "[", "]"),
        is_trained=False,
    ),
)
BY_NAME = {instruction.name: instruction for instruction in INSTRUCTIONS}
# Checks of a form alone, which no training row has: name -> whether a text obeys an argument.
FORMS: dict[str, Callable[[str, str], bool]] = {
    "opening": lambda text, words: text.casefold().startswith(words.casefold()),
    "forbidden_word": lambda text, word: bool(text) and not _has_word(text, word),
}
CHECKS = {**{i.name: i.holds for i in INSTRUCTIONS}, **FORMS}


@scorer(OBEYS)
def obeys(answer: str, item: Item, task: Task) -> Score:
    """1 where the answer obeys the item's instruction, else 0; whether it is true is not judged."""
    del task
    kind = item.slices.get(KIND, "")
    if kind not in CHECKS:
        raise DataError(
            f"item {item.id}",
            found="no instruction that a program verifies",
            expected="an item of the embedded requests: this rule is theirs alone",
            remedy="write task.scoring=auto",
        )
    is_obeyed = CHECKS[kind](answer.strip(), item.slices.get(ARGUMENT, ""))
    return Score(score=float(is_obeyed), is_correct=is_obeyed)


def requests(*, is_test: bool) -> tuple[Item, ...]:
    """All requests of one side: 23 questions to judge by, 45 to train on, each with every kind.

    Consecutive items have different kinds, so that any first part has all kinds about equally.
    """
    rng = random.Random(f"instructions {SEED} {is_test}")
    kinds = [i for i in INSTRUCTIONS if is_test or i.is_trained]
    queues = {i.name: list(_of_kind(i, rng, is_test=is_test)) for i in kinds}
    rounds = max(len(queue) for queue in queues.values())
    return tuple(q[turn] for turn in range(rounds) for q in queues.values() if turn < len(q))


def _of_kind(instruction: Instruction, rng: random.Random, *, is_test: bool) -> Iterator[Item]:
    """One item per question, in a random order of questions."""
    questions = list(TEST_QUESTIONS if is_test else QUESTIONS)
    rng.shuffle(questions)
    kept = instruction.wordings[-1:] if is_test else instruction.wordings[:-1]
    wordings = kept if instruction.is_trained else instruction.wordings
    arguments = _arguments(instruction, is_test=is_test)
    for number, question in enumerate(questions):
        answer, argument = instruction.obey(question, arguments[number % len(arguments)])
        wanted = rng.choice(wordings).replace("{}", argument).replace(" 1 words", " 1 word")
        pair = (question.text, wanted)
        text = " ".join(pair if rng.random() < 0.5 else reversed(pair))
        sha256 = content_sha256(text=text, context=None, choices=())
        yield Item(
            id=f"instruction-{sha256[:12]}",
            split=SET if is_test else "train",
            input=text,
            sha256=sha256,
            target=answer,
            slices={
                "kind": "kinds of the mix" if instruction.is_trained else "new kinds",
                KIND: instruction.name,
                ARGUMENT: argument,
            },
        )


def _arguments(instruction: Instruction, *, is_test: bool) -> tuple[str, ...]:
    """Those of one side; marks and numbers, and kinds that are not trained, have all on both."""
    arguments = instruction.arguments
    if len(arguments) < 6 or not instruction.is_trained:
        return arguments
    cut = 2 * len(arguments) // 3
    return arguments[cut:] if is_test else arguments[:cut]


def instruction_task(num_items: int) -> Task:
    """The requests as a task: `train` to learn from, `instructions` to be judged by.

    num_items: of the second, at most.
    """
    items = {
        "train": requests(is_test=False),
        "validation": (),
        "test": (),
        SET: requests(is_test=True)[:num_items],
    }
    instruction = default_instruction(TaskKind.pairs, OBEYS, words=(), train=items["train"])
    return Task(
        name=SET,
        kind=TaskKind.pairs,
        scoring=OBEYS,
        instruction=instruction,
        items=items,
        facts=TaskFacts(source="evaluation/probes/instructions.py", is_synthetic=True),
        sha256=sha256_of([instruction, items]),
    )


def instruction_arm(arm: Arm) -> Arm:
    """The arm's model asked plainly and once, whatever the arm's own prompt and sampling."""
    engine = replace(arm.engine, temperature=0.0, repeats=1, max_new_tokens=None, stop=[])
    return replace(arm, method=PromptMethod(answer_by=AnswerBy.generate), engine=engine)
