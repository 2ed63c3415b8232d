"""JSON schemas before they become grammars: only what will be enforced passes.

llguidance enforces most of JSON Schema, but not everything that it lets pass: it knows keywords by
draft, loses digits of large numbers, has every February with 29 days, and takes more memory, time
or stack than there is for schemas that were made to hurt. Here a schema is read as a whole, all
drafts together. What cannot be enforced is refused with a JSON pointer to the keyword; what would
be enforced only loosely is written anew, never wider than the schema; annotations are left alone.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from pronk.core.errors import UserError
from pronk.text.schema_nodes import (
    BOUNDS,
    drop_what_says_nothing,
    fine_grid,
    off_the_bounds,
    put_behind,
    ref_levels,
    subschemas,
    types_of,
)
from pronk.text.schema_parts import (
    COUNTS,
    FORMATS,
    SHAPES,
    check_constant,
    check_pattern,
    decimal,
    disjoint,
)

REFUSED = frozenset({
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems",
    "propertyNames", "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems",
    "unevaluatedProperties", "$dynamicRef", "$recursiveRef", "extends", "disallow", "divisibleBy",
})  # fmt: skip
"""Keywords of any draft that constrain and that no grammar here can keep to."""

_MAX_TEXT = 1_000_000
_MAX_DEPTH = 64
_MAX_REF_LEVELS = 500  # llguidance recurses through references, on a stack of 8 MB
_MAX_OPTIONS = 1000
_MAX_PROPERTIES = 1000
_MAX_PATTERNS = 32  # each is compared with each
_MAX_ENUM = 20_000
_MAX_COUNT = 1_000_000
_MAX_MULTIPLE = 10_000  # an automaton of so many states
_MAX_MULTIPLES = 50_000  # all together
_EXACT = 2**53  # whole numbers that a double holds
_MAX_BOUND = 2**63 - 1024  # the largest double that fits a signed 64-bit integer
_FEW = 100  # more bounds of 64 bits would take too much of a grammar's size
_COMBINING = ("allOf", "anyOf", "oneOf", "$ref")


def enforceable(schema: Mapping[str, Any] | bool, where: str = "schema") -> dict[str, Any]:
    """The schema as llguidance enforces it: every answer that it then admits, the schema admits.
    Raises UserError for what is no schema, too large or cannot be enforced, with its place."""
    try:
        text = json.dumps(schema, allow_nan=False)
        if len(text) > _MAX_TEXT:
            raise UserError(f"{where}: a schema of {len(text)} characters; at most {_MAX_TEXT}")
        root = json.loads(text)  # a copy, with keys that are texts
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON schema: {error}") from None
    if root is True:
        return {}
    if root is False:
        raise UserError(f"{where}: false admits no answer")
    if not isinstance(root, dict):
        raise UserError(f"{where}: {schema!r:.60} is not a JSON schema")
    root.pop("x-guidance", None)  # llguidance would take its options from it
    _Schema(root, where).check()
    return root


class _Schema:
    """A schema that is being read, and changed in place."""

    def __init__(self, root: dict[str, Any], where: str) -> None:
        self._root = root
        self._where = where
        self._seen: dict[int, tuple[dict[str, Any], str]] = {}
        self._todo: list[tuple[Any, str]] = [(root, "#")]
        self._refs: dict[str, Any] = {}
        self._multiples: list[tuple[str, int, int]] = []
        self._integers: list[dict[str, Any]] = []
        self._combined = False

    def check(self) -> None:
        while self._todo:
            self._read(*self._todo.pop(), 0)
        levels = sum(map(ref_levels, [self._root, *self._refs.values()]))
        if levels > _MAX_REF_LEVELS:
            raise self._no("#", f"references nested up to {levels} deep; {_MAX_REF_LEVELS} work")
        self._check_loops()
        self._check_endings()
        self._check_multiples()
        for node in self._integers if len(self._integers) <= _FEW else ():
            node.setdefault("minimum", -_MAX_BOUND)  # a model may like digits for ever
            node.setdefault("maximum", _MAX_BOUND)
        for node, at in self._seen.values():
            if "oneOf" in node:
                self._one_of(node, at)
            if not self._combined:
                fine_grid(node)

    def _no(self, at: str, why: str) -> UserError:
        at = at if len(at) <= 200 else f"{at[:120]}...{at[-60:]}"
        return UserError(f"{self._where}: {at}: {why}")

    def _read(self, node: Any, at: str, depth: int) -> None:
        if isinstance(node, bool):
            return
        if not isinstance(node, dict):
            raise self._no(at, f"{node!r:.60} is not a schema")
        if id(node) in self._seen:
            return
        if depth > _MAX_DEPTH:
            raise self._no(at, f"nested more than {_MAX_DEPTH} deep")
        self._seen[id(node)] = (node, at)
        if at != "#" and isinstance(node.get("$id"), str):
            raise self._no(f"{at}/$id", "only the whole schema may have one")
        node.pop("$schema", None)  # it would make llguidance skip what other drafts define
        drop_what_says_nothing(node)
        for key in node:
            if key in REFUSED:
                raise self._no(f"{at}/{key}", "this keyword cannot be enforced")
        self._values(node, at)
        self._numbers(node, at)
        self._format(node, at)
        self._array(node, at)
        self._object(node, at)
        for sub, name in subschemas(node):
            self._read(sub, f"{at}/{name}", depth + 1)
        if "$ref" in node and node["$ref"] not in self._refs:
            target = self._target(node["$ref"], f"{at}/$ref")
            self._refs[node["$ref"]] = target[0]
            self._todo.append(target)
        n_constraining = sum(key in node for key in _COMBINING) + (len(node) > 1)
        self._combined |= n_constraining > 1 or "allOf" in node

    def _values(self, node: dict[str, Any], at: str) -> None:
        """Keywords that need only be what they should be."""
        for key, (right, what) in SHAPES.items():
            if key in node and not right(node[key]):
                raise self._no(f"{at}/{key}", f"{node[key]!r:.60} is not {what}")
        for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            most = 300 if key == "oneOf" else _MAX_OPTIONS  # each is compared with each
            if len(node.get(key, ())) > most:
                raise self._no(f"{at}/{key}", f"more than {most} schemas")
        for key in ("minLength", "minItems", "minProperties"):
            if node.get(key, 0) > _MAX_COUNT:
                raise self._no(f"{at}/{key}", f"no answer is that long; at most {_MAX_COUNT}")
        for key in ("maxLength", "maxItems", "maxProperties"):
            if node.get(key, 0) > _MAX_COUNT:
                del node[key]  # nor that long
        for key in COUNTS & node.keys():
            node[key] = int(node[key])  # 3.0 is a count
        if "pattern" in node and (why := check_pattern(node["pattern"])):
            raise self._no(f"{at}/pattern", f"{node['pattern']!r:.60}: {why}")
        if "const" in node and (why := check_constant(node["const"])):
            raise self._no(f"{at}/const", why)
        values = node.get("enum", [])
        if len(values) > _MAX_ENUM or sum(isinstance(v, dict | list) for v in values) > 500:
            raise self._no(f"{at}/enum", f"more than {_MAX_ENUM} values, or 500 objects and lists")
        for i, value in enumerate(values):
            if why := check_constant(value):
                raise self._no(f"{at}/enum/{i}", why)

    def _numbers(self, node: dict[str, Any], at: str) -> None:
        for key, exclusive, sign in BOUNDS:
            if node.get(exclusive) is False:  # draft 4 says which kind a bound is
                del node[exclusive]
            elif node.get(exclusive) is True:
                node[exclusive] = node.pop(key, None)
                if node[exclusive] is None:
                    del node[exclusive]
            for name in (key, exclusive):
                if name in node:
                    self._bound(node, at, key, name, sign)
        off_the_bounds(node)
        if types_of(node) & {"integer", "number"} == {"integer"} and "multipleOf" not in node:
            self._integers.append(node)
        if "multipleOf" in node:
            step = decimal(abs(node["multipleOf"]))
            if step is None or not 0 < step[0] <= _MAX_MULTIPLE:
                raise self._no(
                    f"{at}/multipleOf",
                    f"multiples of {node['multipleOf']!r} cannot be enforced; those of whole"
                    f" numbers up to {_MAX_MULTIPLE} can, and of 0.1, 0.01, 0.5 and the like",
                )
            self._multiples.append((f"{at}/multipleOf", *step))
            if sum(factor for _, factor, _ in self._multiples) > _MAX_MULTIPLES:
                raise self._no(f"{at}/multipleOf", "too large together with the other multiples")

    def _bound(self, node: dict[str, Any], at: str, key: str, name: str, sign: int) -> None:
        """A bound beyond what doubles hold exactly becomes the next one that they do hold, inwards:
        `sign` 1 for a lower bound, -1 for an upper one."""
        value = node[name]
        try:
            bound = float(value)
        except OverflowError:
            bound = math.copysign(math.inf, value)
        if abs(value) <= _EXACT:
            return
        if bound * sign > _MAX_BOUND:
            raise self._no(f"{at}/{name}", f"{value!r:.60}: a bound beyond 64 bits")
        bound = max(-_MAX_BOUND * 1.0, bound * sign) * sign
        if bound * sign < value * sign or (name != key and bound == value):
            bound = math.nextafter(bound, sign * math.inf)
        del node[name]
        other = node.get(key)
        node[key] = int(bound) if other is None else sign * max(int(bound) * sign, other * sign)

    def _format(self, node: dict[str, Any], at: str) -> None:
        name = node.get("format")
        if name is None:
            return
        if "string" not in types_of(node) or name in ("password", "binary"):
            del node["format"]  # says nothing of JSON
            return
        if name not in FORMATS:
            raise self._no(f"{at}/format", f"{name!r} cannot be enforced; {', '.join(FORMATS)} can")
        pattern, longest = FORMATS[name]
        if longest is not None:
            node["maxLength"] = min(longest, node.get("maxLength", longest))
        if pattern is not None:
            del node["format"]
            if "pattern" in node:
                node["allOf"] = [*node.get("allOf", ()), {"pattern": pattern}]
            else:
                node["pattern"] = pattern

    def _array(self, node: dict[str, Any], at: str) -> None:
        if isinstance(node.get("items"), list):  # as drafts up to 2019-09 write prefixItems
            if "prefixItems" in node:
                raise self._no(f"{at}/items", "a list beside prefixItems; make it one schema")
            put_behind(node, "items", "additionalItems")
        elif "additionalItems" in node:
            if "prefixItems" in node:
                raise self._no(f"{at}/additionalItems", "beside prefixItems it is called items")
            del node["additionalItems"]  # means nothing without a list

    def _object(self, node: dict[str, Any], at: str) -> None:
        names, patterns = node.get("properties", {}), node.get("patternProperties", {})
        if len(names) > _MAX_PROPERTIES:
            raise self._no(f"{at}/properties", f"more than {_MAX_PROPERTIES}")
        if len(patterns) > _MAX_PATTERNS:
            raise self._no(f"{at}/patternProperties", f"more than {_MAX_PATTERNS}")
        for pattern in patterns:
            if why := check_pattern(pattern):
                raise self._no(f"{at}/patternProperties", f"{pattern!r:.60}: {why}")
        if patterns:
            put_behind(node, "patternProperties", "additionalProperties")
        required = set(node.get("required", ()))
        n_optional = len(names.keys() - required)
        for key in ("minProperties", "maxProperties"):
            if key not in node:
                continue
            more = node[key] - len(required)
            named_only = node.get("additionalProperties") is False and not patterns
            if (more <= 0) if key == "minProperties" else named_only and more >= n_optional:
                del node[key]  # as it is anyway
            elif n_optional and not (more == 1 and named_only and n_optional <= 64):
                raise self._no(f"{at}/{key}", "cannot be enforced beside optional properties")
            elif key == "minProperties" and more > 1:  # nothing keeps a name from coming twice
                raise self._no(f"{at}/{key}", "more than one beyond the required properties")

    def _target(self, ref: str, at: str) -> tuple[Any, str]:
        """What a reference stands for, and where that is."""
        if ref != "#" and not ref.startswith("#/"):
            raise self._no(at, f"{ref!r:.60}: only references like '#/$defs/name' are followed")
        node: Any = self._root
        for part in ref.split("/")[1:]:
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict) and part in node:
                node = node[part]
            else:
                raise self._no(at, f"{ref!r:.60}: there is no such place in the schema")
            if isinstance(node, dict) and isinstance(node.get("$id"), str):
                raise self._no(at, f"{ref!r:.60}: leads through a schema with an $id")
        return node, ref

    def _check_loops(self) -> None:
        """Refuses a schema that applies itself to the same value."""
        done: set[int] = set()
        for root, at in self._seen.values():
            path: list[tuple[Any, list[Any]]] = [(root, self._applied(root))]
            within = {id(root)}
            while path:
                node, more = path[-1]
                following = more.pop() if more else None
                if following is None:
                    path.pop()
                    within.discard(id(node))
                    done.add(id(node))
                elif id(following) in within:
                    raise self._no(at, "refers to itself without going into a value")
                elif id(following) not in done:
                    within.add(id(following))
                    path.append((following, self._applied(following)))

    def _applied(self, node: Any) -> list[Any]:
        """The schemas that apply to the same value as one does."""
        found = [sub for key in ("allOf", "anyOf", "oneOf") for sub in node.get(key, ())]
        if "$ref" in node:
            found.append(self._target(node["$ref"], "#")[0])
        return [sub for sub in found if isinstance(sub, dict)]

    def _check_endings(self) -> None:
        """Refuses what could be begun and never ended, like a list that must hold such a list."""
        ending: set[int] = set()

        def ends(node: Any) -> bool:
            return isinstance(node, bool) or id(node) in ending

        left = list(self._seen.values())
        while True:
            more = [(n, at) for n, at in left if not self._ends(n, ends)]
            ending.update({id(n) for n, _ in left} - {id(n) for n, _ in more})
            if len(more) == len(left):
                break
            left = more
        if left:
            at = min((at for _, at in left), key=len)
            raise self._no(at, "holds itself in every case, so that no answer could end")

    def _ends(self, node: dict[str, Any], ends: Callable[[Any], bool]) -> bool:
        if "const" in node or "enum" in node:
            return True
        if "$ref" in node and not ends(self._target(node["$ref"], "#")[0]):
            return False
        if not all(map(ends, node.get("allOf", ()))):
            return False
        for key in ("anyOf", "oneOf"):
            if key in node and not any(map(ends, node[key])):
                return False
        kinds = types_of(node)
        if kinds - {"array", "object"}:
            return True
        items, first = node.get("items", True), node.get("prefixItems", [])
        if isinstance(items, list):
            items, first = node.get("additionalItems", True), items
        n_items = node.get("minItems", 0)
        if "array" in kinds and all(map(ends, [*first[:n_items], items][: n_items or 0])):
            return True
        named, other = node.get("properties", {}), node.get("additionalProperties", True)
        return "object" in kinds and all(
            ends(named.get(name, other)) for name in node.get("required", ())
        )

    def _check_multiples(self) -> None:
        """llguidance computes common multiples in 32 bits."""
        if not self._combined:
            return
        scale = max((exponent for _, _, exponent in self._multiples), default=0)
        product = 1
        for factor, at in {c * 10 ** (scale - e): at for at, c, e in self._multiples}.items():
            product *= factor
            if product >= 2**32:
                raise self._no(at, "cannot be enforced together with the other multiples")

    def _one_of(self, node: dict[str, Any], at: str) -> None:
        """Options that shut each other out are as good under anyOf, which llguidance enforces."""

        def resolved(option: Any) -> Any:
            for _ in range(8):
                if not isinstance(option, dict) or "$ref" not in option:
                    break
                option = self._target(option["$ref"], at)[0]  # what is beside only limits it more
            return option

        options = [resolved(option) for option in node["oneOf"]]
        if len(options) > 1 and not disjoint(options, resolved):
            raise self._no(
                f"{at}/oneOf", "options that may hold together cannot be enforced; use anyOf, or"
                " give each object a required property with a const of its own",
            )  # fmt: skip
        spelled = {"anyOf": node["oneOf"]}
        if "anyOf" in node:
            spelled = {"allOf": [*node.get("allOf", ()), spelled]}
        items = [
            pair for key, value in node.items()
            for pair in (spelled.items() if key == "oneOf" else [(key, value)])
        ]  # fmt: skip
        node.clear()
        node.update(items)
