"""The doctor's kernel checks: one line per kernel, and a check that hangs or dies is a finding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import doctor
from launch.compose import compose_config

kernels_checks = pytest.importorskip("kernels.checks")


def test_each_kernel_is_compared_with_its_reference_on_this_device() -> None:
    config = compose_config(["cluster.device=cpu"])
    found = doctor._kernels(config, "cpu")
    names = [name.strip() for name, _, _ in found]
    assert names == ["kernels", *kernels_checks.TOLERANCES, "linear"]
    assert all(is_well for _, is_well, _ in found)


def test_a_wrong_kernel_is_named_with_what_runs_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"impl": "cpu", "tolerance": 1e-4, "seconds": 0.1}
    good = kernels_checks.Check(kernel="good", is_ok=True, worst_error=0.0, reason="", **facts)
    bad = kernels_checks.Check(
        kernel="bad", is_ok=False, worst_error=float("inf"), reason="OSError: no driver", **facts
    )
    monkeypatch.setattr(kernels_checks, "check_kernels", lambda *_: [good, bad])
    lines = doctor.kernel_lines("cuda", "float32", "auto")
    assert [(name.strip(), is_well) for name, is_well, _ in lines] == [
        ("good", True),
        ("bad", False),
    ]
    assert "OSError: no driver" in lines[1][2]
    assert "reference" in lines[1][2]


def test_a_check_that_hangs_ends_in_time_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "KERNELS_SECONDS", 0.2)
    ((name, is_well, text),) = doctor._kernels(compose_config([]), "cpu")
    assert (name, is_well) == ("kernels", False)
    assert "did not end within" in text
    assert "kernels.impl=reference" in text


def test_a_check_that_takes_its_process_with_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho Illegal instruction >&2\nkill -ILL $$\n")
    broken.chmod(0o755)
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(executable=str(broken)))
    ((_, is_well, text),) = doctor._kernels(compose_config([]), "cpu")
    assert not is_well
    assert "exit code -4: Illegal instruction" in text


def test_an_implementation_that_cannot_run_here_is_refused_by_name() -> None:
    ((_, is_well, text),) = doctor._kernels(compose_config(["kernels.impl=triton"]), "cpu")
    assert not is_well
    assert "triton" in text
