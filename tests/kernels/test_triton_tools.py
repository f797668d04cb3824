"""The Triton kernels without a GPU: interpreted, and compiled ahead of time; a process for each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WIDEST_SHARED_BYTES = 99 * 1024  # of one program on the smallest of sm_80 to sm_89
CASES = "tests/kernels/interpreter_cases.py"
COMPILE = """
import dataclasses, json
from kernels.triton_tools import ARCHS, compile_all
wanted = {wanted}
for done in compile_all({archs}, {dtypes}, wanted):
    print(json.dumps(dataclasses.asdict(done)))
"""


def run(*arguments: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    names = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        env=names,
        capture_output=True,
        text=True,
    )


def compiled(tmp_path: Path, *, dtypes: str, wanted: str, archs: str = "ARCHS") -> list[dict]:
    code = COMPILE.format(archs=archs, dtypes=dtypes, wanted=wanted)
    done = run("-c", code, tmp_path=tmp_path, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_are_right_in_the_interpreter(tmp_path):
    cases = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", CASES)
    done = run(*cases, tmp_path=tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    "archs",
    [(80,), pytest.param((90, 100), marks=pytest.mark.slow)],
    ids=["oldest", "newer"],
)
def test_kernels_compile_for_three_generations_of_gpu(archs, tmp_path):
    """The oldest has the least shared memory, and is compiled for first."""
    wanted = "lambda constants: constants.get('D', 64) == 64 or 'COLUMNS' in constants"
    found = compiled(tmp_path, dtypes='("bf16",)', wanted=wanted, archs=repr(archs))
    assert {(c["kernel"], c["arch"]) for c in found} == {
        (kernel, arch)
        for kernel in (
            "shared_prefix_attention_kernel",
            "row_lse_kernel",
            "cross_entropy_kernel",
            "lora_linear_kernel",
            "grouped_lora_kernel",
        )
        for arch in archs
    }
    for c in found:
        assert c["spills"] == c["stack_bytes"] == 0, c
        assert 16 <= c["registers"] <= 255, c
        assert 0 < c["shared_bytes"] <= WIDEST_SHARED_BYTES, c


@pytest.mark.slow
def test_every_width_compiles_with_next_to_no_spill(tmp_path):
    """At most 16 bytes, of d = 128 in fp32 and d = 32 in bf16 on sm_80; fp16 is as bf16."""
    found = compiled(tmp_path, dtypes='("bf16", "fp32")', wanted="lambda constants: True")
    assert len(found) == 3 * 2 * (4 + 2 + 1 + 1 + 1)
    for c in found:
        assert c["stack_bytes"] <= 16, c
        assert c["spills"] <= 8, c
        assert c["shared_bytes"] <= WIDEST_SHARED_BYTES, c


@pytest.mark.slow
def test_spills_are_seen(tmp_path):
    """A tile far too large for its warps must be reported as spilling."""
    code = """
import dataclasses
import kernels.shared_prefix_attention_triton as attention
from kernels.triton_tools import compile_for
instance = attention.instances("fp32")[3]
greedy = dataclasses.replace(
    instance, constants=instance.constants | {"BLOCK_M": 64}, num_warps=4)
print(compile_for(greedy, arch=90, dtype="fp32").spills)
"""
    done = run("-c", code, tmp_path=tmp_path, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100
