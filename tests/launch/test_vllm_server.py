"""engine=vllm with a fake `vllm` that really starts a loopback server."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from conf.errors import ConfigError, JobFailed
from conf.groups import EngineConfig
from evaluation.engines.base import GenerateRequest
from launch.engine_process import EngineSpec
from launch.vllm_server import check_vllm, served_engine
from tests.evaluation.endpoint_server import answer_to

ROOT = Path(__file__).resolve().parent.parent.parent
FAKE = """#!{python}
import json, subprocess, sys
json.dump(sys.argv[1:], open({seen!r}, "a")); open({seen!r}, "a").write("\\n")
{body}
"""
SERVES = """
child = subprocess.Popen([sys.executable, {server!r}, *sys.argv[1:]])  # as vLLM's own processes
sys.exit(child.wait())
"""


def fake(directory: Path, body: str = SERVES) -> Path:
    """An environment with a `vllm` beside its Python; the Python's path."""
    directory.mkdir(exist_ok=True)
    seen = str(directory / "seen")
    server = str(ROOT / "tests" / "evaluation" / "endpoint_server.py")
    script = FAKE.format(python=sys.executable, seen=seen, body=body.format(server=server))
    program = directory / "vllm"
    program.write_text(script)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return directory / "python"


def spec(python: Path, logs: Path, **engine: object) -> EngineSpec:
    config = EngineConfig(name="vllm", vllm_python=str(python), **engine)  # type: ignore[arg-type]
    return EngineSpec(
        config=config,
        model_dir=Path("/models/base"),
        layout="auto",
        max_length=512,
        dtype="float32",
        device="cpu",
        threads=1,
        log_dir=logs,
    )


def adapter_in(directory: Path, rank: int) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return directory


def servers_of(directory: Path) -> list[psutil.Process]:
    """Processes whose command names a file of this directory, and what they started."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(directory) in part for part in process.cmdline()):
                found += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    return [p for p in found if p.pid != os.getpid() and p.status() != psutil.STATUS_ZOMBIE]


def wait_for_none(directory: Path) -> None:
    deadline = time.monotonic() + 30
    while servers_of(directory) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not servers_of(directory)


def test_a_server_with_adapters_answers_and_ends(tmp_path: Path) -> None:
    environment = tmp_path / "bin"
    engine = served_engine(spec(fake(environment), tmp_path / "logs"))
    request = GenerateRequest(id="a|0|0", prompt_ids=(5, 6, 7), max_new_tokens=4)
    (base,) = engine.generate([request])
    assert base.text == answer_to("[5, 6, 7]")  # it got the ids themselves
    adapter = adapter_in(tmp_path / "adapter", rank=12)
    engine.set_adapter(adapter)
    (timed,) = engine.generate([request], timed=True)
    assert timed.first_token_seconds is not None
    engine.set_adapter(None)
    list(engine.generate([request]))
    first, second = [json.loads(line) for line in (environment / "seen").read_text().splitlines()]
    assert first[:2] == ["serve", "/models/base"] and "--enable-lora" not in first
    assert first[first.index("--max-model-len") + 1] == "512"
    assert second[second.index("--max-lora-rank") + 1] == "16"
    assert second[-2:] == ["--lora-modules", f"adapter-0={adapter}"]
    assert servers_of(environment)
    engine.close()  # type: ignore[attr-defined]
    wait_for_none(environment)


def test_a_server_ends_with_a_killed_run(tmp_path: Path) -> None:
    environment = tmp_path / "bin"
    python = fake(environment)
    code = f"""
from pathlib import Path
from tests.launch.test_vllm_server import spec
from evaluation.engines.base import GenerateRequest
from launch.vllm_server import served_engine
engine = served_engine(spec(Path({str(python)!r}), Path({str(tmp_path / "logs")!r})))
list(engine.generate([GenerateRequest(id="a|0|0", prompt_ids=(5,), max_new_tokens=4)]))
print("ready", flush=True)
input()
"""
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    assert run.stdin is not None and run.stdout is not None
    with run.stdin, run.stdout:
        assert run.stdout.readline() == "ready\n"
        assert servers_of(environment)
        run.send_signal(signal.SIGKILL)
        run.wait()
    wait_for_none(environment)


@pytest.mark.parametrize(
    "body", ["print('no such model'); sys.exit(3)", "import time; time.sleep(60)"]
)
def test_a_server_that_does_not_come_is_a_failed_job(tmp_path: Path, body: str) -> None:
    environment = tmp_path / "bin"
    python = fake(environment, body)
    engine = served_engine(spec(python, tmp_path / "logs", start_seconds=1.0))
    with pytest.raises(JobFailed, match=r"vllm\.log"):
        list(engine.generate([GenerateRequest(id="a", prompt_ids=(5,), max_new_tokens=4)]))
    wait_for_none(environment)


def test_no_vllm_is_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="pip install vllm"):
        check_vllm(EngineConfig(name="vllm"))
    with pytest.raises(ConfigError, match="no vllm beside it"):
        check_vllm(EngineConfig(name="vllm", vllm_python=str(tmp_path / "python")))
    check_vllm(EngineConfig(name="vllm", vllm_python=str(fake(tmp_path / "bin"))))
