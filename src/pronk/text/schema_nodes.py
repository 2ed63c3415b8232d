"""What one JSON schema says by itself, and how it is written anew without saying less."""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from pronk.text.schema_parts import TYPES

BOUNDS = (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1))
"""Keywords of a bound with and without itself, and the sign of its inner side."""


def subschemas(node: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """The schemas right inside of one, in any keyword, and where each is."""
    found: list[tuple[Any, str]] = []
    for key in ("items", "additionalItems", "additionalProperties"):
        if key in node and not isinstance(node[key], list):
            found.append((node[key], key))
    for key in ("items", "prefixItems", "allOf", "anyOf", "oneOf"):
        if isinstance(node.get(key), list):
            found += [(sub, f"{key}/{i}") for i, sub in enumerate(node[key])]
    for key in ("properties", "patternProperties"):
        for name, sub in node.get(key, {}).items():
            found.append((sub, f"{key}/" + name.replace("~", "~0").replace("/", "~1")))
    return found


def ref_levels(node: Any) -> int:
    """How far below a schema its deepest reference is; 0 without one."""
    if not isinstance(node, dict):
        return 0
    below = max((ref_levels(sub) for sub, _ in subschemas(node)), default=0)
    return below + 1 if below or "$ref" in node else 0


def types_of(node: Mapping[str, Any]) -> set[str]:
    kinds = node.get("type", TYPES)
    return {kinds} if isinstance(kinds, str) else set(kinds)


def drop_what_says_nothing(node: dict[str, Any]) -> None:
    """Keywords that would be refused, where they constrain nothing."""
    for key in ("$dynamicAnchor", "$recursiveAnchor"):  # whose references are refused
        node.pop(key, None)
    if "contains" not in node:
        node.pop("minContains", None)
        node.pop("maxContains", None)
    if "if" not in node or not node.keys() & {"then", "else"}:
        for key in ("if", "then", "else"):
            node.pop(key, None)
    nothing: dict[str, tuple[Any, ...]] = {
        "uniqueItems": (False,), "unevaluatedItems": (True, {}),
        "unevaluatedProperties": (True, {}), "dependencies": ({},), "dependentRequired": ({},),
        "dependentSchemas": ({},), "propertyNames": (True, {}, {"type": "string"}),
    }  # fmt: skip
    for key, values in nothing.items():
        if key in node and node[key] in values:
            del node[key]


def off_the_bounds(node: dict[str, Any]) -> None:
    """Numbers above a bound that is not below 0, or below one that is not above, keep a billionth
    away from it: llguidance takes some such bounds in, like 0 of 0 < x <= 0.5."""
    if "number" not in types_of(node):
        return
    for key, exclusive, sign in BOUNDS:
        if node.get(exclusive, -sign) * sign < 0:
            continue
        bound = float(node.pop(exclusive))
        step = max(1e-9, math.ulp(bound))
        inside = float(Decimal(repr(bound)) + sign * Decimal(repr(step)))
        node[key] = sign * max(inside * sign, node.get(key, inside) * sign)


def fine_grid(node: dict[str, Any]) -> None:
    """Numbers that must stay off the other bounds get nine digits behind the point: of more digits
    a double could end up on the bound."""
    bounds = [node[exclusive] for _, exclusive, _ in BOUNDS if exclusive in node]
    if bounds and "number" in types_of(node) and max(map(abs, bounds)) < 1e6:
        node.setdefault("multipleOf", 1e-9)


def put_behind(node: dict[str, Any], first: str, second: str) -> None:
    """llguidance reads two keywords together only if none like anyOf comes between them."""
    if second in node:
        value = node.pop(second)
        items = list(node.items())
        node.clear()
        for key, own in items:
            node[key] = own
            if key == first:
                node[second] = value
