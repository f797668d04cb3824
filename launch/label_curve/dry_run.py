"""`dry_run=true` of a label curve: what each point takes, in one line."""

from __future__ import annotations

from collections.abc import Collection

from rich.table import Table

from conf.label_results import LabelPlace
from launch.label_curve.plan import LabelPlan
from launch.planned import Job, Plan


def is_point(job: Job) -> bool:
    """Whether a job belongs to a run of a label curve, rather than to an arm itself."""
    return "@" in (job.arm or "")


def point_table(labels: LabelPlan, plan: Plan, finished: Collection[str]) -> Table:
    """Tokens, seconds and USD of the arms at each number of labels, over all draws and seeds.

    A job that several points share stands at the first of them.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in (
        "point",
        "labels",
        "noise",
        "runs",
        "jobs",
        "tokens",
        "seconds",
        "USD",
        "reused",
    ):
        table.add_column(column, justify="left" if column == "point" else "right")
    taken: set[str] = set()
    for (arm, size, noise), places in _points(labels).items():
        names = {place.records for place in places}
        jobs = [job for job in plan.jobs if job.arm in names and job.id not in taken]
        taken |= {job.id for job in jobs}
        table.add_row(
            arm,
            str(size) if size else "none",
            f"{noise:g}",
            str(len(names)),
            str(len(jobs)),
            f"{sum(job.estimate.tokens or 0 for job in jobs):,}",
            _sum([job.estimate.seconds for job in jobs], digits=0),
            _sum([job.estimate.usd for job in jobs if job.devices], digits=4),
            str(sum(job.id in finished for job in jobs) or ""),
        )
    return table


def _points(labels: LabelPlan) -> dict[tuple[str, int, float], list[LabelPlace]]:
    points: dict[tuple[str, int, float], list[LabelPlace]] = {}
    for place in labels.places:
        points.setdefault((place.arm, place.num_labels, place.noise), []).append(place)
    return points


def _sum(values: list[float | None], *, digits: int) -> str:
    """The sum of what is known; ? where nothing is."""
    known = [value for value in values if value is not None]
    if values and not known:
        return "?"
    return f"{sum(known):.{digits}f}" + ("" if len(known) == len(values) else " + ?")
