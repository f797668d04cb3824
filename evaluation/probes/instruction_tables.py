"""The questions of the embedded requests, own-written: a text, a short answer, a sentence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Question:
    """A question, its answer in a word or two, and the answer as a sentence."""

    text: str
    short: str
    sentence: str


# Facts that a small model knows. The general set (probes/general_set.py), which tells what a
# tuning has unlearned, asks none of them: a test holds the two apart.
_OPPOSITES = (
    "old new|high low|near far|strong weak|happy sad|long short|thick thin|loud quiet|sweet sour|"
    "brave timid|deep shallow|cheap expensive|clean dirty|sharp blunt|smooth rough|wide narrow|"
    "true false|alive dead|asleep awake|guilty innocent"
)
_TOOLS = (
    "cut paper=scissors|see far away=a telescope|tell the time=a clock|write on paper=a pen|"
    "open a lock=a key|eat soup=a spoon|sweep the floor=a broom|measure heat=a thermometer|"
    "cross a river=a bridge|reach a roof=a ladder|light a dark room=a lamp|dry your hands=a towel"
)
_YOUNG = (
    "dog puppy|cat kitten|cow calf|horse foal|sheep lamb|hen chick|lion cub|duck duckling|"
    "goat kid|swan cygnet|deer fawn|goose gosling"
)
_COUNTS = (
    "legs a spider 8|days a week 7|months a year 12|sides a triangle 3|wheels a bicycle 2|"
    "legs a horse 4|hours a day 24|sides a square 4|minutes an hour 60|legs an insect 6|"
    "corners a hexagon 6|players a chess game 2"
)
_PLACES = (
    "Peru South America|Kenya Africa|Spain Europe|Japan Asia|Canada North America|Egypt Africa|"
    "Norway Europe|India Asia|Brazil South America|Ghana Africa|Poland Europe|Vietnam Asia"
)


def _opposites() -> list[Question]:
    pairs = [p.split() for p in _OPPOSITES.split("|")]
    return [
        Question(f'What is the opposite of "{a}"?', b, f"The opposite of {a} is {b}.")
        for a, b in pairs
    ]


def _tools() -> list[Question]:
    pairs = [p.split("=") for p in _TOOLS.split("|")]
    return [Question(f"What do you use to {a}?", b, f"You use {b} to {a}.") for a, b in pairs]


def _young() -> list[Question]:
    pairs = [p.split() for p in _YOUNG.split("|")]
    return [
        Question(f"What is a young {a} called?", b, f"A young {a} is called a {b}.")
        for a, b in pairs
    ]


def _counts() -> list[Question]:
    found = []
    for entry in _COUNTS.split("|"):
        what, _, rest = entry.partition(" ")
        owner, _, number = rest.rpartition(" ")
        found.append(
            Question(
                f"How many {what} does {owner} have?",
                number,
                f"{owner[0].upper()}{owner[1:]} has {number} {what}.",
            )
        )
    return found


def _places() -> list[Question]:
    pairs = [p.partition(" ") for p in _PLACES.split("|")]
    return [Question(f"On which continent is {a}?", b, f"{a} is in {b}.") for a, _, b in pairs]


_EVERY = (_opposites(), _tools(), _young(), _counts(), _places())
# The last four or five of each table are kept for the requests to judge.
QUESTIONS = tuple(q for table in _EVERY for q in table[: 2 * len(table) // 3])
TEST_QUESTIONS = tuple(q for table in _EVERY for q in table[2 * len(table) // 3 :])
