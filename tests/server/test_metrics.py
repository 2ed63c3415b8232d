"""What /metrics shows, under which names, and that the dashboard asks for nothing else."""

import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from service_app import make_app

from pronk.engine.disk_blocks import DiskStats
from pronk.engine.engine import EngineStats
from pronk.server.metrics import Metrics

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana.json"
DISK = DiskStats(nbytes=300, hits=1, loaded=2, saved=1, dropped=0, damaged=0, writable=True)
ZERO = EngineStats(**{field.name: 0 for field in dataclasses.fields(EngineStats)})


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def used() -> Metrics:
    """Metrics of which each has been counted once."""
    metrics = Metrics()
    stats = dataclasses.replace(ZERO, blocks=4, blocks_used=1)
    metrics.watch("tiny", lambda: stats, disk=lambda: DISK, adapters=lambda: 2)
    metrics.first_token("tiny", 0.5)
    metrics.next_token("tiny", 0.1)
    metrics.finished(
        "tiny", "stop", prompt_tokens=5, output_tokens=3, started=0.2, first_token=0.5, ended=1.5,
        max_tokens=7,
    )  # fmt: skip
    metrics.http_started()
    metrics.http("POST", "/v1/chat/completions", 200, 0.3)
    metrics.vanished("/v1/chat/completions")
    metrics.auth_failed("invalid_api_key")
    metrics.refused("queue")
    metrics.batch_line("completed")
    return metrics


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    app = make_app(tmp_path)
    app.state.service.metrics = used()
    yield TestClient(app)
    app.state.service.store.close()


def test_the_fields_names(client: TestClient) -> None:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    kinds = {
        "histogram": [
            "time_to_first_token_seconds", "inter_token_latency_seconds",
            "time_per_output_token_seconds", "e2e_request_latency_seconds",
            "request_queue_time_seconds", "request_prefill_time_seconds",
            "request_decode_time_seconds", "request_inference_time_seconds",
            "request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens",
        ],
        "gauge": ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"],
        "counter": [
            "prompt_tokens", "generation_tokens", "request_success", "num_preemptions",
            "prefix_cache_queries", "prefix_cache_hits", "spec_decode_num_draft_tokens",
            "spec_decode_num_accepted_tokens",
        ],
    }  # fmt: skip
    for kind, names in kinds.items():
        for name in names:
            family = families[f"vllm:{name}"]
            assert family.type == kind
            assert family.documentation
            assert {sample.labels["model_name"] for sample in family.samples} == {"tiny"}
    assert not [name for name in families if name.endswith("_created")]
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6


def test_openmetrics_for_those_who_prefer_it(client: TestClient) -> None:
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    answer = client.get("/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics(answer.text)}
    assert "vllm:time_to_first_token_seconds" in names


def test_times_of_a_request() -> None:
    metrics = used()
    sums = {
        "time_to_first_token": 0.5, "inter_token_latency": 0.1, "time_per_output_token": 0.1,
        "e2e_request_latency": 1.5, "request_queue_time": 0.2, "request_inference_time": 1.3,
        "request_prefill_time": 0.3, "request_decode_time": 1.0,
        "request_time_per_output_token": 0.5,
    }  # fmt: skip
    for name, seconds in sums.items():
        found = value(metrics, f"vllm:{name}_seconds_sum", model_name="tiny")
        assert found == pytest.approx(seconds), name
    assert value(metrics, "vllm:request_prompt_tokens_sum", model_name="tiny") == 5
    assert value(metrics, "vllm:request_generation_tokens_sum", model_name="tiny") == 3
    ended = value(metrics, "vllm:request_success_total", model_name="tiny", finished_reason="stop")
    assert ended == 1


def test_a_request_that_never_ran_has_no_times_of_running() -> None:
    metrics = Metrics()
    metrics.finished("tiny", "abort", prompt_tokens=5, output_tokens=0, ended=2)
    assert value(metrics, "vllm:e2e_request_latency_seconds_count", model_name="tiny") == 1
    for name in ("request_queue_time", "request_prefill_time", "request_decode_time"):
        assert value(metrics, f"vllm:{name}_seconds_count", model_name="tiny") is None


def test_engines_are_read_when_asked_and_their_counts_never_fall() -> None:
    metrics = Metrics()
    now = dataclasses.replace(
        ZERO, running=2, waiting=3, blocks=8, blocks_used=2, blocks_cached=5, prompt_tokens=10,
        cached_tokens=4, output_tokens=6, drafted=9, accepted=7, preemptions=1,
    )  # fmt: skip
    metrics.watch("m", lambda: now, disk=lambda: DISK, adapters=lambda: 4)

    def read(name: str) -> float | None:
        return value(metrics, name, model_name="m")

    assert read("vllm:num_requests_running") == 2
    assert read("vllm:num_requests_waiting") == 3
    assert read("vllm:kv_cache_usage_perc") == 0.25
    assert read("pronk_kv_blocks_cached") == 5
    assert read("pronk_disk_bytes") == 300
    assert read("pronk_adapters_loaded") == 4
    assert value(metrics, "pronk_models_loaded") == 1
    counts = {
        "vllm:prompt_tokens": 10, "vllm:prefix_cache_queries": 10, "vllm:prefix_cache_hits": 4,
        "vllm:generation_tokens": 6, "vllm:spec_decode_num_draft_tokens": 9,
        "vllm:spec_decode_num_accepted_tokens": 7, "vllm:num_preemptions": 1,
        "pronk_disk_block_hits": 2, "pronk_disk_block_writes": 1,
    }  # fmt: skip

    def assert_counted(times: int) -> None:
        assert {name: read(f"{name}_total") for name in counts} == {
            name: times * n for name, n in counts.items()
        }

    assert_counted(1)
    metrics.unwatch("m")
    metrics.unwatch("m")  # of one that is not there
    assert_counted(1)
    assert value(metrics, "pronk_models_loaded") == 0
    assert read("vllm:num_requests_running") is None
    metrics.watch("m", lambda: now, disk=lambda: DISK)  # loaded again: it counts from zero
    assert_counted(2)
    metrics.unwatch("m")
    assert_counted(2)


def test_two_applications_count_by_themselves(tmp_path: Path) -> None:
    apps = [make_app(tmp_path / name) for name in ("a", "b")]
    clients = [TestClient(app) for app in apps]
    clients[0].get("/health")
    seen = [
        value(app.state.service.metrics, "pronk_http_requests_total",
              method="GET", route="/health", status="200")
        for app in apps
    ]  # fmt: skip
    assert seen == [1, None]
    for app in apps:
        app.state.service.store.close()


def test_labels_are_not_what_clients_send(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    client = TestClient(app, raise_server_exceptions=False)
    for i in range(5):
        client.get(f"/nowhere/{i}")
        client.post(f"/v1/responses/resp_{i}/cancel")
        client.request(f"METHOD{i}", "/health")
    family = next(
        family for family in app.state.service.metrics.registry.collect()
        if family.name == "pronk_http_requests"
    )  # fmt: skip
    assert {(s.labels["method"], s.labels["route"]) for s in family.samples} == {
        ("GET", "unmatched"), ("POST", "/v1/responses/{id}/cancel"), ("other", "/health"),
    }  # fmt: skip
    app.state.service.store.close()


def test_threads_may_count_while_somebody_reads() -> None:
    metrics = Metrics()

    def work(name: str) -> None:
        for i in range(200):
            metrics.watch(name, lambda: dataclasses.replace(ZERO, output_tokens=1))
            metrics.next_token(name, 0.1)
            if i % 10 == 0:
                list(metrics.registry.collect())
            metrics.unwatch(name)

    threads = [threading.Thread(target=work, args=(f"m{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert value(metrics, "vllm:generation_tokens_total", model_name=f"m{i}") == 200


# The dashboard.


def dashboard() -> dict[str, Any]:
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return board


def expressions() -> list[str]:
    panels = dashboard()["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


_WORD = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_NOT_METRICS = {
    "sum", "by", "rate", "max", "histogram_quantile", "le", "model_name", "finished_reason",
    "status", "route", "reason", "instance", "__rate_interval", "model",
}  # fmt: skip


def test_every_metric_of_the_dashboard_is_exported() -> None:
    exported = {sample.name for family in used().registry.collect() for sample in family.samples}
    asked = set()
    for expression in expressions():
        words = set(_WORD.findall(re.sub(r'"[^"]*"', "", expression)))
        assert expression.count("(") == expression.count(")")
        asked |= words - _NOT_METRICS
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            asked |= set(re.findall(r"label_values\(([\w:]+),", variable["definition"]))
    assert len(asked) > 30
    assert asked <= exported


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    """But the older name of another one."""
    asked = " ".join(expressions())
    families = {f.name for f in used().registry.collect() if f.name.startswith(("vllm:", "pronk_"))}
    missing = {name for name in families if name not in asked}
    assert missing == {"vllm:time_per_output_token_seconds"}


def test_the_dashboard_can_be_imported_with_any_data_source() -> None:
    board = dashboard()
    assert board["id"] is None  # a new one, not one of somebody's
    assert {v["name"]: v["type"] for v in board["templating"]["list"]} == {
        "datasource": "datasource", "model": "query",
    }  # fmt: skip
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in
                 range(place["h"])}  # fmt: skip
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert {t["datasource"]["uid"] for t in panel["targets"]} == {"${datasource}"}
