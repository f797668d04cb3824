"""What a label curve says in the ten-dimension table: crossings, and the cost of wrong labels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from conf.probe_results import DimensionRow
from conf.records import Measured
from conf.results import ArmResult, Results
from evaluation import wording
from evaluation.results.dimension_rows import DATA, Cell, dimension_row


def label_rows(results: Results) -> list[DimensionRow]:
    """The rows; none without a label curve."""
    return [*_crossings(results), *_noise(results)]


def _crossings(results: Results) -> list[DimensionRow]:
    """Of a label curve: from how many labels on a tuned arm is as good as each prompted one."""
    curve = results.label_curve
    if curve is None:
        return []
    clean = [c for c in curve.crossings if c.noise == 0]
    rows = []
    for prompted in dict.fromkeys(c.prompted for c in clean):
        cells: dict[str, Cell] = {
            c.tuned: Measured(value=c.labels, low=c.low, high=c.high)
            if c.status == "crosses"
            else {
                "none_seen": f"none seen up to {c.largest}",
                "always": f"{c.smallest}, the fewest tried",
            }.get(c.status)
            for c in clean
            if c.prompted == prompted
        }
        rows.append(
            dimension_row(
                results,
                DATA,
                f"labels to be as good as {prompted}",
                partial(_cell_of, cells),
                note="by the label curve; interval over items and draws",
                unit="count",
            )
        )
    return rows


def _noise(results: Results) -> list[DimensionRow]:
    """Of a label curve with noise: what wrong labels cost at the largest number of labels."""
    curve = results.label_curve
    worst = max(curve.noise, default=0.0) if curve is not None else 0.0
    if curve is None or worst == 0:
        return []
    most = max(curve.sizes)
    values = {(p.arm, p.noise): p.value.value for p in curve.points if p.num_labels == most}
    cells: dict[str, Cell] = {}
    for arm, noise in values:
        clean, noisy = values.get((arm, 0.0)), values.get((arm, worst))
        if noise == worst and clean is not None and noisy is not None:
            cells[arm] = Measured(value=noisy - clean)
    return [
        dimension_row(
            results,
            DATA,
            f"change with {wording.percent(worst, digits=0)} of labels wrong",
            partial(_cell_of, cells),
            note=f"at {most} labels, by the label curve; its bands say how sure that is",
            unit="points",
        )
    ]


def _cell_of(cells: Mapping[str, Cell], name: str, arm: ArmResult) -> Cell:
    del arm
    return cells.get(name)
