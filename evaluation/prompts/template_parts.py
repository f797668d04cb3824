"""The parts of a sandboxed template: its undefined values, blocks, namespaces and charges."""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.utils import Namespace, missing
from jinja2.visitor import NodeTransformer


class Missing(Undefined):
    """A missing field of a message is an error when printed; a missing name prints as nothing.

    Templates do test `message.tool_calls` and print `bos_token` where a tokenizer has none, so
    jinja2's StrictUndefined would refuse good ones.
    """

    def __str__(self) -> str:
        if self._undefined_obj is not missing:
            self._fail_with_undefined_error()
        return super().__str__()


class GenerationBlocks(Extension):
    """`{% generation %}` marks the assistant's text in some templates; here it prints its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Meter(NodeTransformer):
    """Puts a charge at the start of every loop pass and macro, and `~` under the budget."""

    def _metered(self, node: nodes.For | nodes.Macro | nodes.Block) -> nodes.Node:
        self.generic_visit(node)
        static = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        call = nodes.Call(
            nodes.EnvironmentAttribute("spend"), [nodes.Const(1 + static)], [], None, None
        )
        node.body.insert(0, nodes.ExprStmt(call))
        return node

    visit_For = visit_Macro = visit_Block = _metered

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`a ~ b` as a call that charges before it joins."""
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None)

    def _built(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        """Lists of lists are charged in full, so that none doubles at every step."""
        self.generic_visit(node)
        if isinstance(node, nodes.Tuple) and node.ctx != "load":
            return node
        return nodes.Call(nodes.EnvironmentAttribute("built"), [node], [], None, None)

    visit_List = visit_Tuple = visit_Dict = _built


class PlainNamespace(Namespace):
    """`namespace()` without underscore names, which could reach the interpreter's own."""

    def __init__(*args: Any, **values: Any) -> None:
        self = args[0]
        attributes = dict(*args[1:], **values)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        """Its values are not shown: a namespace can hold others, and they print as nothing here."""
        return "<namespace>"


def _refuse_underscore(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"{name!r} cannot be stored on a namespace")
