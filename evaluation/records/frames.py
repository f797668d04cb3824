"""A finished run for notebooks: typed records and results, and the same as pandas data frames."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import DataError
from conf.records import from_dict, to_dict
from conf.results import Results
from evaluation.records import run_records
from evaluation.records.run_records import ArmRecords, RunRecords

if TYPE_CHECKING:
    import pandas as pd


@dataclass(kw_only=True, slots=True, frozen=True)
class Run:
    """One run. records: what was written while it ran; results: None before its first report.

    Frames have a row per record and a column per field, named as in DESIGN's records, units in the
    names. Fields that hold fields become columns with a dot: `metric.value`. Unknown is missing.
    """

    records: RunRecords
    results: Results | None

    def samples(self) -> pd.DataFrame:
        """Every answer of every arm, latency requests and probes included: filter by `set`."""
        return _frame(s for arm in self._arms() for s in arm.samples)

    def train(self) -> pd.DataFrame:
        """Every optimizer step of every trained arm; of a searched one, of the trial chosen."""
        return _frame(t for arm in self._arms() for t in arm.train)

    def curve(self) -> pd.DataFrame:
        """Every validation point of a training."""
        return _frame(c for arm in self._arms() for c in arm.curve)

    def items(self) -> pd.DataFrame:
        """Every item with its split and slices."""
        return _frame(self.records.items.values())

    def ledger(self) -> pd.DataFrame:
        """What was computed, by job and purpose: tokens, device-seconds, USD."""
        return _frame(self.records.ledger)

    def arms(self) -> pd.DataFrame:
        """One row per arm of results.json, indexed by its name."""
        found = self._results()
        frame = _frame(found.arms.values())
        frame.index = _index(found.arms)
        return frame

    def pairs(self) -> pd.DataFrame:
        """Every paired comparison of results.json."""
        return _frame(self._results().pairs)

    def _arms(self) -> Iterable[ArmRecords]:
        return self.records.arms.values()

    def _results(self) -> Results:
        if self.results is None:
            raise DataError(
                str(self.records.path / "results.json"),
                found="no such file",
                expected="the results of a finished run",
                remedy=f"python -m launch.report {self.records.path}",
            )
        return self.results


def read_run(path: Path | str) -> Run:
    """Read a run directory, finished or not. Raises DataError where it is none, or is damaged."""
    records = run_records.read_run(path)
    file = records.path / "results.json"
    if not file.is_file():
        return Run(records=records, results=None)
    try:
        results = from_dict(Results, json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            str(file),
            found=str(error),
            expected="results as a report writes them",
            remedy=f"python -m launch.report {records.path}",
        ) from None
    return Run(records=records, results=results)


def _frame(rows: Iterable[Any]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame.from_records([_flat(to_dict(row)) for row in rows])


def _index(names: Iterable[str]) -> pd.Index[str]:
    import pandas as pd

    return pd.Index(list(names), name="arm")


# Free mappings, whose keys are labels or item groups and no columns of their own.
MAPPINGS = (
    "label_logprobs",
    "label_offsets",
    "by_label",
    "by_slice",
    "by_kind",
    "slices",
    "probes",
)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of fields as dotted columns; lists and free mappings stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in MAPPINGS:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
