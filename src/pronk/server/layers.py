"""The layers around the routes, outermost first: requests' ids, logs and metrics; traces; pages of
others; keys; limits; bodies. All are plain ASGI: a client that goes away is seen below them at
once, and streams pass."""

from typing import TYPE_CHECKING

from fastapi import FastAPI

from pronk.server.auth import AuthLayer
from pronk.server.bodies import BodyLimitLayer
from pronk.server.limits import Limits, LimitsLayer
from pronk.server.logs import RequestLayer
from pronk.server.metrics import Metrics
from pronk.server.origins import OriginLayer
from pronk.server.settings import ServerSettings
from pronk.server.tracing import TracingLayer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_FORM_BYTES = 1 << 20
"""What a form may add to the file that it sends."""


def add_layers(
    app: FastAPI,
    settings: ServerSettings,
    metrics: Metrics,
    *,
    tracing: "TracerProvider | None" = None,
) -> Limits:
    """Puts all of them around an application; returns the limits, which know what is in flight."""
    limits = Limits(max_queue=settings.max_queue, metrics=metrics)
    app.add_middleware(  # each further one lies around those before
        BodyLimitLayer,
        limit=settings.max_body_bytes,
        larger={"/v1/files": settings.max_file_bytes + _FORM_BYTES},
        metrics=metrics,
    )
    app.add_middleware(LimitsLayer, limits=limits)
    app.add_middleware(AuthLayer)
    if settings.api_key_file is None:
        app.add_middleware(
            OriginLayer,
            hosts=settings.allow_hosts,
            origins=settings.allow_origins,
            metrics=metrics,
        )
    if tracing is not None:
        app.add_middleware(TracingLayer, provider=tracing)
    app.add_middleware(RequestLayer, metrics=metrics)
    return limits
