"""Arguments read from peft's sources against the imported classes, and what is refused by name."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from conf.errors import ConfigError
from conf.methods import PeftMethod
from training.adapters import with_adapters
from training.peft_methods import (
    IDLE,
    OURS,
    UNFIT,
    _fits,
    arguments_of,
    check_peft_method,
    known_types,
    usable_types,
)


def real_configs() -> dict[str, Any]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def test_types_and_arguments_are_those_of_the_imported_package() -> None:
    real = real_configs()
    assert known_types() == {kind: config.__name__ for kind, config in real.items()}
    assert len(real) >= 40
    for kind, config in real.items():
        fields = {f.name for f in dataclasses.fields(config) if f.init}
        assert set(arguments_of(kind)) == fields - OURS - IDLE, kind


def test_types_with_virtual_tokens_are_those_of_the_imported_package() -> None:
    from peft import PromptLearningConfig

    prompts = {k for k, c in real_configs().items() if issubclass(c, PromptLearningConfig)}
    assert {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"} <= prompts
    assert set(usable_types()) == set(known_types()) - prompts - set(UNFIT)
    assert set(UNFIT) <= set(known_types())


def test_every_default_fits_its_annotation() -> None:
    for kind, config in real_configs().items():
        for f in dataclasses.fields(config):
            if f.name in arguments_of(kind) and isinstance(f.default, (int, float, str, bool)):
                assert _fits(arguments_of(kind)[f.name], f.default), (kind, f.name)


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [1, -2], [True, "1", 1.0, None, [1]]),
        (float, [1, 0.5], [False, "x", None]),
        (bool, [True], [0, "true", None]),
        (str, ["a"], [1, True, ["a"]]),
        (list[str], [["a"], []], ["a", 1]),
        ("int | None", [3, None], ["x", 2.5]),
        ("Optional[Union[list[str], str]]", [None, "a", ["a"]], [1, {"a": 1}, True]),
        ("Literal['none', 'all']", ["none", "all"], ["some", 1]),
        ("Optional[dict]", [None, {"a": 1}], ["a", [1]]),
        ("bool | Literal['gaussian']", [True, "gaussian"], ["other", 3]),
        ("SomeClassOfPeft", ["anything", 1], []),
        ("'Optional[int]'", [None, 1], ["a"]),
    ],
    ids=str,
)
def test_values_against_annotations(hint: Any, good: list[Any], bad: list[Any]) -> None:
    text = hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))
    text = str(hint) if typing.get_origin(hint) else text
    node = ast.parse(text, mode="eval").body
    assert [v for v in good if not _fits(node, v)] == []
    assert [v for v in bad if _fits(node, v)] == []


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        ("Vera", {}, ["arms.mine.peft_type", "write arms.mine.peft_type=VERA"]),
        ("NONSENSE", {}, ["arms.mine.peft_type", "IA3"]),
        ("PROMPT_TUNING", {}, ["virtual tokens"]),
        ("ADALORA", {}, ["inside each training step"]),
        ("LORA", {"r": 4}, ["use_dora"]),
        ("VERA", {"rr": 3}, ["arms.mine.peft.rr", "VeraConfig", "write arms.mine.peft.r=3"]),
        ("VERA", {"r": "many"}, ["arms.mine.peft.r", "'many'", "int"]),
        ("IA3", {"task_type": "SEQ_CLS"}, ["arms.mine.peft.task_type"]),
        ("ADAMSS", {"use_asa": True}, ["use_asa"]),
    ],
)
def test_refusals(kind: str, arguments: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_peft_method("arms.mine", PeftMethod(peft_type=kind, peft=arguments))
    for text in says:
        assert text in str(caught.value)


def test_a_check_imports_nothing_heavy() -> None:
    code = (
        "from conf.methods import PeftMethod\nfrom training.peft_methods import check_peft_method\n"
        "check_peft_method('arms.x', PeftMethod(peft_type='VERA', peft={'r': 8}))\n"
        "import sys\nprint([m for m in ('torch', 'peft', 'transformers') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("C3A", {"block_size": 7}),  # does not divide a width
        ("LOHA", {"target_modules": "no_such_layer"}),
        ("VERA", {"vera_dropout": 3.0}),
    ],
)
def test_what_only_the_model_can_judge_is_refused_when_it_is_built(
    kind: str, arguments: dict[str, Any], base_dir: Path
) -> None:
    from transformers import AutoModelForCausalLM

    method = PeftMethod(peft_type=kind, peft=arguments)
    check_peft_method("arms.mine", method)
    base = AutoModelForCausalLM.from_pretrained(str(base_dir))
    with pytest.raises(ConfigError, match=r"arms\.mine\.peft") as caught:
        with_adapters(base, method, arm_name="mine", seed=0)
    assert "peft says" in str(caught.value)


def test_a_partly_wrong_list_of_layers_is_refused(base_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    method = PeftMethod(peft_type="LOHA", peft={"target_modules": ["q_proj", "no_such_layer"]})
    base = AutoModelForCausalLM.from_pretrained(str(base_dir))
    with pytest.raises(ConfigError, match=r"(?s)arms\.mine\.peft\.target_modules.*no_such_layer"):
        with_adapters(base, method, arm_name="mine", seed=0)


def test_memory_that_runs_out_is_not_an_argument_that_peft_refuses(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    def full(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(peft, "get_peft_model", full)
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        with_adapters(model, PeftMethod(peft_type="IA3"), arm_name="a", seed=0)
