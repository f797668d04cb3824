"""vLLM's CPU build behind a pipe: a line of JSON in, a line out. Runs in .venv-vllm, alone.

in   {"prompts": [[id, ...], ...], "new_tokens": [n, ...]}
out  {"completions": [[id, ...], ...]}, after a first line {"version", "settings"}
"""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any

SETTINGS = {"block_size": 32, "max_num_seqs": 64, "max_model_len": 2048}


def main(model_dir: str) -> None:
    """Load the model, say so, and answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints must not get between the answers
    import vllm  # type: ignore[import-not-found]

    llm = vllm.LLM(model=model_dir, dtype="float32", enable_prefix_caching=True, seed=0, **SETTINGS)
    say(answers, {"version": vllm.__version__, "settings": SETTINGS})
    for line in sys.stdin:
        request = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        sampling = [
            vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in request["new_tokens"]
        ]
        found = llm.generate(prompts, sampling, use_tqdm=False)
        say(answers, {"completions": [list(out.outputs[0].token_ids) for out in found]})


def say(stream: IO[str], answer: dict[str, Any]) -> None:
    """Write a line."""
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


if __name__ == "__main__":
    main(sys.argv[1])
