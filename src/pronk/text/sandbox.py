"""Runs Jinja templates that came with a model: untrusted programs, kept small and harmless.

Jinja's immutable sandbox keeps a template away from Python's internals. What it does not bound is
added here: every loop pass, macro call, filter, call, operator and printed value is charged to a
`Meter` by the size of what it makes, before it is made where that can be much more than what went
in. What is compared, hashed or written out is charged with all that is in it, as often as it is in
it: few steps nest lists so that they hold one another billions of times. So a template neither
runs for long nor fills the memory. The dialect is the one of Hugging Face chat templates. What is
rendered, and what becomes of it, is in template.py.
"""

import json
import re
import string
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from types import BuiltinMethodType
from typing import Any, cast

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
_MAX_BITS = 100_000  # of an integer
_MAX_SECONDS = 10.0
_MAX_WIDTH = 1000  # of a field of a format
_MAX_DEPTH = 500  # of nested lists; Python's own hash of tuples would overflow its stack
_NUMBER = re.compile(r"\d+")
_PRINTF = re.compile(r"%(?:\(.*?\))?([-#0 +*.\d]*)")
# Filter names that no template can spell.
_TICK, _CONCAT, _WEIGH, _WEIGH_KEYS = "charge a pass", "join text", "weigh", "weigh keys"
# Filters that look at the entries of a list only one by one, or not at all. All others may write
# out the whole of their input.
_BY_ENTRY = frozenset({"attr", "batch", "count", "d", "default", "first", "items", "last", "length",
                       "list", "map", "random", "reject", "rejectattr", "reverse", "select",
                       "selectattr", "slice", "sum"})  # fmt: skip
# Tests that look at more than the kind of a value.
_DEEP_TESTS = ("in", "lower", "upper", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan",
               ">=", "ge", "<", "lt", "lessthan", "<=", "le")  # fmt: skip
_HTML = ("pprint", "urlize", "wordwrap", "xmlattr")
_REFUSED_METHODS = frozenset({"encode", "expandtabs", "translate"})


class TemplateLimit(Exception):
    """A template did more than it may."""


class Meter:
    """What one rendering may still spend: one unit a step and one a character or list entry.

    `open` and `close` are put around the text of `{% generation %}` blocks; `shield` is a character
    that JSON text keeps as it is.
    """

    def __init__(self, budget: int, open: str, close: str, shield: str) -> None:
        self.left = budget
        self.deadline = time.monotonic() + _MAX_SECONDS
        self.open, self.close, self.shield = open, close, shield

    def charge(self, size: int) -> None:
        """Pay for a step that makes something of `size`."""
        self.left -= 1 + size
        if self.left < 0 or time.monotonic() > self.deadline:
            raise TemplateLimit("it runs too long or writes too much")

    def charge_text(self, value: object) -> int:
        """Pay for writing out or comparing `value` with all that is in it; how much that is."""
        size, depth, level = 0, 0, [value]
        while level and size <= self.left:
            if (depth := depth + 1) > _MAX_DEPTH:
                raise TemplateLimit("lists in lists are too deep")
            deeper: list[object] = []
            for item in level:
                size += 1 + _size(item)
                if size > self.left:
                    break
                deeper += _entries(item)
            level = deeper
        self.charge(size)
        return size


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
        meter.charge(len(piece))
        yield piece


def _entries(value: object) -> Iterable[object]:
    """What is in a container that Python compares and writes out with its entries."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, ItemsView):
        return [part for pair in value for part in pair]
    return value if isinstance(value, _CONTAINERS) else ()


_CONTAINERS = (list, tuple, set, frozenset, KeysView, ValuesView)


def _size(value: object) -> int:
    if isinstance(value, (str, bytes, range, ItemsView, dict, *_CONTAINERS)):
        return len(value)
    return value.bit_length() // 8 if isinstance(value, int) else 0


def _check_numbers(arguments: tuple[object, ...], named: Mapping[str, object]) -> None:
    for value in (*arguments, *named.values()):
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise TemplateLimit(f"the number {value:.6g} is too large for an argument")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox that also charges operators and calls."""

    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _charge_product(left, right)
        elif operator == "**" and not _bits(left) * abs(right) <= _MAX_BITS:
            raise TemplateLimit(f"the power {right} is too large")
        elif operator == "-":
            _meter.get().charge_text((left, right))  # also what two dictionaries do not share
        elif operator == "%" and isinstance(left, str):
            _check_numbers(right if isinstance(right, tuple) else (), {})
            _charge_format(left, _PRINTF.findall(left), right)
        result = super().call_binop(context, operator, left, right)
        _meter.get().charge(_size(result))
        return result

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_numbers(args, kwargs)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if name in _REFUSED_METHODS or isinstance(owner, bytes):
            raise TemplateLimit(f"the text method {name} is not available")
        if isinstance(owner, str):
            args = _charge_growth(name, owner, args)
        elif isinstance(obj, BuiltinMethodType) or name == "changed" or obj is _Namespace:
            _meter.get().charge_text((args, kwargs))  # they compare or hash what they are given
            if name in ("index", "count"):
                _meter.get().charge_text(owner)
        result = super().call(context, obj, *args, **kwargs)
        _meter.get().charge(_size(result))
        return result

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            _meter.get().charge_text(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's replacement of `str.format`, which is charged for what it writes."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        def charged(*args: Any, **kwargs: Any) -> str:
            text = value.__self__
            fields = [spec for *_, spec, _ in string.Formatter().parse(text) if spec is not None]
            _charge_format(text, fields, (*args, kwargs))
            return safe(*args, **kwargs)

        return charged


def _bits(value: object) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _charge_product(left: object, right: object) -> None:
    """Pay for `text * count` before it is built, and keep integers small."""
    if _bits(left) + _bits(right) > _MAX_BITS:
        raise TemplateLimit("a number is too large")
    for value, count in ((left, right), (right, left)):
        if isinstance(value, str | bytes | list | tuple) and isinstance(count, int):
            _meter.get().charge(len(value) * max(count, 0))


def _charge_format(text: str, fields: list[str], values: object) -> None:
    """Pay for each of the `fields` of a format, given by its flags, width and precision, as if it
    held all values."""
    shown = repr(text[:40])
    size = _meter.get().charge_text(values)
    for field in fields:
        if "*" in field or "{" in field:
            raise TemplateLimit(f"a width in the format {shown} is not written there")
        widths = [int(number[:9]) for number in _NUMBER.findall(field)]
        if any(width > _MAX_WIDTH for width in widths):
            raise TemplateLimit(f"a width in the format {shown} is over {_MAX_WIDTH}")
        _meter.get().charge(size + sum(widths))


def _charge_growth(name: str, text: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pay for what a method of `text` may write beyond its size; the arguments to call it with."""
    meter = _meter.get()
    if name == "replace" and len(args) > 1 and isinstance(args[0], str):
        meter.charge(text.count(args[0]) * _size(args[1]))
    elif name == "join" and args:
        entries = list(args[0])
        meter.charge_text(entries)
        meter.charge(len(text) * len(entries))
        args = (entries, *args[1:])
    return args


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

    def __repr__(self) -> str:
        return "<Namespace>"  # Jinja's writes out all that is in it


class _Metered(NodeTransformer):
    """Charges each pass of a loop or macro for itself and for the literal text inside, and puts
    charged filters in the place of the `~` operator, around what is compared, and around the keys
    of dictionaries."""

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

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter(node.expr, _WEIGH)
        for operand in node.ops:
            within = operand.op in ("in", "notin")
            operand.expr = _filter(operand.expr, _WEIGH_KEYS if within else _WEIGH)
        return node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = _filter(pair.key, _WEIGH)
        return node


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
    for name in _HTML:
        del environment.filters[name]
    environment.filters |= {"tojson": _tojson, "join": _join, "replace": _replace, "sum": _sum}
    for name, function in environment.filters.items():
        environment.filters[name] = _metered(name, function)
    environment.filters[_TICK] = _charge_pass
    environment.filters[_CONCAT] = _metered(_CONCAT, _concat)
    environment.filters |= {_WEIGH: _weigh, _WEIGH_KEYS: _weigh_keys}
    for name in _DEEP_TESTS:
        test = cast("Callable[..., bool]", environment.tests[name])
        environment.tests[name] = _weighed(test)
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
        _check_numbers(args[at + 1 :], kwargs)
        if name in _BY_ENTRY:
            meter.charge(_size(args[at]))
        else:
            meter.charge_text(args[at])
        if name == "format":
            text = str(args[at])
            _charge_format(text, _PRINTF.findall(text), (*args[at + 1 :], kwargs))
        elif name == "indent":
            lines = str(args[at]).count("\n") + 1
            meter.charge(lines * max(map(_width, (*args[at + 1 :], *kwargs.values())), default=0))
        result = function(*args, **kwargs)
        meter.charge(_size(result))
        return result

    return metered


def _width(value: object) -> int:
    return value if isinstance(value, int) else _size(value)


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's `join`, but of entries or of keys, not of dotted paths."""
    entries = [item if attribute is None else item[attribute] for item in value]
    texts = _charge_growth("join", str(d), (entries,))[0]
    return str(d).join(map(str, texts))


def _replace(s: Any, old: str, new: str, count: int | None = None) -> str:
    _charge_growth("replace", str(s), (old, new))
    return str(s).replace(old, new, -1 if count is None else count)


def _sum(iterable: Iterable[Any], attribute: str | None = None, start: float = 0) -> float:
    """Jinja's `sum`, of numbers only."""
    total = start + 0  # a TypeError for all but numbers
    for item in iterable:
        total += item if attribute is None else item[attribute]
    return total


@pass_context
def _charge_printed(context: Context, value: Any) -> Any:
    _meter.get().charge_text(value)
    return value


def _weigh(value: Any) -> Any:
    """`value`, paid for with all that is in it; text and numbers cost little to compare."""
    if isinstance(value, (dict, ItemsView, *_CONTAINERS)):
        _meter.get().charge_text(value)
    return value


def _weigh_keys(value: Any) -> Any:
    """The same for what something is looked for in: of a dictionary only the keys matter, and
    these have been paid for."""
    return value if isinstance(value, dict) else _weigh(value)


def _weighed(test: Callable[..., bool]) -> Callable[..., bool]:
    """A test that pays for what it compares."""

    @wraps(test)
    def weighed(*args: Any) -> bool:
        for value in args:
            _weigh(value)
        return test(*args)

    return weighed


def _charge_pass(literal: int) -> bool:
    _meter.get().charge(literal)
    return True


def _concat(parts: list[Any]) -> str:
    return "".join(map(str, parts))


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    _meter.get().charge_text(args)  # whose keys are hashed
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> None:
    _meter.get().charge_text(message)
    raise jinja2.TemplateError(str(message))


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
    if separators is not None and max(map(len, separators)) > 16:
        raise TemplateLimit("tojson: separators have at most 16 characters")
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    shield = _meter.get().shield
    return text.replace(json.dumps(shield)[1:-1], shield)
