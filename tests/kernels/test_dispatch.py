"""The choice of an implementation: by device, with the reason; what cannot run is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from kernels import dispatch
from kernels.dispatch import Choice, KernelsNotBuilt, choose


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_the_reference_runs_everywhere(device):
    assert choose("reference", device) == Choice(impl="reference", reason="asked for")


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_auto_takes_the_cpu_path_on_a_cpu(device):
    assert choose("auto", device) == Choice(impl="cpu", reason="the device is cpu")
    assert choose("auto") == choose("auto", "cpu")
    assert choose("cpu", device).impl == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_auto_takes_triton_on_cuda(device):
    pytest.importorskip("triton")
    assert choose("auto", device) == Choice(impl="triton", reason="the device is cuda")
    assert choose("triton", device) == Choice(impl="triton", reason="asked for")


def test_auto_without_triton_says_why(without_triton):
    choice = choose("auto", "cuda")
    assert choice.impl == "reference"
    assert "Triton cannot be imported" in choice.reason


def test_auto_on_another_device_says_why():
    choice = choose("auto", "mps")
    assert choice.impl == "reference"
    assert "mps" in choice.reason


@pytest.mark.parametrize(
    ("impl", "device", "message"),
    [
        ("triton", "cpu", "needs CUDA, and the device is cpu"),
        ("cpu", "cuda:0", "runs on a CPU, and the device is cuda"),
    ],
)
def test_what_cannot_run_here_is_refused_by_name(impl, device, message):
    with pytest.raises(
        KernelsNotBuilt, match=f"kernels.impl={impl}: .*{message}.*kernels.impl=auto"
    ):
        choose(impl, device)


def test_triton_is_refused_where_it_is_not_installed(without_triton):
    with pytest.raises(KernelsNotBuilt, match="Triton cannot be imported"):
        choose("triton", "cuda")


@pytest.mark.parametrize("impl", ["", "Auto", "cuda"])
def test_unknown_names_are_refused(impl):
    with pytest.raises(ValueError, match="expected auto"):
        choose(impl)


def test_every_kernel_that_is_built_has_its_reference_test_and_paths():
    root = Path(dispatch.__file__).parent
    for name in dispatch.BUILT:
        source = (root / f"{name}.py").read_text()
        assert f"def {name}(" in source
        assert f"def {name}_reference(" in source
        apart = root / f"{name}_cpu.py"  # where the CPU path has a file of its own
        assert f"{name}_cpu(" in (apart.read_text() if apart.exists() else source)
        assert f"def {name}_triton(" in (root / f"{name}_triton.py").read_text()
        assert (root.parent / "tests" / "kernels" / f"test_{name}.py").exists()


def test_a_choice_needs_neither_torch_nor_triton():
    code = "import sys; from kernels.dispatch import choose; choose('auto')\n"
    code += "print([name for name in ('torch', 'triton') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
