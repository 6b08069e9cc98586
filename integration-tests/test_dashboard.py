"""A real Prometheus scrapes the running server under load: every query of our dashboard, of TGI's and of the alerts.

Each must be answered, and those of dashboards with numbers.
"""

import contextlib
import http.client
import json
import math
import re
import shutil
import socket
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
BOARD = json.loads((DEPLOY / "grafana/dashboards/text-generation.json").read_text())
VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "30s"}
# A CPU has no such series.
GPU_METRICS = {
    "tgi_gpu_utilization_ratio",
    "tgi_gpu_memory_used_bytes",
    "tgi_gpu_memory_total_bytes",
    "tgi_gpu_power_watts",
}
SERVICE = 'container="text-generation"'
# What TGI's dashboard asks for: quantiles of these, of a method where there is one, and the plain values of those.
TGI_HISTOGRAMS = (
    "tgi_request_queue_duration_bucket{%s}",
    "tgi_request_duration_bucket{%s}",
    "tgi_request_validation_duration_bucket{%s}",
    "tgi_request_inference_duration_bucket{%s}",
    "tgi_request_mean_time_per_token_duration_bucket{%s}",
    "tgi_request_input_length_bucket{%s}",
    "tgi_request_generated_tokens_bucket{%s}",
    "tgi_request_max_new_tokens_bucket{%s}",
    "tgi_request_skipped_tokens_bucket{%s}",
    "tgi_batch_next_size_bucket{%s}",
    'tgi_batch_inference_duration_bucket{method="prefill", %s}',
    'tgi_batch_inference_duration_bucket{method="decode", %s}',
    'tgi_batch_forward_duration_bucket{method="prefill", %s}',
    'tgi_batch_forward_duration_bucket{method="decode", %s}',
    'tgi_batch_decode_duration_bucket{method="decode", %s}',
    'tgi_batch_filter_duration_bucket{method="decode", %s}',
    'tgi_batch_concat_duration_bucket{method="decode", %s}',
)
TGI_VALUES = (
    "sum(rate(tgi_request_count{%s}[30s]))",
    "sum(rate(tgi_request_success{%s}[30s]))",
    "sum(rate(tgi_request_failure{%s}[30s])) by (err)",
    "sum(increase(tgi_request_success{%s}[30s]))",
    "sum(rate(tgi_request_generated_tokens_sum{%s}[30s]) / rate(tgi_request_generated_tokens_count{%s}[30s]))",
    "sum(tgi_queue_size{%s})",
    "sum(tgi_batch_current_size{%s})",
    "sum(tgi_batch_current_max_tokens{%s})",
    "max(tgi_batch_max_total_tokens{%s})",
    'sum(rate(tgi_batch_inference_count{method="decode", %s}[30s]))',
    'sum(rate(tgi_batch_inference_success{method="prefill", %s}[30s])) by (method)',
    'sum(rate(tgi_batch_inference_failure{method="decode", %s}[30s]))',
    "sum(rate(tgi_batch_concat{%s}[30s])) by (reason)",
)
pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Prometheus: apt-get install prometheus"
)


def board_queries() -> list[str]:
    queries = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", ())]
    for name, value in VARIABLES.items():
        queries = [query.replace(name, value) for query in queries]
    assert not [query for query in queries if "$" in query]
    return queries


def tgi_queries() -> list[str]:
    quantiles = [
        f"histogram_quantile({share}, sum by (le) (rate({name}[30s])))"
        for name in TGI_HISTOGRAMS
        for share in (0.5, 0.9, 0.99)
    ]
    return [query.replace("%s", SERVICE) for query in (*quantiles, *TGI_VALUES)]


def names_in(query: str) -> set[str]:
    return set(re.findall(r"tgi_\w+", query))


class Prometheus:
    """A running Prometheus, and its query API."""

    def __init__(self, port: int) -> None:
        self._port = port

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer; a failure is an error."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)) as connection:
            connection.request("GET", f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
            answer = json.loads(connection.getresponse().read())
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def numbers(self, query: str) -> list[float]:
        """The values that a query has now; NaN is none."""
        values = [float(sample["value"][1]) for sample in self.get("query", query=query)["result"]]
        return [value for value in values if not math.isnan(value)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Load:
    """Requests of every kind that the dashboard tells apart, over and over."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._is_over = threading.Event()
        kinds = [self._answers] * 3 + [self._refusals, self._leavers]
        self._threads = [threading.Thread(target=self._repeat, args=(kind,)) for kind in kinds]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, send: Any) -> None:
        while not self._is_over.is_set():
            send()

    def _answers(self) -> None:
        body = {"inputs": "the same beginning " * 5, "parameters": {"max_new_tokens": 20, "do_sample": True}}
        self._server.post("/generate", body)

    def _refusals(self) -> None:
        self._server.post("/generate", {"inputs": "", "parameters": {}})
        self._server.request("POST", "/generate", b"{")
        self._is_over.wait(0.1)

    def _leavers(self) -> None:
        with self._server.stream(
            "/generate_stream", {"inputs": "gone", "parameters": {"max_new_tokens": 500}}
        ) as lines:
            next(lines)


@pytest.fixture(scope="module")
def prometheus(serve: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with our own configuration, but for the server's port and how often it asks."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
    with serve("--model-id", str(tiny_model), "--dtype", "float32", "--max-concurrent-requests", "4") as server:
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        config["rule_files"] = [str(DEPLOY / "prometheus/alerts.yaml")]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{server.metrics_port}"]
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        port = free_port()
        command = [
            *("prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"),
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        log = folder / "log"
        with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
            prometheus = Prometheus(port)

            def has_scraped() -> bool:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(OSError, ValueError):  # not listening yet, or not ready
                    return len(prometheus.get("query", query="tgi_request_count[30s]")["result"]) > 0
                return False

            try:
                with Load(server):
                    server.wait_for(has_scraped, "the first scrape")
                    yield prometheus
            finally:
                process.terminate()


def wait_for_numbers(prometheus: Prometheus, queries: list[str]) -> None:
    """Until each query has been answered with a number; a query that never is names itself."""
    left = list(queries)
    for _ in range(120):
        left = [query for query in left if not prometheus.numbers(query)]
        if not left:
            return
        threading.Event().wait(0.25)
    pytest.fail("without data: " + "\n".join(left))


def test_every_panel_shows_data(prometheus: Prometheus) -> None:
    queries = board_queries()
    on_gpus = [query for query in queries if names_in(query) & GPU_METRICS]
    assert {name for query in on_gpus for name in names_in(query)} == GPU_METRICS, "all that a CPU excuses"
    wait_for_numbers(prometheus, [query for query in queries if query not in on_gpus])
    for query in on_gpus:
        prometheus.numbers(query)  # it is a query


def test_tgis_own_dashboard_works(prometheus: Prometheus) -> None:
    queries = tgi_queries()
    wait_for_numbers(prometheus, queries)


def test_outcomes_are_those_of_the_load(prometheus: Prometheus) -> None:
    wait_for_numbers(prometheus, [f'tgi_request_failure{{err="{err}"}} > 0' for err in ("validation", "dropped")])
    wait_for_numbers(prometheus, ["rate(tgi_request_success[30s]) > 0", "tgi_prefix_cache_hit_tokens > 0"])
    assert prometheus.numbers('tgi_request_failure{err=~"generation|incomplete|template"} > 0') == []


def test_alerts_ask_for_what_there_is(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"][0]["rules"])
    assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []
    known = set(prometheus.get("label/__name__/values"))
    for rule in rules:
        assert names_in(rule["query"]) <= known, rule["name"]
        assert rule["state"] != "firing", rule["name"]


def test_the_file_is_what_its_maker_makes() -> None:
    import runpy

    made = runpy.run_path(str(DEPLOY / "grafana/make_dashboard.py"))["dashboard"]()
    assert made == BOARD
