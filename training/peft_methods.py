"""Which methods the installed peft has and what arguments they take, read without importing it.

Light: importing peft imports torch, and bad input is refused before anything heavy loads. So the
sources of its configuration classes are parsed instead; nothing of them runs.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from conf.errors import ConfigError
from conf.methods import PeftMethod

N = TypeVar("N", bound=ast.AST)

# What is filled in here, or would change how a checkpoint is found.
OURS = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    }
)
# Methods that need more than a module's forward pass, and what.
UNFIT = {
    "LORA": "a kind of its own here: write +method@arms.NAME=lora (use_rslora, use_dora, "
    "lora_plus_ratio)",
    "ADALORA": "ranks that are allocated inside each training step",
    "ADAPTION_PROMPT": "attention of its own",
    "LILY": "a router that mixes experts by the mean over all tokens of a pass",
    "POLY": "a task id with every input",
    "SHADOW": "a second network beside the layers",
    "TRAINABLE_TOKENS": "token ids whose embeddings train, not layers",
    "XLORA": "other adapters to mix",
}
# Arguments of fit methods that would do nothing without a call in each step.
IDLE = frozenset({"use_asa"})
VIRTUAL_TOKENS = "virtual tokens, which no request could be billed for"


@dataclass(frozen=True, slots=True)
class _Class:
    """A class as its source says: names of its bases, annotated fields."""

    bases: tuple[str, ...]
    fields: Mapping[str, ast.expr]


def check_peft_method(key: str, method: PeftMethod) -> None:
    """Refuse a peft type or arguments that peft does not have; key: e.g. arms.mine.

    Values that only a model can judge (a rank that does not divide a width) are refused when the
    adapters are built.

    Raises:
        ConfigError: an unknown type, a type that cannot be trained or served here, an unknown
            argument or one of a wrong type.
    """
    types = known_types()
    if method.peft_type not in types:
        raise ConfigError(
            f"{key}.peft_type",
            found=method.peft_type,
            expected=f"one of {', '.join(usable_types())}",
            remedy=_guess(f"{key}.peft_type=", method.peft_type.upper(), usable_types()),
        )
    reason = _obstacle(method.peft_type)
    if reason is not None:
        raise ConfigError(
            f"{key}.peft_type",
            found=f"{method.peft_type}: {reason}",
            expected=f"one of {', '.join(usable_types())}",
        )
    arguments = arguments_of(method.peft_type)
    for name, value in method.peft.items():
        if name not in arguments:
            raise ConfigError(
                f"{key}.peft.{name}",
                found=f"an argument that peft's {types[method.peft_type]} does not take here",
                expected=f"one of {', '.join(sorted(arguments))}",
                remedy=_guess(f"{key}.peft.", name, sorted(arguments), end=f"={value}"),
            )
        if not _fits(arguments[name], value):
            raise ConfigError(
                f"{key}.peft.{name}",
                found=f"{value!r}",
                expected=ast.unparse(arguments[name]),
            )


def usable_types() -> list[str]:
    """The peft types that can be trained and served here."""
    return sorted(name for name in known_types() if _obstacle(name) is None)


@functools.cache
def known_types() -> dict[str, str]:
    """Every peft type and the name of its configuration class, as peft registers them."""
    found = {}
    for node in _nodes("tuners/*/__init__.py", ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id == "register_peft_method":
            given = {word.arg: word.value for word in node.keywords}
            name, config = given["name"], given["config_cls"]
            assert isinstance(name, ast.Constant) and isinstance(config, ast.Name)
            found[str(name.value).upper()] = config.id
    return found


def arguments_of(peft_type: str) -> dict[str, ast.expr]:
    """The arguments of a type's configuration class, inherited ones too, with annotations."""
    found: dict[str, ast.expr] = {}
    for name in reversed(_ancestry(known_types()[peft_type])):
        found |= _classes()[name].fields
    return {name: hint for name, hint in found.items() if name not in OURS | IDLE}


def _obstacle(peft_type: str) -> str | None:
    """Why a type cannot be trained or served here, or None."""
    if "PromptLearningConfig" in _ancestry(known_types()[peft_type]):
        return VIRTUAL_TOKENS
    return UNFIT.get(peft_type)


def _ancestry(name: str) -> list[str]:
    """A class and those of its bases that peft defines, the class first."""
    classes = _classes()
    found = [name] if name in classes else []
    for base in classes[name].bases if name in classes else ():
        found += _ancestry(base)
    return found


@functools.cache
def _classes() -> dict[str, _Class]:
    """The classes of peft's configuration files by name."""
    return {
        node.name: _Class(
            bases=tuple(base.id for base in node.bases if isinstance(base, ast.Name)),
            fields={
                line.target.id: line.annotation
                for line in node.body
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            },
        )
        for pattern in ("config.py", "tuners/*.py", "tuners/*/config.py")
        for node in _nodes(pattern, ast.ClassDef)
    }


def _nodes(pattern: str, kind: type[N]) -> Iterator[N]:
    """The syntax nodes of a kind in the files of the installed peft."""
    for path in sorted(_peft_directory().glob(pattern)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield node


def _peft_directory() -> Path:
    spec = importlib.util.find_spec("peft")  # finds the package without importing it
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the installed packages",
            found="no peft",
            expected="peft, which makes the adapters",
            remedy="type: make install",
        )
    return Path(spec.origin).parent


def _fits(hint: ast.expr, value: Any) -> bool:
    """Whether a value fits an annotation; True where the annotation is of a kind not known here."""
    match hint:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str(text)):
            return _fits(ast.parse(text, mode="eval").body, value)
        case ast.BinOp(left=left, right=right):
            return _fits(left, value) or _fits(right, value)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return value is None or _fits(inner, value)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=kinds)):
            return any(_fits(kind, value) for kind in kinds)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            choices = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return any(isinstance(c, ast.Constant) and c.value == value for c in choices)
        case ast.Subscript(value=ast.Name(id=name)) | ast.Name(id=name):
            return _is_a(name, value)
    return True


def _is_a(name: str, value: Any) -> bool:
    if isinstance(value, bool):  # to Python a bool is an int; to a user it is not
        return name not in ("int", "float", "str", "list", "List", "dict", "Dict", "tuple", "Tuple")
    known: dict[str, tuple[type, ...]] = {
        "bool": (bool,),
        "int": (int,),
        "float": (int, float),
        "str": (str,),
        "list": (list,),
        "List": (list,),
        "tuple": (list,),  # what YAML has for it
        "Tuple": (list,),
        "dict": (dict,),
        "Dict": (dict,),
    }
    return name not in known or isinstance(value, known[name])


def _guess(start: str, name: str, known: list[str], end: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return " or ".join(
        f"write {start}{n}{end}" if n == near[0] else f"{start}{n}{end}" for n in near
    )
