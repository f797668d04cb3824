"""The wording of the synthetic `orders` task: values, and phrasings seen and held out (data only).

Placeholders: {amount} quantity, unit and product; {wrong} the same with another quantity;
{quantity} the quantity alone; {due} {city} {name} the value as people write it; {other_*} a value
of the same kind that is not the answer.
"""

from __future__ import annotations

from dataclasses import dataclass


def _listed(text: str, *, by: str = " ") -> tuple[str, ...]:
    return tuple(text.split(by))


# product -> units it is sold in
PRODUCTS: dict[str, tuple[str, ...]] = {
    "oat milk": ("carton", "box"),
    "coffee beans": ("bag", "kg"),
    "green tea": ("box", "bag"),
    "orange juice": ("bottle", "crate"),
    "olive oil": ("bottle", "can"),
    "brown rice": ("bag", "kg"),
    "tomato sauce": ("jar", "can"),
    "paper towels": ("pack", "roll"),
    "printer paper": ("box", "pack"),
    "blue pens": ("box", "pack"),
    "dish soap": ("bottle", "box"),
    "hand cream": ("jar", "box"),
    "dog food": ("bag", "can"),
    "white paint": ("can", "bottle"),
    "copper wire": ("roll", "box"),
    "wood screws": ("box", "bag"),
    "light bulbs": ("pack", "box"),
    "garden soil": ("bag", "kg"),
    "red apples": ("crate", "kg"),
    "fresh eggs": ("crate", "box"),
    "dark chocolate": ("box", "pack"),
    "sea salt": ("bag", "jar"),
    "rubber gloves": ("pack", "box"),
    "packing tape": ("roll", "box"),
}
HELD_OUT_PRODUCTS: dict[str, tuple[str, ...]] = {
    "almond flour": ("bag", "kg"),
    "sparkling water": ("bottle", "crate"),
    "face masks": ("box", "pack"),
    "bird seed": ("bag", "kg"),
    "masking tape": ("roll", "pack"),
    "plum jam": ("jar", "crate"),
}
PLURALS = {"box": "boxes", "kg": "kg"}  # others take an s
UNIT_WORDS = {"kg": ("kg", "kilos")}
CITIES = _listed(
    "Leeds York Bristol Oxford Dover Cardiff Derby Exeter Bath Lincoln Durham Preston Luton "
    "Norwich Glasgow Dundee Swansea Belfast Cork Galway"
)
HELD_OUT_CITIES = ("Ripon", "Hull", "Perth", "Truro", "Stirling", "Chester")
NAMES = _listed(
    "Maria Lopez,Tom Baker,Aisha Khan,John Reed,Li Wei,Sofia Rossi,Peter Novak,Emma Clark,"
    "Omar Haddad,Nina Berg,Paul Martin,Grace Obi,Ivan Petrov,Laura Stone,Ben Carter,Yuki Tanaka,"
    "Hannah Cole,Diego Cruz,Ruth Adams,Sam Fisher,Clara Jensen,David Levy,Priya Nair,Jack Doyle",
    by=",",
)
HELD_OUT_NAMES = _listed(
    "Marta Silva,Alan Frost,Zoe Turner,Kofi Mensah,Elena Popa,Hugo Blanc,Rosa Winter,Noel Grant",
    by=",",
)
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
MONTHS = _listed(
    "January February March April May June July August September October November December"
)
NUMBER_WORDS = {
    2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine",
    10: "ten", 12: "twelve", 15: "fifteen", 20: "twenty", 25: "twenty-five", 30: "thirty",
    40: "forty", 50: "fifty",
}  # fmt: skip
DOZENS = {6: "half a dozen", 12: "a dozen", 24: "two dozen", 36: "three dozen"}
PLAIN_QUANTITIES = (2, 3, 4, 5, 7, 8, 9, 10, 12, 14, 15, 16, 18, 20, 25, 30, 35, 40, 50, 60, 75)


@dataclass(kw_only=True, slots=True, frozen=True)
class Phrases:
    """One set of phrasings; every field is a list to draw from."""

    amounts: tuple[str, ...]  # of {quantity} {unit} {product}
    orders: tuple[str, ...]
    corrections: tuple[str, ...]
    dues: tuple[str, ...]
    urgent: tuple[str, ...]
    no_due: tuple[str, ...]
    cities: tuple[str, ...]
    names: tuple[str, ...]
    noise: tuple[str, ...]
    traps: dict[str, tuple[str, ...]]


SEEN = Phrases(
    amounts=(
        "{quantity} {unit} of {product}",
        "{quantity} {unit} {product}",
        "{product} - {quantity} {unit}",
    ),
    orders=(
        "please send {amount}",
        "I would like to order {amount}",
        "we need {amount}",
        "can you put us down for {amount}",
        "could I get {amount}",
        "order: {amount}",
        "I want to buy {amount} from you",
        "please reserve {amount} for us",
        "kindly ship {amount}",
        "I'd like {amount} please",
        "may we have {amount}",
        "another {amount} for our kitchen, please",
    ),
    corrections=(
        "please send {wrong}. Sorry, I meant {quantity}",
        "we need {wrong}, no wait, make it {quantity}",
        "I would like {wrong}. Correction: {quantity}",
    ),
    dues=(
        "it has to be here {due}",
        "deliver {due}",
        "we need it {due}",
        "the delivery should come {due}",
        "{due} would be best for us",
        "please bring it {due}",
        "latest delivery {due}",
    ),
    urgent=(
        "this is urgent",
        "we need it as soon as possible",
        "please hurry, we have run out",
        "as fast as you can",
    ),
    no_due=("there is no hurry", "any day is fine", "", ""),
    cities=(
        "deliver to our shop in {city}",
        "ship it to {city}",
        "the address is {street}, {city}",
        "it goes to {city}",
        "our office is at {street} in {city}",
        "send it to the {city} branch",
    ),
    names=(
        "this is {name}",
        "my name is {name}",
        "regards, {name}",
        "thanks, {name}",
        "{name} here",
        "best wishes, {name}",
        "the order is for {name}",
    ),
    noise=(
        "I hope you are well",
        "you were very kind on the phone",
        "sorry to bother you again",
        "we love your shop",
        "the weather is awful here",
        "please confirm",
        "send the bill as usual",
    ),
    traps={
        "old quantity": (
            "the last {other_quantity} {other_unit} were great",
            "you sent {other_quantity} {other_unit} by mistake last month",
        ),
        "other city": (
            "do not send it to {other_city} like last time",
            "we have moved away from {other_city}",
        ),
        "other name": (
            "{other_name} told me about you",
            "please do not call {other_name} any more",
        ),
        "other day": (
            "I tried to call on {other_day}",
            "we are closed on {other_day}",
        ),
    },
)

HELD_OUT = Phrases(
    amounts=(
        "{product}, {quantity} {unit}",
        "{quantity} {unit} worth of {product}",
        "{product} x {quantity} {unit}",
    ),
    orders=(
        "we are running low, so {amount} would help",
        "is there any chance of {amount}",
        "what I am after is {amount}",
        "our stock is gone: {amount} needed",
        "put {amount} on the next van",
        "time to restock, {amount} should do",
        "the boss asks for {amount}",
        "let me have {amount} if you can",
        "I am writing to get {amount}",
        "shopping list for you: {amount}",
    ),
    corrections=(
        "{wrong} was what I wrote before, but it should say {quantity}",
        "let me have {wrong}. Oh, scrap that, {quantity} is right",
        "the boss asked for {wrong} and then changed it to {quantity}",
    ),
    dues=(
        "we open the doors {due}, so not later",
        "can the van be here {due}",
        "I will be waiting for it {due}",
        "try to make it {due}",
        "bring it {due} or not at all",
    ),
    urgent=(
        "drop everything for this one",
        "we cannot wait, the shelves are empty",
        "the sooner the better, really",
    ),
    no_due=("take your time", "whenever it suits you", ""),
    cities=(
        "the van should head for {city}",
        "you find us at {street}, {city}",
        "destination {city}",
        "we will unload it in {city}",
        "{city} is where we want it",
    ),
    names=(
        "cheers, {name}",
        "put it under {name}",
        "yours, {name}",
        "{name} speaking",
        "signed {name}",
    ),
    noise=(
        "what a week it has been",
        "long time no see",
        "give my best to the team",
        "hope business is good",
        "no need to ring the bell",
    ),
    traps={
        "old quantity": (
            "back in spring we took {other_quantity} {other_unit}",
            "my neighbour got {other_quantity} {other_unit} from you",
        ),
        "other city": (
            "the {other_city} store no longer exists",
            "I used to pick things up in {other_city}",
        ),
        "other name": (
            "{other_name} has left the company",
            "say hello to {other_name}",
        ),
        "other day": (
            "{other_day} did not work out, sadly",
            "nobody is in on {other_day}",
        ),
    },
)
STREETS = ("12 Mill Lane", "4 High Street", "27 Park Road", "8 Station Road", "31 Church Street")
GREETINGS = ("Hi", "Hello", "Good morning", "Dear team", "Hey there", "", "")
