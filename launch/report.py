"""`python -m launch.report RUN [overrides]`: decide again from records alone, in seconds.

Overrides of `decision`, `pricing` and `report` apply; anything else would need new records.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.choices import ReportText
from conf.errors import ConfigError, DataError
from conf.hashing import plain
from conf.records import from_dict
from conf.run_groups import DecisionConfig, PricingConfig
from launch.cli import guarded
from launch.compose import compose_config
from launch.overrides import key_of

ALLOWED = ("decision", "pricing", "report")


def report(arguments: list[str]) -> int:
    """Write the report of a run again, under another volume, price or limit."""
    if not arguments:
        raise ConfigError(
            "python -m launch.report",
            found="no run",
            expected="a run directory",
            remedy="python -m launch.report outputs/RUN decision.requests_per_month=1e6",
        )
    run, overrides = Path(arguments[0]), arguments[1:]
    for override in overrides:
        if key_of(override).partition(".")[0] not in ALLOWED:
            raise ConfigError(
                key_of(override),
                found=override,
                expected=f"keys of {', '.join(ALLOWED)}",
                remedy="type the run's own command with this override for new records",
            )
    if not (run / "config.json").is_file():
        raise DataError(str(run), found="no config.json", expected="a run directory")
    from rich.console import Console

    from evaluation.records.run_records import read_run
    from evaluation.report import panel
    from evaluation.report.files import write_report
    from evaluation.results.summary import summarise

    records = read_run(run)
    decision, pricing = changed_sections(records.config, overrides)
    if any(key_of(o) == "report.text" for o in overrides):
        shows_text = compose_config(overrides).report.text is ReportText.full
        records = dataclasses.replace(records, shows_text=shows_text)
    results = summarise(records, decision=decision, pricing=pricing)
    paths = write_report(results, records, run)
    console = Console()
    panel.final(results, console)
    console.print(f"Report: {paths.html}", highlight=False, soft_wrap=True)
    return 0


def changed_sections(
    stored: Mapping[str, Any], overrides: list[str]
) -> tuple[DecisionConfig, PricingConfig]:
    """The run's own decision and pricing with the typed keys on top."""
    typed = plain(compose_config(overrides))
    sections = {name: copy.deepcopy(stored[name]) for name in ("decision", "pricing")}
    for key in map(key_of, overrides):
        section, *path = key.split(".")
        if section not in sections:
            continue
        if not path:  # a preset replaces the price, its source and its date together
            sections[section] = typed[section]
            continue
        target, value = sections[section], typed[section]
        for part in path[:-1]:
            target, value = target.setdefault(part, {}), value[part]
        target[path[-1]] = value[path[-1]]
    return (
        from_dict(DecisionConfig, sections["decision"]),
        from_dict(PricingConfig, sections["pricing"]),
    )


if __name__ == "__main__":
    sys.exit(guarded(lambda: report(sys.argv[1:])))
