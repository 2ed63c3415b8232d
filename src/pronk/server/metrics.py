"""What the server counts, for Prometheus at GET /metrics.

Names are vLLM's where it has one, so that dashboards made for it show Pronk, too; the rest begins
with `pronk_`. What engines count by themselves is read when somebody asks for it, so a step pays
nothing. Each application has a registry of its own: two live in one process.

Labels hold names from a small known set only (served models, routes, statuses), never what a client
sent: a client could make any number of them.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import prometheus_client as prometheus
from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CollectorRegistry, Gauge, Histogram, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from pronk.engine.disk_blocks import DiskStats
from pronk.engine.engine import EngineStats
from pronk.server.auth import Caller, caller

_TO_FIRST = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
             160, 640, 2560)  # fmt: skip
_BETWEEN = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_WHOLE = (
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
    7680,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
"""Bounds of the histograms in seconds, or tokens: vLLM's, as its dashboards expect."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


_NO_DISK = DiskStats(0, 0, 0, 0, 0, 0, True)


def _nothing() -> None: ...


@dataclass(frozen=True, slots=True)
class _Watched:
    """A loaded model: whom to ask for its numbers."""

    engine: Callable[[], EngineStats]
    disk: Callable[[], DiskStats | None]
    adapters: Callable[[], int] | None

    def read(self) -> tuple[EngineStats, DiskStats]:
        return self.engine(), self.disk() or _NO_DISK


class Metrics:
    """All that is counted for one application. Any thread may call any method."""

    def __init__(self) -> None:
        self.registry = _Registry(auto_describe=False)
        self._models = _Models()
        self.registry.register(self._models)
        ProcessCollector(registry=self.registry)
        self._requests()
        self._service()

    def _requests(self) -> None:
        def timed(name: str, words: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, words, ["model_name"], buckets=buckets, registry=self.registry)

        self._first = timed(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _TO_FIRST
        )
        self._between = timed(
            "vllm:inter_token_latency_seconds", "Between two tokens of an answer.", _BETWEEN
        )
        self._between_old = timed(
            "vllm:time_per_output_token_seconds", "inter_token_latency_seconds by its old name.",
            _BETWEEN,
        )  # fmt: skip
        self._mean_between = timed(
            "vllm:request_time_per_output_token_seconds", "Mean of a request's inter-token times.",
            _BETWEEN,
        )  # fmt: skip
        self._whole = timed("vllm:e2e_request_latency_seconds", "From arrival to the end.", _WHOLE)
        self._queue = timed("vllm:request_queue_time_seconds", "From arrival to the start.", _WHOLE)
        self._inference = timed(
            "vllm:request_inference_time_seconds", "From the start to the end.", _WHOLE
        )
        self._prefill = timed(
            "vllm:request_prefill_time_seconds", "From the start to the first token.", _WHOLE
        )
        self._decode = timed(
            "vllm:request_decode_time_seconds", "From the first token to the last.", _WHOLE
        )
        self._prompt = timed("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answer = timed("vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._max_tokens = timed(
            "vllm:request_params_max_tokens", "What requests ask for as max_tokens.", _TOKENS
        )
        self._ended = prometheus.Counter(
            "vllm:request_success", "Requests that ended, by why.",
            ["model_name", "finished_reason"], registry=self.registry,
        )  # fmt: skip

    def _service(self) -> None:
        def counted(name: str, words: str, *labels: str) -> prometheus.Counter:
            return prometheus.Counter(name, words, labels, registry=self.registry)

        self._http = counted(
            "pronk_http_requests", "HTTP requests answered.", "method", "route", "status"
        )
        self._http_seconds = Histogram(
            "pronk_http_request_duration_seconds", "From a request's head to its answer's end.",
            ["route"], buckets=_WHOLE, registry=self.registry,
        )  # fmt: skip
        self._http_open = Gauge(
            "pronk_http_requests_in_flight", "HTTP requests not answered yet.",
            registry=self.registry,
        )  # fmt: skip
        self._vanished = counted(
            "pronk_requests_aborted_by_client", "Requests whose client went away.", "route"
        )
        self._auth_failures = counted("pronk_auth_failures", "Requests turned away.", "reason")
        self._refused = counted("pronk_requests_refused", "Requests refused for a limit.", "reason")
        self._batch_lines = counted("pronk_batch_lines", "Lines of batches done.", "status")

    # Models.

    def watch(
        self,
        model: str,
        engine: Callable[[], EngineStats],
        *,
        disk: Callable[[], DiskStats | None] = _nothing,
        adapters: Callable[[], int] | None = None,
    ) -> None:
        """A model was loaded; from now on its numbers are read from these."""
        self._models.watch(model, _Watched(engine, disk, adapters))

    def unwatch(self, model: str) -> None:
        """A model is about to be unloaded. What it has counted stays."""
        self._models.unwatch(model)

    # Requests to models. Times are in seconds since the request arrived.

    def first_token(self, model: str, after: float) -> None:
        self._first.labels(model).observe(after)

    def next_token(self, model: str, gap: float) -> None:
        """A further token of an answer, `gap` seconds after the one before."""
        self._between.labels(model).observe(gap)
        self._between_old.labels(model).observe(gap)

    def finished(
        self,
        model: str,
        reason: str,
        *,
        prompt_tokens: int,
        output_tokens: int,
        ended: float,
        started: float | None = None,
        first_token: float | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """A request ended: when it `started` to run, had its `first_token` (None: never) and
        `ended`. `reason` is the engine's: stop, length, abort, error, ..."""
        self._ended.labels(model, reason).inc()
        self._whole.labels(model).observe(ended)
        self._prompt.labels(model).observe(prompt_tokens)
        self._answer.labels(model).observe(output_tokens)
        if max_tokens is not None:
            self._max_tokens.labels(model).observe(max_tokens)
        if started is not None:
            self._queue.labels(model).observe(started)
            self._inference.labels(model).observe(ended - started)
        if first_token is None:
            return
        if started is not None:
            self._prefill.labels(model).observe(first_token - started)
        self._decode.labels(model).observe(ended - first_token)
        if output_tokens > 1:
            mean = (ended - first_token) / (output_tokens - 1)
            self._mean_between.labels(model).observe(mean)

    # The service.

    def http_started(self) -> None:
        self._http_open.inc()

    def http(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request that `http_started` told of was answered. `route` is the path with the names of
        its parameters, not with their values."""
        self._http_open.dec()
        self._http.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def vanished(self, route: str) -> None:
        """A client went away before its answer's end."""
        self._vanished.labels(route).inc()

    def auth_failed(self, reason: str) -> None:
        self._auth_failures.labels(reason).inc()

    def refused(self, reason: str) -> None:
        """A request was refused for a limit: requests, tokens, concurrency, queue, body, ..."""
        self._refused.labels(reason).inc()

    def batch_line(self, status: str) -> None:
        """A line of a batch is done: completed, failed, expired, cancelled."""
        self._batch_lines.labels(status).inc()


class _Registry(CollectorRegistry):
    """Leaves out the `_created` series, a second one for each that nobody charts."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


_COUNTS = {
    "vllm:prompt_tokens": "Tokens of prompts that have started.",
    "vllm:generation_tokens": "Tokens generated.",
    "vllm:prefix_cache_queries": "Prompt tokens looked for in what had been computed before.",
    "vllm:prefix_cache_hits": "Prompt tokens that were found there.",
    "vllm:num_preemptions": "Times that a request gave its blocks back and waited again.",
    "vllm:spec_decode_num_draft_tokens": "Tokens guessed.",
    "vllm:spec_decode_num_accepted_tokens": "Guessed tokens that were right.",
    "pronk_disk_block_hits": "Blocks read from disk instead of computed.",
    "pronk_disk_block_writes": "Blocks written to disk.",
}


class _Models(Collector):
    """The numbers of the engines, at the moment that somebody asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[str, _Watched] = {}
        self._past: dict[str, Counter[str]] = {}
        """What models had counted when they were unloaded, by the names of the metrics."""

    def watch(self, model: str, watched: _Watched) -> None:
        with self._lock:
            self._watched[model] = watched
            self._past.setdefault(model, Counter())

    def unwatch(self, model: str) -> None:
        with self._lock:
            if watched := self._watched.pop(model, None):
                self._past[model] += _counts(*watched.read())

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            now = {model: watched.read() for model, watched in self._watched.items()}
            adapters = {m: w.adapters() for m, w in self._watched.items() if w.adapters}
            counts = {model: past.copy() for model, past in self._past.items()}
        for model, stats in now.items():
            counts[model] += _counts(*stats)
        yield from _gauges(now, adapters)
        for name, words in _COUNTS.items():
            family = CounterMetricFamily(name, words, labels=["model_name"])
            for model, count in counts.items():
                family.add_metric([model], count[name])
            yield family


def _counts(engine: EngineStats, disk: DiskStats) -> Counter[str]:
    return Counter(
        {
            "vllm:prompt_tokens": engine.prompt_tokens,
            "vllm:generation_tokens": engine.output_tokens,
            "vllm:prefix_cache_queries": engine.prompt_tokens,
            "vllm:prefix_cache_hits": engine.cached_tokens,
            "vllm:num_preemptions": engine.preemptions,
            "vllm:spec_decode_num_draft_tokens": engine.drafted,
            "vllm:spec_decode_num_accepted_tokens": engine.accepted,
            "pronk_disk_block_hits": disk.loaded,
            "pronk_disk_block_writes": disk.saved,
        }
    )


def _gauges(
    now: Mapping[str, tuple[EngineStats, DiskStats]], adapters: Mapping[str, float]
) -> Iterator[Metric]:
    def gauge(name: str, words: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(name, words, labels=["model_name"])
        for model, value in values.items():
            family.add_metric([model], value)
        return family

    def of_engine(name: str, words: str, value: Callable[[EngineStats], float]) -> Metric:
        return gauge(name, words, {model: value(engine) for model, (engine, _) in now.items()})

    def of_disk(name: str, words: str, value: Callable[[DiskStats], float]) -> Metric:
        return gauge(name, words, {model: value(disk) for model, (_, disk) in now.items()})

    yield of_engine("vllm:num_requests_running", "Requests in the batch.", lambda e: e.running)
    yield of_engine("vllm:num_requests_waiting", "Requests that wait.", lambda e: e.waiting)
    yield of_engine(
        "vllm:kv_cache_usage_perc",
        "Part of the KV cache in use; 1 is all of it.",
        lambda e: e.blocks_used / max(1, e.blocks),
    )
    yield of_engine("pronk_kv_blocks", "Blocks of the KV cache.", lambda e: e.blocks)
    yield of_engine(
        "pronk_kv_blocks_cached",
        "Blocks in no request that prompts may find.",
        lambda e: e.blocks_cached,
    )
    yield of_disk("pronk_disk_bytes", "Bytes of the blocks kept on disk.", lambda d: d.nbytes)
    yield gauge("pronk_adapters_loaded", "LoRA adapters loaded.", adapters)
    yield GaugeMetricFamily("pronk_models_loaded", "Models in memory.", value=len(now))


router = APIRouter(tags=["service"])


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}},
)
async def metrics(request: Request, _: Annotated[Caller, Depends(caller("metrics"))]) -> Response:
    """All metrics, in Prometheus's text format or, where the client prefers it, in OpenMetrics."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    page = encode(request.app.state.service.metrics.registry)
    return Response(page, headers={"content-type": content_type})
