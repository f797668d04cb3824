"""The bound of decoding counts the right steps, rows and bytes (no clock)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from tests.benchmarks import decode_bound as module
from tests.benchmarks.decode_bound import Weights, decode_bound, steps_of


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_steps_are_those_of_a_loop(new_tokens: list[int]) -> None:
    """Played: the pass over prompts gives each its first token, each step one more to the rest."""
    left, expected = [count - 1 for count in new_tokens], []
    while any(left):
        expected.append(sum(count > 0 for count in left))
        left = [max(0, count - 1) for count in left]
    assert steps_of(new_tokens) == expected
    assert sum(expected) == sum(new_tokens) - len(new_tokens)


def test_weights_are_the_models(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir))
    products = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    weights = Weights.of(tiny_model_dir)
    assert weights.bytes == sum(weight.nbytes for weight in products)
    assert sum(len(layer) for layer in weights.layers) + 1 == len(products)


def test_every_step_runs_all_products(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "REPEATS", 1)
    monkeypatch.setattr(module, "READ_BYTES", 2**20)
    monkeypatch.setattr(
        Weights, "run", lambda self, rows, *, read_rows: seen.append((rows, read_rows))
    )
    found = decode_bound(tiny_model_dir, new_tokens=[1, 3, 4], prompt_rows=7)
    assert seen == [(7, 3), (2, 2), (2, 2), (1, 1)]
    assert found["steps"] == 3
    read = found["memory_seconds"] * found["read_gigabytes_per_second"] * 1e9
    assert read == pytest.approx(4 * found["weight_bytes"])
