"""Jinja's sandbox on a budget, for templates that come from strangers.

The sandbox is Jinja's immutable one (no attribute of Python's internals, no files, no imports). The budget: loop steps,
calls and the size of everything a template makes are paid for, in advance where one operation could make much out of
little (`'a' * 10**9`, `replace`, `join`, `**`). A template that runs out raises TooMuch; honest ones use a thousandth.
It works by rewriting the parsed template before it is compiled: loops, `~`, slices, filters, comparisons and literals
each pass through a private filter that pays (`Sandbox`).

Not offered, since no published chat template needs them and each is a way to make much out of little: `str.format`,
`%` on strings, padding methods, recursive loops, filters outside `FILTERS`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, do_join, do_replace
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEXT = 4_000_000  # characters of the rendered text, and of any text on the way
MAX_WORK = 128_000_000  # about the bytes that a rendering may make in all; bounds its memory and its steps
MAX_SECONDS = 1.0  # of processor time
MAX_BITS = 4096  # of an integer
STEP, ITEM = 128, 64  # work of a loop step, call, filter or comparison, and of one element of a list

FILTERS = """
    abs capitalize count d default dictsort e escape first float groupby indent int items join last length list lower
    map max min reject rejectattr replace reverse round safe select selectattr sort string tojson trim truncate unique
    upper
"""
SPREADING = ("list", "sort", "unique", "groupby", "dictsort")  # filters that hold all elements at once
TEXT_METHODS = """
    capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower
    isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind
    rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""

_CONTAINERS: tuple[type[Iterable[Any]], ...] = (
    list,
    tuple,
    dict,
    set,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


class Raised(Exception):
    """`raise_exception` was called."""


class TooMuch(Exception):
    """The template asked for more than its budget."""


# Whatever else a template can raise: its own errors and Python's, which its operations end in.
FAULTS = (
    TemplateError,
    ArithmeticError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    RecursionError,
    MemoryError,
)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words in some templates; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 -- Jinja's way to declare it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Pay(NodeTransformer):
    """Sends everything that can make much, or go on for long, through the private filters of `Sandbox`."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    def _through(self, name: str, node: Any) -> nodes.Filter:
        paid = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        paid.set_environment(self.environment)
        return paid

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise SecurityError("recursive loops are not offered")
        self.generic_visit(node)
        node.iter = self._through(" steps", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._through(" joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return self._through(" made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Call(self, node: nodes.Call) -> nodes.Call:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = self._through(" elements", node.dyn_args)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Filter:
        self.generic_visit(node)
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise SecurityError("'*' in a filter's arguments is not offered")
        if node.name in SPREADING and node.node is not None:
            node.node = self._through(" elements", node.node)
        return self._through(" made", node)

    def visit_comparison(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return self._through(" made", node)

    visit_Compare = visit_Test = visit_comparison

    def visit_literal(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        constant = all(isinstance(part, nodes.Const | nodes.Pair) for part in node.iter_child_nodes())
        stored = getattr(node, "ctx", "load") != "load"
        return node if stored or (constant and not isinstance(node, nodes.Dict)) else self._through(" made", node)

    visit_List = visit_Tuple = visit_Dict = visit_literal


class _PlainNamespace(Namespace):
    """Jinja's namespace without its contents in `repr`, which could name themselves over and over."""

    def __repr__(self) -> str:
        return "<Namespace>"


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox on a budget; `begin` refills it before each rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    text_methods = frozenset(TEXT_METHODS.split())

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        own: dict[str, Callable[..., Any]] = {"tojson": _tojson, "join": _join, "replace": _replace, "indent": _indent}
        paying: dict[str, Callable[..., Any]] = {
            " steps": _steps,
            " joined": _joined,
            " made": _made,
            " elements": _elements,
        }
        self.filters = {name: self.filters[name] for name in FILTERS.split()} | own | paying
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals |= {
            "namespace": _PlainNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime_now,
        }
        self.begin(None)

    def metered(self, source: str) -> Template:
        """Parses, rewrites and compiles a template."""
        template = self.from_string(_Pay(self).visit(self.parse(source)))
        template.globals = dict(template.globals)  # copied by each rendering, which is slow for Jinja's chain of maps
        return template

    def begin(self, today: datetime | None) -> None:
        """A full budget, and the date of this rendering."""
        self.today = today
        self.work = MAX_WORK
        self.deadline = time.thread_time() + MAX_SECONDS

    def pay(self, work: int) -> None:
        self.work -= work
        if self.work < 0:
            raise TooMuch("more steps or text than any conversation needs")

    def step(self) -> None:
        """Pays for one of the operations that may take long: only here the clock is read."""
        self.pay(STEP)
        if time.thread_time() > self.deadline:
            raise TooMuch(f"more than {MAX_SECONDS:g} s")

    def allow(self, characters: int) -> None:
        """Refuses a text before it is made."""
        if characters > MAX_TEXT:
            raise TooMuch(f"a text of {characters:,} characters, more than {MAX_TEXT:,}")

    def _allow_bits(self, bits: int) -> None:
        if bits > MAX_BITS:
            raise TooMuch(f"an integer of {bits:,} bits")

    def made(self, value: Any) -> Any:
        """Pays for a value, and returns it; a lazy one pays as it goes.

        A container counts with all that it holds, as often as it holds it: ten levels of a list that holds the level
        below ten times are 10^10 elements to whoever prints them.
        """
        if isinstance(value, str):
            self.allow(len(value))
            self.pay(len(value))
        elif isinstance(value, _CONTAINERS):
            self._weigh(value)
        elif isinstance(value, Iterator):
            return self.steps(value)
        elif isinstance(value, int):
            self._allow_bits(value.bit_length())
        return value

    def _weigh(self, value: Any) -> None:
        characters = elements = 0
        waiting: list[Any] = [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, str):
                characters += len(item)
                self.allow(characters)
            elif isinstance(item, dict):
                waiting.extend(item.keys())
                waiting.extend(item.values())
            elif isinstance(item, _CONTAINERS):
                waiting += item
            elements += 1
            if elements * ITEM > self.work:
                break
        self.pay(elements * ITEM)

    def steps(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values, each paid for when it is taken."""
        lazy = isinstance(values, Iterator)
        for value in values:
            self.step()
            yield self.made(value) if lazy else value

    def concat(self, parts: Iterable[str]) -> str:
        """What Jinja joins the output with, also that of macros and `{% set %}` blocks."""
        pieces, characters = [], 0
        for part in parts:
            characters += len(part)
            self.allow(characters)
            pieces.append(part)
        self.pay(characters)
        return "".join(pieces)

    def call(__self, __context: Context, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call in the template; the first two names are out of the way of its keywords, as in Jinja."""
        __self.step()
        owner = getattr(__function, "__self__", None)
        if isinstance(owner, str):
            args = __self._text_call(owner, __function.__name__, args)
        return __self.made(super().call(__context, __function, *args, **kwargs))

    def _text_call(self, owner: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pays for a method of a text in advance; returns the arguments, lazy ones read."""
        if name == "join" and args:
            args = (list(args[0]), *args[1:])
            self.allow(_joined_length(owner, args[0]))
        elif name == "replace" and len(args) > 1:
            self.allow(_replaced_length(owner, *args[:2]))
        elif name in ("split", "rsplit", "splitlines"):
            separator = args[0] if args and isinstance(args[0], str) else None
            self.pay(ITEM * (owner.count(separator) + 1 if separator else len(owner) // 2))
        return args

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):  # what templates do most
            self.allow(len(left) + len(right))
            return self.made(left + right)
        if operator == "%" and isinstance(left, str):
            raise SecurityError("'%' on a text is not offered")
        elif operator == "*":
            self._check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._allow_bits(left.bit_length() * abs(right))
        return self.made(super().call_binop(context, operator, left, right))

    def _check_product(self, left: Any, right: Any) -> None:
        for many, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(many, str):
                self.allow(len(many) * times)
            elif isinstance(times, int) and isinstance(many, list | tuple):
                self.pay(max(len(many) * times, 0) * ITEM)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in self.text_methods
        return not isinstance(obj, (int, float)) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is no text method here, so there is none to wrap."""

    def _strftime_now(self, form: str) -> str:
        self.allow(len(form) * 256)  # what one "%c" can become
        return (self.today or datetime.now()).strftime(form)


def _raise_exception(message: object) -> None:
    raise Raised(message)


def _sandbox(context: Context) -> Sandbox:
    environment = context.environment
    assert isinstance(environment, Sandbox)
    return environment


@pass_context
def _steps(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    return _sandbox(context).steps(values)


@pass_context
def _made(context: Context, value: Any) -> Any:
    _sandbox(context).step()
    return _sandbox(context).made(value)


@pass_context
def _elements(context: Context, values: Any) -> Any:
    if isinstance(values, Sized):
        _sandbox(context).pay(len(values) * ITEM)
    return values


@pass_context
def _joined(context: Context, parts: list[Any]) -> str:
    return _sandbox(context).concat(map(str, parts))


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates want it: no HTML escapes, text as it is."""
    if isinstance(indent, int) and indent > 16:
        raise TooMuch(f"an indent of {indent} spaces")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _joined_length(separator: str, parts: list[Any]) -> int:
    return len(separator) * len(parts) + sum(len(part) for part in parts if isinstance(part, str))


def _replaced_length(text: str, old: object, new: object) -> int:
    return len(text) + text.count(str(old)) * len(str(new))


@pass_context
def _join(context: Context, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    parts = list(values)
    _sandbox(context).allow(_joined_length(str(separator), parts))
    return do_join(context.eval_ctx, parts, separator, attribute)


@pass_context
def _replace(context: Context, text: str, old: str, new: str, count: int | None = None) -> str:
    _sandbox(context).allow(_replaced_length(str(text), old, new))
    return do_replace(context.eval_ctx, text, old, new, count)


@pass_context
def _indent(context: Context, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = len(width) if isinstance(width, str) else width
    _sandbox(context).allow(len(text) + (text.count("\n") + 1) * margin)
    return do_indent(text, width, first, blank)
