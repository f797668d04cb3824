"""The user's own prompt as one Markdown file: no Python needed, and nothing in it is run as code.

    # system
    You are a support agent.
    # instruction
    Sort the message into one of: {{ labels | join(", ") }}.
    # layout
    Message: {{ input }}

`system` and `instruction` may name {{ instruction }} (the task's) and {{ labels }}; `layout`, the
text of one item, also {{ input }}, {{ context }}, {{ choices }} and {{ slices.NAME }}. Each section
may be left out. Of jinja2 there are placeholders, `if`, `for` over a known list and a few filters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from jinja2 import nodes

from conf.errors import ConfigError, DataError
from conf.hashing import sha256_of_file
from conf.records import Item
from evaluation.prompts import Ask, Calls, PromptContext, conversation, item_text
from evaluation.prompts.sandbox import FAULTS, Sandbox, TemplateFault

SECTIONS = ("system", "instruction", "layout")
CONSTANT_NAMES = frozenset({"instruction", "labels"})
ITEM_NAMES = CONSTANT_NAMES | {"input", "context", "choices", "slices"}
FILTERS = frozenset({"trim", "upper", "lower", "title", "capitalize", "join", "length", "first"})
FILTERS |= {"last", "default", "replace", "indent", "tojson"}
MAX_FILE_BYTES = 100_000
MAX_CHARACTERS = 200_000  # of one rendered section
MAX_LOOP_DEPTH = 2

ALLOWED_NODES = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.Name,
    nodes.Const,
    nodes.For,
    nodes.If,
    nodes.CondExpr,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Filter,
    nodes.Keyword,
    nodes.Getattr,
    nodes.Getitem,
)
_HEADING = re.compile(r"#[ \t]+(.*?)[ \t]*#*[ \t]*")
_FENCE = re.compile(r"[ \t]*(```|~~~)")


@dataclass(kw_only=True, slots=True, frozen=True)
class Section:
    """The text of one section and the line of the file at which it starts."""

    text: str
    first_line: int


@dataclass(kw_only=True, slots=True, frozen=True)
class UserPrompt:
    """A checked prompt file; it is a prompt style: call it with an item and a context."""

    where: str
    sha256: str
    sections: dict[str, Section]
    templates: dict[str, jinja2.Template]
    shows_instruction: bool  # in system or layout; where not, it follows the system text
    slices: frozenset[str]  # names under `slices` that the layout reads
    sandbox: Sandbox = field(default_factory=Sandbox)

    def __call__(self, item: Item, context: PromptContext) -> Calls:
        """System and instruction, shots as turns, the item in the file's layout."""
        constants: dict[str, object] = {
            "labels": list(context.labels),
            "instruction": context.instruction,
        }
        instruction = self._render("instruction", constants, fallback=context.instruction)
        constants["instruction"] = instruction
        system = self._render("system", constants, fallback="")
        if not self.shows_instruction:
            system = f"{system}\n\n{instruction}".strip()

        def layout(shown: Item) -> str:
            self._refuse_missing_slices(shown)
            values = {
                **constants,
                "input": shown.input,
                "context": shown.context or "",
                "choices": list(shown.choices),
                "slices": dict(shown.slices),
            }
            return self._render("layout", values, fallback=item_text(shown))

        answer = yield Ask(
            conversation(
                item,
                system=system,
                shots=context.shots,
                answer_word=context.answer_word,
                layout=layout,
            )
        )
        return answer

    def _render(self, name: str, values: Mapping[str, object], *, fallback: str) -> str:
        if name not in self.templates:
            return fallback
        try:
            text = self.sandbox.run(self.templates[name], values).strip()
            if len(text) > MAX_CHARACTERS:
                raise TemplateFault(f"it makes {len(text)} characters")
        except TemplateFault as fault:
            raise _refusal(self.where, fault.reason, self.sections[name], fault.line) from None
        return text

    def _refuse_missing_slices(self, item: Item) -> None:
        absent = sorted(self.slices - item.slices.keys())
        if absent:
            raise DataError(
                f"item {item.id}",
                found=f"no value for slices.{absent[0]}, which {self.where} prints",
                expected=f"one of the item's slices: {', '.join(sorted(item.slices)) or 'none'}",
                remedy=f"fill the column {absent[0]} in, or take the placeholder out",
            )


def load_user_prompt(path: Path, *, key: str = "arms.*.prompt") -> UserPrompt:
    """Read and check a prompt file.

    Raises:
        ConfigError: the file is missing, too large, no UTF-8, has no or unknown sections, unknown
            placeholders, or asks for more than a prompt needs; with file and line.
    """
    sections = split_sections(_read(path, key=key), where=str(path))
    sandbox = Sandbox()
    templates: dict[str, jinja2.Template] = {}
    shows_instruction = False
    slices: set[str] = set()
    for name, section in sections.items():
        allowed = ITEM_NAMES if name == "layout" else CONSTANT_NAMES
        try:
            tree = sandbox.parse(section.text)
            used = _checked(tree, allowed)
            templates[name] = sandbox.template(tree)
        except TemplateFault as fault:
            raise _refusal(str(path), fault.reason, section, fault.line) from None
        except FAULTS as error:
            line = getattr(error, "lineno", None)
            raise _refusal(str(path), str(error), section, line) from None
        shows_instruction |= name != "instruction" and "instruction" in used
        slices |= {n.attr for n in tree.find_all(nodes.Getattr) if _is_name(n.node, "slices")}
        if name == "layout" and "input" not in used:
            raise _refusal(str(path), "a layout without {{ input }}", section, None)
    return UserPrompt(
        where=str(path),
        sha256=sha256_of_file(path),
        sections=sections,
        templates=templates,
        shows_instruction=shows_instruction,
        slices=frozenset(slices),
        sandbox=sandbox,
    )


def split_sections(text: str, *, where: str) -> dict[str, Section]:
    """Section name -> text, in the file's order; headings inside code fences are text."""
    lines = text.splitlines()
    starts: list[tuple[str, int]] = []
    is_fenced = False
    for number, line in enumerate(lines, start=1):
        is_fenced ^= _FENCE.match(line) is not None
        heading = None if is_fenced else _HEADING.fullmatch(line)
        if heading is None:
            if line.strip() and not starts:
                raise _bad_heading(where, number, found=f"text before the first section: {line!r}")
            continue
        name = heading[1].lower()
        if name not in SECTIONS or name in dict(starts):
            again = "a second" if name in SECTIONS else "the"
            raise _bad_heading(where, number, found=f"{again} heading {line.strip()!r}")
        starts.append((name, number))
    if not starts:
        raise _bad_heading(where, 1, found="no section")
    ends = [number - 1 for _, number in starts[1:]] + [len(lines)]
    sections = {
        name: Section(text="\n".join(lines[start:end]), first_line=start + 1)
        for (name, start), end in zip(starts, ends, strict=True)
    }
    for name, start in starts:
        if not sections[name].text.strip():
            raise _bad_heading(where, start, found=f"nothing under # {name}")
    return sections


def _checked(tree: nodes.Template, allowed: frozenset[str]) -> set[str]:
    """The placeholders of a template that holds nothing but what a prompt needs."""
    bound = {"loop"} | {
        target.name for loop in tree.find_all(nodes.For) for target in _targets(loop)
    }
    used: set[str] = set()
    for node, depth in _walk(tree, 0):
        _refuse_node(node, depth, bound | allowed)
        if isinstance(node, nodes.Name) and node.name not in bound:
            used.add(node.name)
    return used


def _walk(node: nodes.Node, depth: int) -> Iterator[tuple[nodes.Node, int]]:
    yield node, depth
    inner = depth + isinstance(node, nodes.For)
    for child in node.iter_child_nodes():
        yield from _walk(child, inner)


def _targets(loop: nodes.For) -> list[nodes.Name]:
    return [loop.target] if isinstance(loop.target, nodes.Name) else []


def _refuse_node(node: nodes.Node, depth: int, names: set[str] | frozenset[str]) -> None:
    problem = None
    if not isinstance(node, ALLOWED_NODES):
        problem = f"{type(node).__name__.lower()}, which a prompt file cannot use"
    elif isinstance(node, nodes.Name) and node.name not in names:
        known = ", ".join(sorted(names - {"loop"}))
        problem = f"an unknown placeholder {node.name!r}; known here: {known}"
    elif isinstance(node, nodes.Filter) and node.name not in FILTERS:
        problem = f"the filter {node.name!r}; known: {', '.join(sorted(FILTERS))}"
    elif isinstance(node, nodes.Getattr):
        is_plain = _is_name(node.node, "slices") or _is_name(node.node, "loop")
        if not is_plain or node.attr.startswith("_"):
            problem = f"the attribute {node.attr!r}; only slices.NAME and loop.index can be read"
    elif isinstance(node, nodes.Getitem) and not _is_plain_index(node):
        problem = "an index; labels[0] and choices[0] can be read, and slices.NAME"
    elif isinstance(node, nodes.For) and not _is_plain_loop(node, depth):
        problem = f"a loop; it can go over labels or choices, at most {MAX_LOOP_DEPTH} deep"
    if problem is not None:
        raise TemplateFault(problem, line=node.lineno)


def _is_plain_loop(loop: nodes.For, depth: int) -> bool:
    return (
        depth < MAX_LOOP_DEPTH
        and not loop.recursive
        and isinstance(loop.target, nodes.Name)
        and loop.target.name not in ITEM_NAMES
        and (_is_name(loop.iter, "labels") or _is_name(loop.iter, "choices"))
    )


def _is_plain_index(node: nodes.Getitem) -> bool:
    is_list = _is_name(node.node, "labels") or _is_name(node.node, "choices")
    return is_list and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, int)


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _read(path: Path, *, key: str) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            key,
            found=f"{path}: {error.strerror}",
            expected="a prompt file that can be read",
            remedy="write the path from the current directory, or an absolute one",
        ) from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(
            str(path), found=f"{len(raw)} bytes", expected=f"at most {MAX_FILE_BYTES}"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            str(path), found=f"byte {error.start} is no UTF-8", expected="text in UTF-8"
        ) from None


def _bad_heading(where: str, line: int, *, found: str) -> ConfigError:
    return ConfigError(
        f"{where}:{line}",
        found=found,
        expected="sections headed # system, # instruction and # layout, each at most once",
        remedy="write ## for headings of your own",
    )


def _refusal(where: str, reason: str, section: Section, line: int | None) -> ConfigError:
    return ConfigError(
        f"{where}:{section.first_line + (line or 1) - 1}",
        found=reason,
        expected="text with placeholders like {{ input }}, if, and for over labels or choices",
        remedy="see the head of evaluation/prompts/user_prompt.py for what a prompt file can hold",
    )
