"""Every route of our OpenAPI document, with what schemathesis makes up for it: nothing fails inside
the server, and every answer is one that the document tells of."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from live import Live, live_server
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from engine.tiny_models import write_gguf
from pronk.server.app import create_app
from pronk.server.settings import ServerSettings

TOKEN = "let me in"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("schemathesis")
    model = write_gguf(folder / "tiny.gguf")
    with live_server([model], folder / "data", control_token=TOKEN) as one:
        yield one


@pytest.fixture(scope="module")
def document(server: Live) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def _routes() -> list[tuple[str, str]]:
    paths = create_app(ServerSettings(), ["smollm2-135m"]).openapi()["paths"]
    return [(method, path) for path, operations in paths.items() for method in operations]


@pytest.mark.parametrize(("method", "path"), _routes())
@pytest.mark.parametrize("mode", GenerationMode)
def test_every_route(document: Any, method: str, path: str, mode: GenerationMode) -> None:
    """Half of what names a model names ours, and no answer may be long."""
    operation = document[path][method]
    told = document.raw_schema["paths"][path][method]["responses"]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def call(case: schemathesis.Case) -> None:
        aim(case.body)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        checks = [c for c in CHECKS if c is not not_a_server_error or "501" not in told]
        case.call_and_validate(checks=checks, headers=headers, timeout=60)

    try:
        call()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE, "nothing can be wrong with it"


def aim(body: Any) -> None:
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and len(body["model"]) % 2 == 0:
        body["model"] = "tiny"
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict"):
        if isinstance(body.get(name), int) and body[name] > 20:
            body[name] = 20


def test_what_the_document_says(document: Any) -> None:
    raw = document.raw_schema
    for path, operations in raw["paths"].items():
        for method, operation in operations.items():
            assert operation.get("summary"), (method, path)
            assert "422" not in operation["responses"], (method, path)
            if path not in ("/health", "/ready", "/"):
                assert operation["security"], (method, path)
                assert {"400", "401", "403", "503"} <= set(operation["responses"]), (method, path)
    schemas = raw["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    assert {"ChatCompletionChunk", "Error", "AnthropicError"} <= set(schemas)
