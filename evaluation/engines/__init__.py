"""Engines by name: an explicit match, so that no string ever chooses code to import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import ConfigError
from conf.groups import EngineConfig
from evaluation.engines.base import Engine, TextCodec
from evaluation.engines.endpoint_check import check_endpoint

if TYPE_CHECKING:
    from evaluation.engines.endpoint_ceiling import EndpointPlace
    from evaluation.tasks import Task

BUILT = ("forest", "transformers", "scripted", "openai", "vllm")


def check_engine(config: EngineConfig) -> None:
    """Refuse an engine that does not exist, or an endpoint that cannot be asked; sends nothing."""
    match config.name:
        case "forest" | "transformers" | "scripted" | "vllm":
            return
        case "openai":
            check_endpoint(config)
        case _:
            raise ConfigError(
                "engine.name",
                found=repr(config.name),
                expected=f"one of {', '.join(BUILT)}",
                remedy="type engine=forest",
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
    kernels_impl: str = "auto",
    endpoint: EndpointPlace | None = None,
) -> Engine:
    """Build the engine that the configuration names; its heavy imports happen here.

    dtype: float32 | bfloat16. device: a torch device. threads: of the CPU, set explicitly since
    Ray's OMP_NUM_THREADS silently halves a kernel. task: for the scripted engine's answers.
    kernels_impl: auto | cpu | triton | reference, for the forest engine. endpoint: for openai.
    engine=vllm needs a server: launch/vllm_server.py builds it.

    Raises:
        ConfigError: an engine that does not exist. ModelError: for a directory it cannot load.
    """
    check_engine(config)
    if config.name == "openai":
        from evaluation.engines.endpoint_hosted import HostedEngine

        assert endpoint is not None, "a hosted engine is told where answers are kept"
        return HostedEngine(config, place=endpoint)
    if config.name == "scripted":
        from evaluation.engines.scripted import ScriptedEngine

        return ScriptedEngine(config, renderer=renderer, task=task)
    engine: Engine
    place: dict[str, Any] = {"model_dir": model_dir, "dtype": dtype, "device": device}
    if config.name == "forest":
        engine = _forest_or_plain(config, place, renderer, threads, kernels_impl)
    else:
        from evaluation.engines.transformers_engine import TransformersEngine

        engine = TransformersEngine(config, renderer=renderer, threads=threads, **place)
    engine.set_adapter(adapter_dir)
    return engine


def _forest_or_plain(
    config: EngineConfig, place: dict[str, Any], renderer: TextCodec, threads: int, impl: str
) -> Engine:
    """The forest engine; the transformers engine, with the reason, for models it cannot compute."""
    from evaluation.engines.forest_engine import ForestEngine
    from evaluation.engines.forest_model import NotPlainAttention
    from evaluation.engines.kernel_choice import usable_kernels
    from evaluation.engines.transformers_engine import TransformersEngine

    kernels = usable_kernels(impl, device=place["device"], dtype=place["dtype"])
    try:
        return ForestEngine(config, renderer=renderer, threads=threads, kernels=kernels, **place)
    except NotPlainAttention as error:
        plain = TransformersEngine(config, renderer=renderer, threads=threads, **place)
        plain.kernels = {"engine": f"transformers instead of forest: the model has {error}"}
        return plain
