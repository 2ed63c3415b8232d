"""Runs Jinja templates that came with a model: untrusted programs, kept small and harmless.

Jinja's immutable sandbox keeps a template away from Python's internals. What it does not bound is
added here: every loop pass, macro call, filter, call, operator and printed value is charged to a
`Meter`, so that a template neither runs forever nor fills the memory. The dialect is the one of
Hugging Face chat templates. What is rendered, and what becomes of it, is in template.py.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jinja2
from jinja2 import meta, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from pronk.core.errors import UserError

MAX_SOURCE = 1 << 18
"""Characters of a template; the largest published ones have about 30,000."""

_MAX_NUMBER = 100_000  # of a width, a count, a range: what such an argument may be at most
_WIDE = re.compile(r"\d{6}")
_TICK, _CONCAT = "charge a pass", "join text"  # filter names that no template can spell


class TemplateLimit(Exception):
    """A template did more than it may."""


@dataclass(slots=True)
class Meter:
    """What one rendering may still spend: one unit a step and one a character or list entry.

    `open` and `close` are put around the text of `{% generation %}` blocks; `shield` is a character
    that JSON text keeps as it is.
    """

    left: int
    open: str
    close: str
    shield: str

    def charge(self, value: object) -> None:
        """Pay for a step and for the size of its result."""
        self.left -= 1 + _size(value)
        if self.left < 0:
            raise TemplateLimit("it runs too long or writes too much")


_meter: ContextVar[Meter] = ContextVar("pronk_template_meter")


@dataclass(frozen=True, slots=True)
class SandboxedTemplate:
    """A compiled template."""

    template: jinja2.Template
    variables: frozenset[str]
    """Names that the template reads without setting them."""
    marks_generation: bool
    """Whether it has `{% generation %}` blocks."""

    def render(self, variables: Mapping[str, Any], meter: Meter) -> str:
        """The text; UserError, in one line, for whatever goes wrong in the template."""
        token = _meter.set(meter)
        try:
            return "".join(_charged(self.template.generate(variables), meter))
        except Exception as error:  # a template can raise anything
            raise template_error(error) from None
        finally:
            _meter.reset(token)


def compile_template(source: str) -> SandboxedTemplate:
    """Compile a chat template; UserError if it is too long or no valid Jinja."""
    if len(source) > MAX_SOURCE:
        raise UserError(
            f"chat template: {len(source)} characters; templates over {MAX_SOURCE} are refused"
        )
    try:
        environment = _environment()
        tree = environment.parse(source)
        variables = frozenset(meta.find_undeclared_variables(tree))
        marks = tree.find(nodes.ExtensionAttribute) is not None  # only `_Generation` makes them
        template = environment.from_string(_Metered().visit(tree))
    except Exception as error:  # also RecursionError and what compiling the generated code raises
        raise template_error(error) from None
    return SandboxedTemplate(template, variables, marks)


def template_error(error: Exception) -> UserError:
    """One line that says what a template did wrong."""
    line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
    known = isinstance(error, jinja2.TemplateError | TemplateLimit)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return UserError(f"chat template: {line}{text if len(text) <= 300 else text[:297] + '...'}")


def _charged(pieces: Iterator[str], meter: Meter) -> Iterator[str]:
    for piece in pieces:
        meter.charge(piece)
        yield piece


def _size(value: object) -> int:
    if isinstance(value, str | list | tuple | dict | range):
        return len(value)
    return value.bit_length() // 8 if isinstance(value, int) else 0


def _check_numbers(arguments: tuple[object, ...], named: Mapping[str, object]) -> None:
    for value in (*arguments, *named.values()):
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise TemplateLimit(f"the number {value:.6g} is too large for an argument")


def _check_format(text: object) -> None:
    """Refuse format strings whose widths would blow the text up."""
    if isinstance(text, str) and _WIDE.search(text):
        raise TemplateLimit(f"a width in the format {text[:40]!r} is too large")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox that also charges operators and calls."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _charge_repetition(left, right)
        elif operator == "**" and not abs(right) <= 64:
            raise TemplateLimit(f"the power {right} is too large")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_numbers(right if isinstance(right, tuple) else (), {})
        result = super().call_binop(context, operator, left, right)
        _meter.get().charge(result)
        return result

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_numbers(args, kwargs)
        result = super().call(context, obj, *args, **kwargs)
        _meter.get().charge(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        _check_format(getattr(value, "__self__", None) if callable(value) else None)
        return super().wrap_str_format(value)


def _charge_repetition(left: object, right: object) -> None:
    """Pay for `text * count` before it is built."""
    for value, count in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(count, int):
            _meter.get().left -= _size(value) * max(count, 0)
            _meter.get().charge(None)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what is inside is the assistant's."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Macro) -> str:
        meter = _meter.get()
        return meter.open + str(caller()) + meter.close


class _Namespace(Namespace):
    """Jinja's namespace without attributes that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is refused")
        super().__setitem__(name, value)


class _Metered(NodeTransformer):
    """Charges each pass of a loop or macro for itself and for the literal text inside, and puts
    a charged filter in the place of the `~` operator."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_tick(node), node.test)
        node.body.insert(0, nodes.ExprStmt(_tick(node)))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_tick(node)))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_tick(node)))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), _CONCAT)


def _tick(node: nodes.Node) -> nodes.Expr:
    literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    return _filter(nodes.Const(literal), _TICK)


def _filter(value: nodes.Expr, name: str) -> nodes.Expr:
    return nodes.Filter(value, name, [], [], None, None)


def _environment() -> _Environment:
    # Not optimized: folding constants would run template code outside of any meter.
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=_charge_printed,
        extensions=[_Generation, loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    for name, function in environment.filters.items():
        environment.filters[name] = _metered(name, function)
    environment.filters[_TICK] = _charge_pass
    environment.filters[_CONCAT] = _metered(_CONCAT, _concat)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["namespace"] = _Namespace
    environment.globals["dict"] = _dict
    del environment.globals["lipsum"]
    return environment


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for its input and its result."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0  # before it stands Jinja's context

    @wraps(function)  # which also keeps Jinja's mark on it
    def metered(*args: Any, **kwargs: Any) -> Any:
        meter = _meter.get()
        meter.charge(args[at])
        _check_numbers(args[at + 1 :], kwargs)
        if name == "format":
            _check_format(args[at])
        result = function(*args, **kwargs)
        meter.charge(result)
        return result

    return metered


@pass_context
def _charge_printed(context: Context, value: Any) -> Any:
    _meter.get().charge(value)
    return value


def _charge_pass(literal: int) -> bool:
    meter = _meter.get()
    meter.left -= literal
    meter.charge(None)
    return True


def _concat(parts: list[Any]) -> str:
    return "".join(map(str, parts))


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON as Hugging Face's filter writes it; Jinja's own escapes HTML and sorts."""
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateLimit(f"tojson: the indent {indent} is not between 0 and 16")
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    shield = _meter.get().shield
    return text.replace(json.dumps(shield)[1:-1], shield)
