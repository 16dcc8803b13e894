"""Render conversations as the tokenizer's `apply_chat_template` does, in a fraction of its time.

The compiled template and its sandbox are the library's. What is saved: copies of messages and
variables for each call, questions to the sandbox that were answered before (a quarter of the time
of Gemma's template), and tool declarations and arguments of calls that were written before (another
third, of rows with tools, which have the same few declarations).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from canvastune.preparation.conversation import Conversation

_IMPURE = frozenset(  # they answer otherwise from call to call
    {"strftime_now", "lipsum", "cycler", "joiner", "caller", "varargs", "kwargs"}
)
_SCOPES = frozenset({"_loop_vars", "_block_vars"})  # what compiled calls add to their arguments


class _CachingSandbox(ImmutableSandboxedEnvironment):
    """The sandbox of chat templates, which remembers its answers.

    Whether an attribute is safe depends on its name and the type of its owner. What a pure macro
    writes of a tool declaration, or of a call's arguments, depends on these.
    """

    safe: dict[tuple[type, str], bool]
    pure: frozenset[str]
    written: dict[int, dict[str, Any]]
    """What macros, by their name, wrote of each tool and of each call's arguments, by its id()."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = (type(obj), attr)
        known = self.safe.get(key)
        if known is None:
            known = self.safe[key] = super().is_safe_attribute(obj, attr, value)
        return known

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The names are the base class's: what a template passes may have any other.
        if (
            type(__obj) is not Macro
            or __obj.name not in __self.pure
            or len(args) != 1
            or id(args[0]) not in __self.written
            or not kwargs.keys() <= _SCOPES
        ):
            return super().call(__context, __obj, *args, **kwargs)
        written = __self.written[id(args[0])]
        if __obj.name not in written:
            written[__obj.name] = super().call(__context, __obj, *args, **kwargs)
        return written[__obj.name]


class TemplateRenderer:
    """Renders batches of conversations by one chat template."""

    def __init__(self, template: str, special_tokens: Mapping[str, Any]) -> None:
        """Prepare to render.

        Args:
            template: its source.
            special_tokens: variables of the template, as `bos_token`.
        """
        self._source = template
        self._special_tokens = dict(special_tokens)

    def render(
        self, conversations: Sequence[Conversation], *, generation: bool = False
    ) -> list[str]:
        """Render whole conversations, or the prompts for their last turns.

        Raises:
            Exception: whatever the template raises.
        """
        self._remember(conversations)
        return self._render(conversations, generation)

    def render_both(self, conversations: Sequence[Conversation]) -> tuple[list[str], list[str]]:
        """Render the prompts for the last turns, and the whole conversations.

        Raises:
            Exception: whatever the template raises.
        """
        self._remember(conversations)
        return self._render(conversations, True), self._render(conversations, False)

    def _remember(self, conversations: Sequence[Conversation]) -> None:
        # By identity: a hash of a declaration would cost more than to write it. All of them live
        # until the batch ends.
        _, sandbox = _compile(self._source)
        sandbox.written = {id(tool): {} for each in conversations for tool in each.tools}
        for each in conversations:
            if not each.is_plain:
                for message in each.messages:
                    for call in message.get("tool_calls", ()):
                        sandbox.written[id(call["function"]["arguments"])] = {}

    def _render(self, conversations: Sequence[Conversation], generation: bool) -> list[str]:
        template, sandbox = _compile(self._source)
        known = dict(template.globals)  # a ChainMap: each context would go through all of its maps
        variables = {
            **known,
            **self._special_tokens,
            "tools": None,
            "documents": None,
            "add_generation_prompt": generation,
        }
        rendered = []
        for each in conversations:
            found = {**variables, "messages": each.history if generation else list(each.messages)}
            if each.tools:
                found["tools"] = list(each.tools)
            if each.thinking:
                found["enable_thinking"] = True
            context = Context(sandbox, found, template.name, template.blocks, known)
            rendered.append("".join(template.root_render_func(context)))
        return rendered


@functools.cache
def _compile(source: str) -> tuple[jinja2.Template, _CachingSandbox]:
    sandbox = _compile_jinja_template(source).environment.overlay()
    sandbox.__class__ = _CachingSandbox
    sandbox.safe, sandbox.written = {}, {}
    sandbox.pure = _pure_macros(sandbox, source)
    return sandbox.from_string(source), sandbox


def _pure_macros(sandbox: jinja2.Environment, source: str) -> frozenset[str]:
    """Return the template's macros whose text depends on their arguments only: they read nothing
    but these, what they assign before, constants, and other pure macros.
    """
    tree = sandbox.parse(source)
    names = [macro.name for macro in tree.find_all(nodes.Macro)]
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    known = frozenset(sandbox.globals) - _IMPURE
    reads: dict[str, set[str]] = {}
    for macro in tree.body:
        if (
            isinstance(macro, nodes.Macro)
            and names.count(macro.name) == 1
            and macro.name not in assigned
            and not any(found.name == "random" for found in macro.find_all(nodes.Filter))
        ):
            arguments = {argument.name for argument in macro.args}
            reads[macro.name] = _read_from_outside(macro.body, known | arguments)
            reads[macro.name] |= set().union(*map(_names, macro.defaults)) - known
    while impure := {name for name, read in reads.items() if not read <= reads.keys()}:
        for name in impure:
            del reads[name]
    return frozenset(reads)


def _read_from_outside(body: Sequence[nodes.Node], known: frozenset[str]) -> set[str]:
    """Return the names that statements may read before they assign them; of a statement that is not
    looked into, one that no macro has.
    """
    found: set[str] = set()
    for node in body:
        if isinstance(node, nodes.Output):
            found |= _names(node) - known
        elif isinstance(node, nodes.Assign):
            found |= _names(node.node) - known
            if isinstance(node.target, nodes.Name):
                known |= {node.target.name}
            else:  # an attribute of a namespace
                found |= _names(node.target) - known
        elif isinstance(node, nodes.If):
            found |= _names(node.test) - known
            branches: list[Sequence[nodes.Node]] = [node.body, node.elif_, node.else_]
            for branch in branches:
                found |= _read_from_outside(branch, known)  # what a branch assigns may stay unset
        elif isinstance(node, nodes.For):
            inside = known | _names(node.target) | {"loop"}
            found |= _names(node.iter) - known
            found |= _names(node.test) - inside if node.test else set()
            found |= _read_from_outside(node.body, inside)
            found |= _read_from_outside(node.else_, known)
        else:
            found.add(f"a statement {type(node).__name__}")
    return found


def _names(node: nodes.Node) -> set[str]:
    """Return the variables in an expression, itself included, and namespaces that it writes to."""
    inside = nodes.Output([node])
    variables = {name.name for name in inside.find_all(nodes.Name)}
    return variables | {name.name for name in inside.find_all(nodes.NSRef)}
