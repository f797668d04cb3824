"""Engines by name: an explicit match, so that no string ever chooses code to import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import ConfigError, NotBuiltYet
from conf.groups import EngineConfig
from evaluation.engines.base import Engine, TextCodec

if TYPE_CHECKING:
    from evaluation.tasks import Task

BUILT = ("transformers", "scripted")


def check_engine(config: EngineConfig) -> None:
    """Refuse an engine that does not exist or is not built yet; for use before anything starts."""
    match config.name:
        case "transformers" | "scripted":
            return
        case "forest" | "openai" | "vllm":
            raise NotBuiltYet(f"engine={config.name}", instead="type engine=transformers")
        case _:
            raise ConfigError(
                "engine.name",
                found=repr(config.name),
                expected=f"one of {', '.join(BUILT)}",
                remedy="type engine=transformers",
            )


def build_engine(
    config: EngineConfig,
    *,
    model_dir: Path,
    adapter_dir: Path | None,
    renderer: TextCodec,
    dtype: str,
    device: str,
    threads: int,
    task: Task | None,
) -> Engine:
    """Build the engine that the configuration names; its heavy imports happen here.

    dtype: float32 | bfloat16. device: a torch device. threads: of the CPU, set explicitly since
    Ray's OMP_NUM_THREADS silently halves a kernel. task: for the scripted engine's answers.

    Raises:
        NotBuiltYet: for forest, openai and vllm. ModelError: for a directory it cannot load.
    """
    check_engine(config)
    if config.name == "scripted":
        from evaluation.engines.scripted import ScriptedEngine

        return ScriptedEngine(config, renderer=renderer, task=task)
    from evaluation.engines.transformers_engine import TransformersEngine

    engine = TransformersEngine(
        config, model_dir=model_dir, renderer=renderer, dtype=dtype, device=device, threads=threads
    )
    engine.set_adapter(adapter_dir)
    return engine
