"""Reference arms: what a bag of words reaches, and what the user's present system answers.

Light but for `tfidf`, which imports scikit-learn when it runs.
"""

from __future__ import annotations

import csv
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from conf.methods import GivenMethod, TfidfMethod
from conf.records import Item, LedgerLine, Progress, SampleRecord
from conf.resolve import Arm
from evaluation.scoring import score
from evaluation.scoring.answers import read_answer
from evaluation.tasks import Task

Emitted = SampleRecord | LedgerLine | Progress

STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # C of the logistic regression, chosen by cross-validation
MAX_FOLDS = 5
LATENCY_REQUESTS = 50


def reference(job: str, arm: Arm, *, task: Task) -> Iterator[Emitted]:
    """All records of a reference arm.

    Raises:
        ConfigError: a reference that the task's kind rules out. DataError: a given file.
    """
    if isinstance(arm.method, TfidfMethod):
        return tfidf(task, job=job, arm=arm.name)
    assert isinstance(arm.method, GivenMethod), f"{arm.name} is no reference arm"
    return given(Path(arm.method.path), task, job=job, arm=arm.name)


def check_tfidf(task: Task, *, arm: str) -> None:
    """Refuse what a classifier cannot learn; for use before anything starts."""
    labels = {item.label for item in task.items["train"]}
    if task.kind is not TaskKind.classification or len(labels) < 2:
        raise ConfigError(
            f"arms.{arm}",
            found=f"tfidf on a {task.kind.name} task with {len(labels)} labels in training",
            expected="a classification task with at least two labels",
            remedy=f"leave it out: ~method@arms.{arm}",
        )


def tfidf(task: Task, *, job: str = "tfidf", arm: str = "tfidf") -> Iterator[Emitted]:
    """TF-IDF of words and word pairs with logistic regression, trained on the training split.

    Its strength of regularisation is chosen by cross-validation on training items. device_seconds
    are of one core. Latency is that of single items.
    """
    check_tfidf(task, arm=arm)
    started = time.perf_counter()
    model = _fitted(task)
    labels = [str(label) for label in model.classes_]

    def answer(items: Sequence[Item], set_name: str, *, is_timed: bool) -> list[SampleRecord]:
        batches = [[item] for item in items] if is_timed else [list(items)]
        records = []
        for batch in (batch for batch in batches if batch):
            begun = time.perf_counter()
            rows = model.predict_log_proba([_text(item) for item in batch])
            seconds = time.perf_counter() - begun if is_timed else None
            for item, row in zip(batch, rows, strict=True):
                logprobs = dict(zip(labels, map(float, row), strict=True))
                best = max(logprobs, key=lambda label: logprobs[label])
                records.append(
                    reference_record(
                        task, item, arm, set_name, best, logprobs=logprobs, seconds=seconds
                    )
                )
        return records

    plan = [("validation", task.items["validation"]), ("test", task.items["test"])]
    plan.append(("latency", task.items["test"][:LATENCY_REQUESTS]))
    answers = [
        record
        for set_name, items in plan
        for record in answer(items, set_name, is_timed=set_name == "latency")
    ]
    seconds = time.perf_counter() - started
    yield LedgerLine(job=job, arm=arm, purpose="reference", device_seconds=seconds)
    yield from answers
    yield Progress(done=len(answers), total=len(answers), unit="answers", note="tfidf")


def _fitted(task: Task) -> Any:
    """The fitted pipeline of TF-IDF and logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    items = task.items["train"]
    texts, labels = [_text(item) for item in items], [str(item.label) for item in items]
    # The pattern keeps one-letter words, so that a short text is not left without any feature.
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"
    )
    pipeline = make_pipeline(vectorizer, LogisticRegression(max_iter=1000))
    return with_best_strength(pipeline, texts, labels)


def with_best_strength(pipeline: Any, inputs: Any, labels: Sequence[str]) -> Any:
    """A pipeline that ends in a logistic regression, fitted with the C that cross-validation finds.

    Folds are no more than the rarest label has items.
    """
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    folds = min(MAX_FOLDS, *Counter(labels).values())
    if folds < 2:  # a label with one item: nothing to hold out
        return pipeline.fit(inputs, labels)
    search = GridSearchCV(
        pipeline,
        {"logisticregression__C": list(STRENGTHS)},
        cv=StratifiedKFold(folds, shuffle=True, random_state=0),
        n_jobs=1,
    )
    return search.fit(inputs, labels).best_estimator_


def _text(item: Item) -> str:
    return f"{item.context}\n{item.input}" if item.context else item.input


def given(path: Path, task: Task, *, job: str = "given", arm: str = "given") -> Iterator[Emitted]:
    """The answers of a file to the test items, scored by the task's rule.

    Raises:
        DataError: see read_given.
    """
    started = time.perf_counter()
    answers = read_given(path, task)
    records = [
        reference_record(task, item, arm, "test", read_answer(answers[item.id], item, task))
        for item in task.items["test"]
    ]
    seconds = time.perf_counter() - started
    yield LedgerLine(job=job, arm=arm, purpose="reference", device_seconds=seconds)
    yield from records
    yield Progress(done=len(records), total=len(records), unit="answers", note="given")


def read_given(path: Path, task: Task) -> dict[str, str]:
    """Item id -> answer, for all test items; ids that are no test items are passed over.

    Raises:
        DataError: no such file, no columns id and answer, a row twice, or test items without one.
    """
    if not path.is_file():
        raise DataError(
            str(path), found="no such file", expected="a CSV or JSONL file with id and answer"
        )
    answers: dict[str, str] = {}
    for number, row in _rows(path):
        if "id" not in row or "answer" not in row:
            raise DataError(
                f"{path}:{number}",
                found=f"columns {', '.join(map(str, row)) or 'none'}",
                expected="columns id and answer",
                remedy="rename the columns",
            )
        name, value = str(row["id"]), row["answer"]
        if name in answers:
            raise DataError(f"{path}:{number}", found=f"id {name} again", expected="each id once")
        answers[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    missing = [item.id for item in task.items["test"] if item.id not in answers]
    if missing:
        raise DataError(
            str(path),
            found=f"no answer to {len(missing)} of {len(task.items['test'])} test items, "
            f"e.g. {', '.join(missing[:3])}",
            expected="an answer to every test item, by its id (see items.jsonl of a run)",
            remedy="add the missing rows",
        )
    return answers


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row; CSV by its header, anything else as one JSON object a line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(stream, strict=True, restkey="extra columns")
                for row in reader:
                    yield reader.line_num, {k: v or "" for k, v in row.items()}
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, _object(line, f"{path}:{number}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            str(path), found=str(error), expected="a CSV or JSONL file in UTF-8"
        ) from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(where, found=str(error), expected="a JSON object") from error
    if not isinstance(value, dict):
        raise DataError(where, found=f"a JSON {type(value).__name__}", expected="a JSON object")
    return value


def reference_record(
    task: Task,
    item: Item,
    arm: str,
    set_name: str,
    answer: str | None,
    *,
    logprobs: dict[str, float] | None = None,
    seconds: float | None = None,
    tokens: int = 0,
) -> SampleRecord:
    """One answer of a reference arm, scored; seconds: of a timed request; tokens: of its prompt."""
    found = score(answer, item, task)
    return SampleRecord(
        arm=arm,
        item_id=item.id,
        set=set_name,
        num_labels=None,
        prompt_tokens=tokens,
        cached_tokens=tokens,  # an earlier job has forwarded them
        label_logprobs=logprobs,
        answer=answer,
        target=item.answer_key,
        is_correct=found.is_correct,
        score=found.score,
        group=item.group,
        first_token_seconds=seconds,
        total_seconds=seconds,
    )
