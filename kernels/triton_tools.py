"""What the Triton paths share: one refusal, and compiling a kernel for a GPU that is not here.

`python -m kernels.triton_tools` compiles every kernel for sm_80, sm_90 and sm_100 and prints its
registers, shared memory and spills, read from the machine code. It needs no GPU.
"""

from __future__ import annotations

import importlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHS = (80, 90, 100)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MODULES = (
    "kernels.shared_prefix_attention_triton",
    "kernels.token_logprobs_triton",
    "kernels.linear_cross_entropy_triton",
    "kernels.lora_linear_triton",
    "kernels.grouped_lora_triton",
)


def refuse_interpreted_bf16(dtype: torch.dtype) -> None:
    """Triton's interpreter multiplies the raw bits of bf16 in `tl.dot`, without a word.

    Raises:
        ValueError: for bf16 under TRITON_INTERPRET=1.
    """
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        raise ValueError("bf16 is wrong in Triton's interpreter (tl.dot); write fp32 or fp16")


@dataclass(kw_only=True, frozen=True)
class Instance:
    """A kernel with everything that is fixed when it is compiled.

    Args:
        kernel: the @triton.jit function.
        types: Triton's name for each run-time argument, e.g. `*bf16`, `i32`; a tuple of names for
            a tuple. Pointers and strides are taken to be multiples of 16, as they are in use.
        constants: the constexpr arguments.
        num_warps: warps of a program.
    """

    kernel: Any
    types: dict[str, Any]
    constants: dict[str, int]
    num_warps: int


@dataclass(kw_only=True, frozen=True)
class Compiled:
    """What a kernel needs of a GPU. spills: local loads and stores in the machine code."""

    kernel: str
    arch: int
    dtype: str
    constants: dict[str, int]
    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int


def compile_for(instance: Instance, *, arch: int, dtype: str) -> Compiled:
    """Compile for sm_<arch> and read the result with the wheel's own cuobjdump."""
    names = instance.kernel.arg_names
    signature = {name: instance.types.get(name, "constexpr") for name in names}
    hints = {
        path: [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        for path in _aligned(signature[name], (index,))
    }
    source = ASTSource(instance.kernel, signature, constexprs=instance.constants, attrs=hints)
    target = GPUTarget("cuda", arch, 32)
    done = triton.compile(source, target=target, options={"num_warps": instance.num_warps})
    usage, code = _cuobjdump(done.asm["cubin"])
    number = {key: int(n) for key, n in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Compiled(
        kernel=done.metadata.name,
        arch=arch,
        dtype=dtype,
        constants=instance.constants,
        registers=number["REG"],
        shared_bytes=done.metadata.shared,
        stack_bytes=number["STACK"],
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
    )


def _aligned(kind: Any, path: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Places of pointers, and of strides, which stand in a tuple behind their pointer."""
    if isinstance(kind, tuple):
        yield from ((*path, place) for place in range(len(kind)))
    elif kind.startswith("*"):
        yield path


def _cuobjdump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, as text."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        )
    return usage.stdout, code.stdout


def compile_all(
    archs: Sequence[int] = ARCHS,
    dtypes: Sequence[str] = tuple(DTYPES),
    is_wanted: Callable[[dict[str, int]], bool] = lambda constants: True,
) -> Iterator[Compiled]:
    """Every kernel, width, dtype and architecture whose constants are wanted."""
    for name, arch, dtype in itertools.product(MODULES, archs, dtypes):
        for instance in importlib.import_module(name).instances(dtype):
            if is_wanted(instance.constants):
                yield compile_for(instance, arch=arch, dtype=dtype)


def main() -> None:
    """Print a line for each compiled kernel."""
    print("kernel arch dtype registers shared_bytes stack_bytes spills constants")
    for done in compile_all():
        numbers = (done.registers, done.shared_bytes, done.stack_bytes, done.spills)
        print(done.kernel, f"sm_{done.arch}", done.dtype, *numbers, done.constants, flush=True)


if __name__ == "__main__":
    main()
