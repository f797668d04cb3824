"""The typed configuration, whole, and how Hydra learns of it.

Hydra composes YAML into these classes; a key that is not in one of them does not exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore

from conf.clusters import ClusterConfig
from conf.groups import EngineConfig, ModelConfig, TaskConfig, TrainerConfig, ZeroConfig
from conf.label_curve import LabelCurveConfig
from conf.methods import METHODS, Method, SourceConfig
from conf.run_groups import (
    BudgetConfig,
    DecisionConfig,
    GeneralConfig,
    KernelsConfig,
    PricingConfig,
    ProbesConfig,
    ReportConfig,
    RunSection,
    TrackingConfig,
)
from conf.sweeps import SweepConfig


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run, whole."""

    arms: dict[str, Method] = field(default_factory=dict)
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    label_curve: LabelCurveConfig = field(default_factory=LabelCurveConfig)
    search: bool = False  # every arm at its searched best, also those without a sweep.space
    pricing: PricingConfig = field(default_factory=PricingConfig)
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    run: RunSection = field(default_factory=RunSection)
    report: ReportConfig = field(default_factory=ReportConfig)
    general: GeneralConfig = field(default_factory=GeneralConfig)
    probes: ProbesConfig = field(default_factory=ProbesConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    plugins: list[str] = field(default_factory=list)
    dry_run: bool = False


GROUPS: dict[str, type] = {
    "task": TaskConfig,
    "model": ModelConfig,
    "trainer": TrainerConfig,
    "zero": ZeroConfig,
    "engine": EngineConfig,
    "cluster": ClusterConfig,
    "tracking": TrackingConfig,
    "sweep": SweepConfig,
    "pricing": PricingConfig,
    "decision": DecisionConfig,
}


@cache
def register() -> None:
    """Put the schemas where Hydra's YAML presets name them: `base_run`, `<group>/base_*`."""
    store = ConfigStore.instance()
    store.store(name="base_run", node=RunConfig)
    for group, cls in GROUPS.items():
        store.store(group=group, name=f"base_{group}", node=cls)
    for kind, method in METHODS.items():
        store.store(group="method", name=f"base_{kind}", node=method)
    store.store(group="source", name="base_source", node=SourceConfig)


def non_finite_keys(value: Any, prefix: str = "") -> list[str]:
    """Dotted keys of all numbers that are nan or infinite, which types alone let through."""
    if isinstance(value, dict):
        return [
            key
            for k, v in value.items()
            for key in non_finite_keys(v, f"{prefix}.{k}" if prefix else str(k))
        ]
    if isinstance(value, list):
        return [key for i, v in enumerate(value) for key in non_finite_keys(v, f"{prefix}[{i}]")]
    if isinstance(value, float) and not math.isfinite(value):
        return [prefix]
    return []
