"""The peers that generate: transformers' generate(), its continuous batching, and vLLM.

All generate greedily, 16 to 48 tokens per request, and never stop at an end token.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tests.benchmarks.harness import ROOT, Arm
from tests.benchmarks.parity import Answer, Completion
from tests.benchmarks.workloads import Workload

GENERATE_BATCHES = (8, 16, 32)
# page_size, max_batch_tokens: the default pages of 256 share no prefix of ours; with sdpa the mask
# is dense over a batch, so that large batches cost more than they save.
CONTINUOUS_SETTINGS = ((256, 512), (32, 512), (32, 2048))
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


def static_arm(model: Any, *, batch: int) -> Arm:
    """generate(): left-padded batches of requests with like lengths."""

    @torch.inference_mode()
    def run(workload: Workload) -> list[Answer]:
        order = sorted(range(len(workload.items)), key=lambda i: -workload.new_tokens[i])
        found: dict[int, Completion] = {}
        for first in range(0, len(order), batch):
            part = order[first : first + batch]
            prompts = [workload.items[i].prompt_ids for i in part]
            width, steps = max(map(len, prompts)), workload.new_tokens[part[0]]
            ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
            config = GenerationConfig(  # type: ignore[no-untyped-call]
                max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0
            )
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for row, i in zip(out[:, width:].tolist(), part, strict=True):
                found[i] = Completion(ids=tuple(row[: workload.new_tokens[i]]))
        return [found[i] for i in range(len(order))]

    version = f"transformers {metadata.version('transformers')} generate()"
    return Arm(name="generate()", version=version, run=run, settings={"batch_size": batch})


class Continuous:
    """transformers' continuous batching with a manager that stays, so its prefix cache is warm."""

    def __init__(self, model: Any, *, page_size: int, max_batch_tokens: int) -> None:
        """Start the manager's thread. Needs a model of its own: attention is switched."""
        config = ContinuousBatchingConfig(
            page_size=page_size,
            num_blocks=32 * 512 // page_size,
            max_batch_tokens=max_batch_tokens,
            allow_block_sharing=True,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=config,
        )
        self._settings = {"page_size": page_size, "max_batch_tokens": max_batch_tokens}
        self._manager.start()
        self._calls = 0

    def arm(self) -> Arm:
        """This manager as an arm."""
        version = f"transformers {metadata.version('transformers')} generate_batch, paged|sdpa"
        return Arm(
            name="continuous batching", version=version, run=self._run, settings=self._settings
        )

    def _run(self, workload: Workload) -> list[Answer]:
        self._calls += 1
        names = [f"{self._calls}-{i}" for i in range(len(workload.items))]
        for name, item, count in zip(names, workload.items, workload.new_tokens, strict=True):
            self._manager.add_request(
                list(item.prompt_ids), request_id=name, max_new_tokens=count, eos_token_id=-1
            )
        found: dict[str, Completion] = {}
        while len(found) < len(names):
            result = self._manager.get_result(timeout=1)
            if result is None:
                assert self._manager.is_running(), "continuous batching stopped by itself"
            elif result.is_finished():
                assert result.error is None, result.error
                found[result.request_id] = Completion(ids=tuple(result.generated_tokens))
        return [found[name] for name in names]

    def close(self) -> None:
        """Stop the thread."""
        self._manager.stop(block=True, timeout=10)


class Vllm:
    """vLLM's CPU build in its own environment and process, its prefix cache on and warm."""

    def __init__(self, model_dir: Path, *, threads: int) -> None:
        """Start the process and wait until the model is loaded.

        Raises:
            RuntimeError: it ended before it was ready.
        """
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        }
        openmp = VLLM_PYTHON.parents[1] / "lib" / "libiomp5.so"
        if openmp.is_file():  # what vLLM asks for at its start
            environment["LD_PRELOAD"] = str(openmp)
        script = Path(__file__).with_name("vllm_process.py")
        self._process = subprocess.Popen(
            [str(VLLM_PYTHON), str(script), str(model_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._about = self._read()

    def arm(self) -> Arm:
        """This process as an arm."""
        version = f"vllm-cpu {self._about['version']} float32"
        return Arm(name="vllm", version=version, run=self._run, settings=self._about["settings"])

    def _run(self, workload: Workload) -> list[Answer]:
        request = {
            "prompts": [item.prompt_ids for item in workload.items],
            "new_tokens": workload.new_tokens,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return [Completion(ids=tuple(ids)) for ids in self._read()["completions"]]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM's process ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def has_vllm() -> bool:
    """Whether its environment was built."""
    return (VLLM_PYTHON.parents[1] / ".ready").is_file()


def token_gap(model: Any) -> Callable[[tuple[int, ...], int, int], float]:
    """Distance in nats of two next tokens after some ids, by a plain forward pass."""

    @torch.inference_mode()
    def gap(ids: tuple[int, ...], a: int, b: int) -> float:
        logprobs = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].log_softmax(-1)
        return abs(float(logprobs[a] - logprobs[b]))

    return gap
