"""Bad input through the real command: exit code 2, quickly, with what to do instead."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from conf.errors import Refused
from conf.schema import RunConfig
from launch.cli import typed
from launch.compose import compose_config
from launch.preflight import check
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent.parent
HEAVY = ("torch", "ray", "transformers")


@dataclass(frozen=True)
class Done:
    code: int
    text: str
    seconds: float


def launch(*arguments: str, cwd: Path = ROOT) -> Done:
    """Run launch.py; heavy imports are made to fail, so that a refusal that needs one is seen."""
    block = ";".join(f"sys.modules[{name!r}]=None" for name in HEAVY)
    code = f"import sys,runpy;{block};sys.argv={['launch.py', *arguments]!r};"
    code += f"sys.path.insert(0,{str(ROOT)!r});runpy.run_path({str(ROOT / 'launch.py')!r})"
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    return Done(done.returncode, done.stdout + done.stderr, time.monotonic() - begun)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["+exp=nope"], ["exp/nope", "compare"]),
        (["exp=lora"], ["+exp=lora"]),
        (["+exp=lora", "trainer.lerning_rate=1"], ["Did you mean learning_rate?"]),
        (["+exp=lora", "+trainer.foo=1"], ["trainer.foo", "learning_rate"]),
        (["+exp=lora", "trainer.epochs=abc"], ["trainer.epochs", "abc"]),
        (["+exp=lora", "trainer.learning_rate=nan"], ["trainer.learning_rate", "nan"]),
        (["+exp=compare", "task.path=missing.csv"], ["missing.csv"]),
        (["+exp=lora", "cluster.workers=64"], ["cluster.workers", "64"]),
        (["+exp=label_curve", "decision.stop_early=true"], ["decision.stop_early", "false"]),
        (["+exp=label_curve", "label_curve.sizes=[8,99999]"], ["label_curve.sizes", "99999"]),
        (["+exp=lora", "-m", "trainer.epochs=1,abc"], ["combination trainer.epochs=abc"]),
        (
            ["+exp=lora", "trainer.keep=best", "trainer.num_points=4", "trainer.max_steps=3"],
            ["trainer.num_points", "3 optimizer steps", "write trainer.num_points=3"],
        ),
        (["+exp=sweep", "+sweep.space.lora.nope=[1,2]"], ["sweep.space.lora.nope"]),
        (["+exp=sweep", "sweep.budget.max_tokens=1000"], ["sweep.budget.max_tokens", "1000"]),
        (["+exp=sweep", "trainer.keep=best", "trainer.num_points=4"], ["keep", "last"]),
        (
            ["+exp=full", "sweep=grid", "+sweep.space.full={prompt:[zero_shot,bare]}"],
            ["not built yet", "different rows", "prompt"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_command_refuses(arguments: list[str], says: list[str]) -> None:
    done = launch(*arguments)
    assert done.code == 2, done.text
    assert "Traceback" not in done.text
    for text in says:
        assert text in done.text
    assert done.seconds < 5 * float(os.environ.get("CROSSOVER_SLOW_MACHINE", "3"))


def test_without_arguments_it_lists_every_experiment() -> None:
    done = launch()
    assert done.code == 0
    for path in (ROOT / "conf/exp").glob("*.yaml"):
        assert f"+exp={path.stem} " in done.text
    assert done.text.count("\n  python launch.py") + done.text.count("\n  make") == 4


def test_dry_run_shows_the_plan_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = launch("+exp=smoke", "dry_run=true", f"run.root={tmp_path}/out")
    assert done.code == 0, done.text
    for text in (
        "evaluate:zero_shot",
        "latency:few_shot",
        "reference:tfidf",
        "Nothing was started",
    ):
        assert text in done.text
    assert not (tmp_path / "out").exists()


def test_a_csv_without_a_mapping_gets_a_guess_and_the_full_command(tmp_path: Path) -> None:
    rows = "\n".join(
        f"my parcel {i} is late,{'delivery' if i % 2 else 'billing'}" for i in range(40)
    )
    (tmp_path / "tickets.csv").write_text("body,category\n" + rows + "\n")
    done = launch("+exp=compare", "task.path=tickets.csv", cwd=tmp_path)
    assert done.code == 2
    for text in ("body", "category", "task.columns.input=body task.columns.label=category"):
        assert text in done.text


def checked(*overrides: str) -> None:
    check(compose_config(list(overrides)), exp="x", command="test")


def test_an_unset_required_value_is_named() -> None:
    from hydra import compose, initialize_config_module

    from conf import schema

    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", overrides=["+exp=zero_shot", "+method@arms.now=given"])
    with pytest.raises(Refused, match=r"arms\.now\.path"):
        typed(config)


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["+exp=zero_shot", "engine=openai"], "engine.base_url"),
        (["+exp=zero_shot", "cluster=ray"], "cluster.address"),
        (["+exp=zero_shot", "cluster=ray", "cluster.address=http://h:1"], "cluster.storage"),
        (["+exp=zero_shot", "cluster=kuberay"], "cluster.device"),
        (["+exp=zero_shot", "cluster.nodes=2"], "cluster.nodes"),
        (["+exp=zero_shot", "cluster.device=cuda"], "cluster.device"),
        (["+exp=instruction", "arms.instruction.sources.mine.path=none.json"], "none.json"),
        (["+exp=zero_shot", "sweep.name=grid"], "sweep=grid"),
        (["+exp=zero_shot", "kernels.impl=triton"], "kernels.impl=triton"),
        (["+exp=zero_shot", "run.name=../escape"], "run.name"),
        (["+exp=zero_shot", "run.root=pyproject.toml/x"], "run.root"),
        (["+exp=zero_shot", "arms.zero_shot.on=no/such/dir"], "arms.zero_shot.on"),
        (["+exp=zero_shot", "arms.zero_shot.prompt=nope"], "arms.zero_shot.prompt"),
        (["+exp=zero_shot", "arms.zero_shot.prompt=nope.md"], "nope.md"),
        (["+exp=few_shot", "arms.few_shot.num_shots=100000"], "arms.few_shot.num_shots"),
        (["+exp=zero_shot", "+method@arms.t=tfidf", "task=orders"], "arms.t"),
        (["+exp=lora", "engine=scripted", "model=tiny"], "arms.lora"),
        (["+exp=lora", "trainer.batch_size=7", "trainer.micro_batch_size=2"], "micro_batch_size"),
        (["+exp=lora", "trainer.batch_size=7", "cluster.workers=2"], "batch_size"),
        (["+exp=zero_shot", "plugins=[missing.py]"], "missing.py"),
        (["+exp=zero_shot", "tracking.wandb=online"], "tracking.wandb"),
        (["+exp=zero_shot", "task.scoring=nope"], "task.scoring"),
        (["+exp=compare", "budget.max_usd=1e-9"], "budget.max_usd"),
        (["+exp=zero_shot", "+method@arms.g=given", "arms.g.path=none.csv"], "none.csv"),
        ([], "arms"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_preflight_refuses_by_key(
    overrides: list[str], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.chdir(ROOT)
    if "cluster.workers=2" in overrides and (os.cpu_count() or 1) < 2:
        overrides = [o for o in overrides if o != "cluster.workers=2"] + ["cluster.nodes=2"]
    with pytest.raises(Refused) as caught:
        checked(*overrides)
    assert where in str(caught.value)
    assert caught.value.exit_code == 2


def llama_directory(path: Path, **config: object) -> Path:
    """A model directory with headers and a configuration, but weights of zeros."""
    import json

    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    path.mkdir()
    names = ("q_proj", "k_proj", "up_proj")
    weights = {
        f"model.layers.0.self_attn.{n}.weight": np.zeros((4, 4), dtype=np.float32) for n in names
    }
    weights["model.embed_tokens.weight"] = np.zeros((8, 4), dtype=np.float32)
    save_file(weights, path / "model.safetensors")
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(settings | config))
    Tokenizer(WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]")).save(
        str(path / "tokenizer.json")
    )
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return path


def test_a_lora_target_that_does_not_exist_is_refused_from_the_headers(tmp_path: Path) -> None:
    model = llama_directory(tmp_path / "m")
    with pytest.raises(Refused) as caught:
        checked("+exp=lora", f"model.path={model}", "arms.lora.target_modules=[q_proj,nope_proj]")
    assert caught.value.where == "arms.lora.target_modules"
    assert caught.value.found == "nope_proj"
    assert "up_proj" in caught.value.expected


def test_a_model_that_wants_remote_code_is_refused(tmp_path: Path) -> None:
    model = llama_directory(tmp_path / "m", auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(Refused, match="auto_map|remote code"):
        checked("+exp=zero_shot", f"model.path={model}")


def test_a_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(Refused, match="adapter_model.bin"):
        checked("+exp=zero_shot", f"arms.zero_shot.on={tmp_path}")


def test_the_default_run_name_follows_the_contract() -> None:
    def name(*overrides: str) -> str:
        return check(compose_config(["+exp=smoke", *overrides]), exp="smoke", command="").name

    base = name()
    assert base.startswith("smoke-sms_spam-tiny-") and len(base.rsplit("-", 1)[1]) == 8
    assert name("run.root=elsewhere", "tracking.project=x", "dry_run=true") == base
    assert name("task.seed=1") != base
    assert isinstance(compose_config([]), RunConfig)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_read_only_place_is_refused_before_ray_is_imported(tmp_path: Path) -> None:
    """Permission bits do not hold root back; a file system does."""
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no mounting here")
    try:
        done = launch("+exp=smoke", f"run.root={tmp_path}/runs")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    assert done.code == 2, done.text
    assert "run.root" in done.text and str(tmp_path) in " ".join(done.text.split())
