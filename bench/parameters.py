"""Writes docs/parameters.md: what becomes of each parameter of each API.

    PYTHONPATH=src python bench/parameters.py

Made of the models that check the requests, so it says what the server does.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pronk.server.app import create_app
from pronk.server.settings import ServerSettings

PAGE = Path(__file__).parents[1] / "docs" / "parameters.md"

HEAD = """# Parameters of every API

Written by `bench/parameters.py` from the models that check the requests. *Honoured*: it does what
it says. *Neutral*: accepted, as it asks for nothing that changes an answer. *Refused*: 400 with the
code `unsupported_parameter`, unless it is null, empty or false. Any other parameter is 400, too
(`unknown_parameter`): nothing is ever ignored. The same, with all types and limits, is in the
OpenAPI document of a running server, `/openapi.json`.
"""

HONOURED, NEUTRAL, REFUSED = "honoured", "neutral", "refused"
_LIMITS = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}",
           "minLength": "at least {} characters", "maxLength": "at most {} characters",
           "minItems": "at least {} items", "maxItems": "at most {} items",
           "maxProperties": "at most {} entries"}  # fmt: skip
_HUGE = 1e15
"""Limits that nobody reaches."""


class Parameters:
    """The parameters of every route with a body, from the OpenAPI document."""

    def __init__(self) -> None:
        self.document = create_app(ServerSettings(), ["smollm2-135m"]).openapi()

    def routes(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """Path, summary and the body's schema."""
        for path, operations in self.document["paths"].items():
            for operation in operations.values():
                for content in operation.get("requestBody", {}).get("content", {}).values():
                    yield path, operation.get("summary", ""), self.resolved(content["schema"])

    def resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        while "$ref" in schema:
            schema = self.document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        return schema

    def what(self, schema: Mapping[str, Any]) -> str:
        """The type of a parameter, in short."""
        if "enum" in schema or "const" in schema:
            values = schema.get("enum", [schema.get("const")])
            return " or ".join(f"`{value}`" for value in values)
        schema = self.resolved(schema)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                kinds = [self.what(part) for part in schema[key] if part.get("type") != "null"]
                return " or ".join(dict.fromkeys(filter(None, kinds)))
        kind = schema.get("type", "anything")
        if kind == "array":
            return f"list of {self.what(schema.get('items', {}))}"
        limits = [
            words.format(f"{schema[key]:g}")
            for key, words in _LIMITS.items()
            if abs(schema.get(key, _HUGE)) < _HUGE
        ]
        return " ".join([str(kind), *limits])


def state_of(schema: Mapping[str, Any]) -> str:
    if schema.get("x-unsupported"):
        return REFUSED
    return NEUTRAL if schema.get("x-neutral") else HONOURED


def page() -> str:
    parameters = Parameters()
    routes = list(parameters.routes())
    text = HEAD + "\n| API | honoured | neutral | refused |\n|---|---|---|---|\n"
    for path, _, schema in routes:
        states = [state_of(part) for part in schema["properties"].values()]
        counts = " | ".join(str(states.count(state)) for state in (HONOURED, NEUTRAL, REFUSED))
        text += f"| {path} | {counts} |\n"
    for path, summary, schema in routes:
        text += _section(parameters, path, summary, schema)
    return text


def _section(parameters: Parameters, path: str, summary: str, schema: Mapping[str, Any]) -> str:
    text = (
        f"\n## {path}\n\n{summary}.\n\n| parameter | | type | default | |\n|---|---|---|---|---|\n"
    )
    required: Sequence[str] = schema.get("required", ())
    fields = sorted(schema["properties"].items(), key=lambda item: _order(item[1]))
    for name, part in fields:
        state = state_of(part)
        kind = "" if state == REFUSED else parameters.what(part)
        default = "required" if name in required else _default(part)
        words = "" if state == REFUSED else part.get("description", "").replace("\n", " ")
        cells = (f"`{name}`", state, kind, default, words)
        text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text


def _order(schema: Mapping[str, Any]) -> int:
    return (HONOURED, NEUTRAL, REFUSED).index(state_of(schema))


def _default(schema: Mapping[str, Any]) -> str:
    value = schema.get("default")
    return "" if value is None else f"`{value}`".lower()


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
