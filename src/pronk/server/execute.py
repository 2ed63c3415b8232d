"""Runs a request that came as a value, not over HTTP: a line of a batch. The same handlers answer
it, behind whoever waits at a socket."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from pronk.server import chat, completions, embeddings, responses
from pronk.server.auth import Caller
from pronk.server.errors import api_error_of, openai_error, validation_error
from pronk.server.openai_types import ChatRequest, CompletionRequest
from pronk.server.response_types import ResponseRequest
from pronk.server.service import BATCH_PRIORITY, Call, Service

log = logging.getLogger(__name__)

Execute = Callable[[str, Mapping[str, Any], Caller], Awaitable[tuple[int, dict[str, Any]]]]


class _Endpoint(NamedTuple):
    body: type[BaseModel]
    run: Callable[[Call, Any], Awaitable[dict[str, Any]]]


ENDPOINTS: Mapping[str, _Endpoint] = {
    "/v1/chat/completions": _Endpoint(ChatRequest, chat.execute),
    "/v1/completions": _Endpoint(CompletionRequest, completions.execute),
    "/v1/embeddings": _Endpoint(embeddings.EmbeddingRequest, embeddings.execute),
    "/v1/responses": _Endpoint(ResponseRequest, responses.execute),
}


def executor(service: Service) -> Execute:
    """The function `execute(endpoint, body, caller)`: the status and the body of the answer."""

    async def execute(
        endpoint: str, body: Mapping[str, Any], caller: Caller
    ) -> tuple[int, dict[str, Any]]:
        kind = ENDPOINTS[endpoint]
        try:
            checked = kind.body.model_validate(body)
            return 200, await kind.run(Call(service, caller, BATCH_PRIORITY), checked)
        except ValidationError as error:
            failure = validation_error(error.errors(), body)
        except Exception as error:
            failure = api_error_of(error)
            if failure.status >= 500:
                log.warning("a line of a batch failed", exc_info=error)
        return failure.status, openai_error(failure)

    return execute
