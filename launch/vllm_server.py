"""`engine=vllm`: a server in an environment of its own, which ends with the run.

vLLM pins other versions than ours, so it is never imported: its command is started, asked for its
health until it answers, and spoken to over loopback. A keeper, this file run as a program, holds
the server's process group and ends it when its pipe closes, whichever way the run ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from conf.errors import ConfigError, JobFailed
from conf.groups import EngineConfig

if TYPE_CHECKING:
    from evaluation.engines.base import Engine
    from launch.engine_process import EngineSpec

BASE_NAME = "base"
LOOK_SECONDS = 0.1
GRACE_SECONDS = 10.0  # for the server to end by itself
# Ranks that vLLM allots memory for; --max-lora-rank takes no other.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def check_vllm(config: EngineConfig) -> None:
    """Refuse engine=vllm where there is no vLLM to start.

    Raises:
        ConfigError: no Python or command of that name.
    """
    command(config)


def command(config: EngineConfig) -> list[str]:
    """How vLLM is started: with the Python that is named, or as the command on PATH.

    Raises:
        ConfigError: there is none.
    """
    how = "python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm"
    remedy = f"type {how}, and write engine.vllm_python=.venv-vllm/bin/python"
    if config.vllm_python is not None:
        program = Path(config.vllm_python).absolute().parent / "vllm"
        if not program.is_file():
            raise ConfigError(
                "engine.vllm_python",
                found=f"{config.vllm_python}, with no vllm beside it",
                expected="the Python of an environment that vLLM is installed in",
                remedy=remedy,
            )
        return [str(program)]
    found = shutil.which("vllm")
    if found is None:
        raise ConfigError(
            "engine=vllm",
            found="no command vllm on PATH",
            expected="vLLM in an environment of its own",
            remedy=remedy,
        )
    return [found]


@dataclass(kw_only=True, slots=True)
class VllmServer:
    """One server of a model and the adapters that were asked for so far.

    dtype: as our engines hold the model. max_length: tokens, None: the model's context.
    """

    config: EngineConfig
    model_dir: Path
    dtype: str
    max_length: int | None
    log_dir: Path
    base_url: str = ""
    _adapters: dict[Path, str] = field(default_factory=dict)
    _keeper: subprocess.Popen[bytes] | None = None

    def serve(self, adapter: Path | None) -> tuple[str, str]:
        """Where the model with this adapter is served, and its name there.

        A new adapter starts the server anew with all of them: loading one at run time is a door
        that vLLM advises to keep shut.

        Raises:
            JobFailed: the server ends, or does not answer in time.
        """
        is_new = adapter is not None and adapter not in self._adapters
        if adapter is not None and is_new:
            self._adapters[adapter] = f"adapter-{len(self._adapters)}"
        is_alive = self._keeper is not None and self._keeper.poll() is None
        if is_new or not is_alive:
            self.close()
            self._start()
        return self.base_url, BASE_NAME if adapter is None else self._adapters[adapter]

    def close(self) -> None:
        """End the server and all of its processes."""
        if self._keeper is not None:
            assert self._keeper.stdin is not None
            self._keeper.stdin.close()
            self._keeper.wait()
            self._keeper = None

    def _start(self) -> None:
        port = _free_port()
        arguments = [*command(self.config), *self._arguments(port)]
        self.log_dir.mkdir(parents=True, exist_ok=True)
        with (self.log_dir / "vllm.log").open("ab") as log:
            self._keeper = _kept(arguments, log)
        self.base_url = f"http://127.0.0.1:{port}/v1"
        deadline = time.monotonic() + self.config.start_seconds
        while not _is_healthy(port):
            is_over = self._keeper.poll() is not None
            if is_over or time.monotonic() > deadline:
                self.close()
                what = "ended" if is_over else f"no answer in {self.config.start_seconds:g} s"
                raise JobFailed(f"vllm serve: {what}; see {self.log_dir / 'vllm.log'}")
            time.sleep(LOOK_SECONDS)

    def _arguments(self, port: int) -> list[str]:
        given = ["serve", str(self.model_dir), "--host", "127.0.0.1", "--port", str(port)]
        given += ["--served-model-name", BASE_NAME, "--dtype", self.dtype]
        given += ["--enable-prompt-tokens-details"]  # cached tokens in each answer
        # Sampling as asked, nothing of the model's generation_config.json: as our engines do.
        given += ["--generation-config", "vllm"]
        if not self.config.prefix_cache:
            given += ["--no-enable-prefix-caching"]
        if self.max_length is not None:
            given += ["--max-model-len", str(self.max_length)]
        if self._adapters:
            rank = next(r for r in RANKS if r >= max(_lora_rank(p) for p in self._adapters))
            given += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules"]
            given += [f"{name}={path}" for path, name in self._adapters.items()]
        return given


def served_engine(spec: EngineSpec) -> Engine:
    """An engine that speaks to a server of its own, started at the first request."""
    from evaluation.engines.endpoint_served import ServedEngine

    assert spec.log_dir is not None, "a server writes a log"
    server = VllmServer(
        config=spec.config,
        model_dir=spec.model_dir,
        dtype=spec.dtype,
        max_length=spec.max_length,
        log_dir=spec.log_dir,
    )
    return ServedEngine(spec.config, serve=server.serve, end=server.close)


def _lora_rank(adapter: Path) -> int:
    import json

    found = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return int(found.get("r", RANKS[1]))


def _free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _kept(arguments: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """A keeper with a program of ours in its hands."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # Ray's thread counts and our allocator's settings are for our processes.
    skipped = ("OMP_NUM_THREADS", "PYTHONPATH", "VIRTUAL_ENV")
    return subprocess.Popen(
        [sys.executable, "-m", "launch.vllm_server", *arguments],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
        cwd=root,
        env={k: v for k, v in os.environ.items() if k not in skipped and not k.endswith("API_KEY")},
    )


def keep(arguments: list[str]) -> int:
    """Run a program until it ends or the pipe at stdin closes; end all of its processes."""
    program = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, start_new_session=True)
    while program.poll() is None:
        if select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
            break
    deadline = time.monotonic() + GRACE_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGTERM)
        while time.monotonic() < deadline and program.poll() is None:
            time.sleep(LOOK_SECONDS)
        os.killpg(program.pid, signal.SIGKILL)  # what is left of the group
    return program.wait()


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
