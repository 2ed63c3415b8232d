"""Traces for OpenTelemetry, where they are asked for: a span for each request, with the attributes
that its conventions have for HTTP and for generative models, below the caller's span if the request
names one (`traceparent`). Nothing is imported and nothing is done where they are not.
"""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pronk import __version__
from pronk.core.errors import UserError
from pronk.server.logs import RequestInfo, current_request, route_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/api/chat": "chat",
    "/v1/completions": "text_completion",
    "/api/generate": "text_completion",
    "/v1/embeddings": "embeddings",
    "/api/embed": "embeddings",
}
"""What a route does, in the words of the conventions."""
_UNTRACED = frozenset({"/health", "/ready", "/metrics"})


def start_tracing(endpoint: str) -> "TracerProvider":
    """Spans go to the collector at `endpoint`, the URL of its OTLP over HTTP (usually
    http://HOST:4318/v1/traces), in batches, from a thread of its own."""
    if not endpoint.startswith(("http://", "https://")):
        raise UserError(
            f"--otlp-endpoint: {endpoint!r:.200} is no URL; http://localhost:4318/v1/traces is one"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UserError(
            f"--otlp-endpoint: traces need the package {error.name}; `pip install 'pronk[otel]'`"
        ) from None
    provider = _provider()
    exporter: SpanExporter = OTLPSpanExporter(endpoint=endpoint)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def provider_for(exporter: "SpanExporter") -> "TracerProvider":
    """Each span goes to `exporter` as it ends."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = _provider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


def _provider() -> "TracerProvider":
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    resource = Resource.create({"service.name": "pronk", "service.version": __version__})
    return TracerProvider(resource=resource)


class TracingLayer:
    """ASGI middleware: a span for each request. It needs `RequestLayer` around it, which knows what
    the request was about when it has ended."""

    def __init__(self, app: ASGIApp, *, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.app = app
        self._provider = provider
        self._tracer = provider.get_tracer("pronk", __version__)
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, self._flushing(send))
            return
        if scope["type"] != "http" or scope["path"] in _UNTRACED:
            await self.app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, format_trace_id

        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        parent = self._propagator.extract(_headers(scope))
        # no exception's text in a span: it may quote a prompt
        with self._tracer.start_as_current_span(
            f"{scope['method']} {scope['path']}",
            context=parent,
            kind=SpanKind.SERVER,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            info = current_request()
            if info:
                info.trace_id = format_trace_id(span.get_span_context().trace_id)
            try:
                await self.app(scope, receive, watched)
            except Exception as error:
                span.set_attribute("error.type", type(error).__name__)
                status = status or 500
                raise
            finally:
                _describe(span, scope, info, status)

    def _flushing(self, send: Send) -> Send:
        """Spans that wait to be sent are, before the end of the application is told."""

        async def flushed(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown."):
                await asyncio.to_thread(self._provider.shutdown)
            await send(message)

        return flushed


def _headers(scope: Scope) -> Mapping[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _describe(span: "Span", scope: Scope, info: RequestInfo | None, status: int) -> None:
    """What is known of a request at its end. Neither prompts nor answers are."""
    from opentelemetry.trace import StatusCode

    route = route_of(scope)
    operation = _OPERATIONS.get(route)
    attributes: dict[str, Any] = {
        "http.request.method": scope["method"],
        "http.route": None if route == "unmatched" else route,
        "url.path": scope["path"],
        "http.response.status_code": status or None,
    }
    if info:
        attributes["pronk.request_id"] = info.id
        attributes["pronk.key"] = info.key
    if operation and info:
        attributes |= {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "pronk",
            "gen_ai.request.model": info.model,
            "gen_ai.response.model": info.model,
            "gen_ai.usage.input_tokens": info.prompt_tokens,
            "gen_ai.usage.output_tokens": info.completion_tokens,
            "gen_ai.response.finish_reasons": info.finish_reason and [info.finish_reason],
        }
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
    name = f"{operation} {info.model}" if operation and info and info.model else None
    span.update_name(name or f"{scope['method']} {route}")
    if status >= 500:
        span.set_status(StatusCode.ERROR)
