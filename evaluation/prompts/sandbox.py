"""Templates that come out of data: no way out of the sandbox, bounded work, bounded output.

Jinja2's own sandbox stops attribute tricks, not `'a' * 10**9` or nested loops. Here every loop
pass, printed value, concatenation, filter and method call is charged to one budget first.
"""

from __future__ import annotations

import functools
import json
import re
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from evaluation.prompts.template_parts import GenerationBlocks, Meter, Missing, PlainNamespace

BASE_WORK = 300_000  # characters and loop passes that any template may spend
WORK_PER_CHARACTER = 20  # and that each character of its input adds: templates copy a few times
MAX_SECONDS = 5.0
MAX_BITS = 4096  # of a whole number that a template computes
# fmt: off
SAFE_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "safe", "select", "selectattr", "sort", "string", "sum",
    "title", "trim", "unique", "upper",
)
LIST_FILTERS = frozenset((
    "count", "d", "default", "dictsort", "first", "items", "last", "length", "list", "map", "max",
    "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "sum", "unique",
))
# Methods whose result can be longer than what they are given: none is needed in a prompt.
UNSAFE_METHODS = frozenset((
    "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "format", "format_map",
    "encode", "to_bytes",
))
# fmt: on
COPIED = (str, list, tuple, dict, range)  # what an operation on a value may copy whole
# What a template of unknown origin can raise besides jinja2's own errors.
FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class TemplateFault(Exception):
    """A template that cannot be used: why, and at which of its lines (None: not known)."""

    def __init__(self, reason: str, *, line: int | None = None) -> None:
        self.reason = reason
        self.line = line
        super().__init__(reason if line is None else f"line {line}: {reason}")


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and renders one template at a time under a budget of work and seconds."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=Missing,
            extensions=[GenerationBlocks, LoopControlExtension],
            optimized=False,  # constants are not computed before the budget is in force
            finalize=self._printed,
        )
        self.filters = {name: self._charged(FILTERS[name], name=name) for name in SAFE_FILTERS}
        self.filters |= {"tojson": self._tojson, "indent": self._charged(_indent, name="indent")}
        self.globals = {
            "range": self._range,
            "dict": self._dict,
            "namespace": PlainNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self._refill(0)

    def template(self, source: str | nodes.Template) -> jinja2.Template:
        """Compile a template; raises TemplateFault."""
        self._refill(0)
        try:
            tree = self.parse(source) if isinstance(source, str) else source
            return self.from_string(Meter().visit(tree))
        except FAULTS as error:
            raise _fault(error) from error

    def run(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """Render; raises TemplateFault when the template fails or spends its budget."""
        self._refill(len(str(values)))
        pieces: list[str] = []
        try:
            for piece in template.generate(values):
                self.spend(len(piece))
                pieces.append(piece)
        except FAULTS as error:
            raise _fault(error) from error
        return "".join(pieces)

    def _refill(self, num_characters: int) -> None:
        self._left = BASE_WORK + WORK_PER_CHARACTER * num_characters
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, work: int) -> None:
        """Charge work before it is done."""
        self._left -= work
        if self._left < 0:
            raise jinja2.TemplateRuntimeError("the template makes too much text or loops too often")
        if time.monotonic() > self._deadline:
            raise jinja2.TemplateRuntimeError(f"the template took over {MAX_SECONDS:g} seconds")

    def joined(self, *parts: object) -> str:
        """`a ~ b`."""
        self.spend(self._text_size(parts))
        return "".join(str(part) for part in parts)

    def built(self, value: object) -> object:
        """A list, tuple or dictionary that the template wrote."""
        self.spend(self._text_size(value, is_text=False))
        return value

    def _text_size(self, value: object, *, is_text: bool = True) -> int:
        """About the length of str(value), or its number of values in all; stops at the budget."""
        total, stack = 0, [value]
        while stack and total <= self._left:
            inner = stack.pop()
            total += 1
            if isinstance(inner, str):
                total += len(inner) if is_text else 0
            elif isinstance(inner, dict):
                stack += [*inner.keys(), *inner.values()]
            elif isinstance(inner, (list, tuple)):
                stack += inner
        return total

    def _printed(self, value: object) -> object:
        self.spend(self._text_size(value))
        return value

    def _dict(self, *values: Any, **named: Any) -> object:
        return self.built(dict(*values, **named))

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.spend(len(numbers))
        return numbers

    def _tojson(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON without HTML escapes, as transformers gives templates."""
        if isinstance(indent, int) and indent > 16 or isinstance(indent, str):
            raise jinja2.TemplateRuntimeError("tojson with an indent over 16")
        self.spend(self._text_size(value))
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        self.spend(len(text))
        return text

    def _charged(self, function: Callable[..., Any], *, name: str) -> Callable[..., Any]:
        """A filter that is charged for what it copies; jinja2's marks on it are kept."""

        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            values = [*args, *kwargs.values()]
            is_list = name in LIST_FILTERS
            self.spend(sum(_size(v) if is_list else self._text_size(v) for v in values))
            if name == "replace":
                texts = [value for value in values if isinstance(value, str)]
                self.spend(_replaced_size(texts))
            if name == "join":
                return self._join_filter(function, args, kwargs)
            return function(*args, **kwargs)

        return charged

    def _join_filter(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        context, values, *rest = args
        values = list(values)
        separator = kwargs.get("d", rest[0] if rest else "")
        self.spend(len(str(separator)) * len(values) + self._text_size(values))
        return function(context, values, *rest, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Charge an operator for its result before computing it."""
        if operator == "%" and isinstance(left, str):
            if re.search(r"%[^A-Za-z%]*(\*|\d{4})", left):
                raise SecurityError("a format with a width over 999")
            self.spend(left.count("%") * (1000 + self._text_size(right)))
        elif operator == "+":
            self.spend(_size(left) + _size(right))
        elif operator in ("*", "**"):
            self._charge_product(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def _charge_product(self, operator: str, left: Any, right: Any) -> None:
        for several, times in ((left, right), (right, left)):
            if isinstance(several, COPIED) and isinstance(times, int):
                self.spend(len(several) * max(times, 0))
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            bits = bits + right.bit_length() if operator == "*" else bits * abs(right)
            if bits > MAX_BITS:
                raise SecurityError("a number of over a thousand digits")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        """Charge a method for its object and arguments."""
        owner = getattr(__obj, "__self__", None)
        __self.built((args, kwargs))
        if isinstance(owner, (str, list, tuple, dict)):
            __self.spend(1 + _size(owner) + sum(_size(value) for value in args))
            name = __obj.__name__
            if name == "replace":
                __self.spend(_replaced_size([str(owner), *map(str, args[:2])]))
            if name == "join" and args:
                parts = list(args[0])
                __self.spend(len(str(owner)) * len(parts) + __self._text_size(parts))
                args = (parts, *args[1:])
        return super().call(__context, __obj, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Jinja2's rule, without the methods that make long text out of short."""
        return attr not in UNSAFE_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` goes through is_safe_attribute, which refuses it."""


def _size(value: object) -> int:
    return len(value) if isinstance(value, COPIED) else 0


def _replaced_size(texts: list[str]) -> int:
    """The length of texts[0] with each texts[1] replaced by texts[2]."""
    if len(texts) < 3:
        return 0
    return len(texts[0]) + (texts[0].count(texts[1])) * len(texts[2])


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja2's filter, for widths that a prompt can want."""
    if not isinstance(width, int) or width > 100:
        raise jinja2.TemplateRuntimeError("indent with a width over 100")
    indented: str = FILTERS["indent"](text, width, first, blank)
    return indented


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 64 or re.search(r"%[^A-Za-z]*\d", form):
        raise SecurityError("a date format with a width")
    return datetime.now().strftime(form)


def _fault(error: Exception) -> TemplateFault:
    """The error in words, with the template's line where there is one."""
    line = getattr(error, "lineno", None)
    if line is None:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame.lineno for frame in frames if frame.filename in ("<template>", "<unknown>")]
        line = inside[-1] if inside else None
    return TemplateFault(f"{type(error).__name__}: {error}", line=line)
