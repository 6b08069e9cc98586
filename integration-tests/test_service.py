"""Routes about the server itself: health, what it serves, metrics."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Server

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
def test_health_is_an_empty_200(demo: Server, path: str) -> None:
    reply = demo.get(path)
    assert (reply.status, reply.body) == (200, b"")


def test_info_tells_model_and_limits(demo: Server) -> None:
    info = demo.get("/info").json()
    expected = {
        "model_id": NAME,
        "max_concurrent_requests": 128,
        "max_best_of": 2,
        "max_stop_sequences": 4,
        "max_total_tokens": 8192,  # the model's positions
        "max_input_tokens": 8191,
        "validation_workers": 2,
        "max_client_batch_size": 4,
        "router": "text-generation-router",
    }
    assert {name: info[name] for name in expected} == expected
    assert info.keys() >= {"model_sha", "model_pipeline_tag", "version", "sha", "docker_label"}


def test_models_lists_the_one_model(demo: Server) -> None:
    model = {"id": NAME, "object": "model", "created": 0, "owned_by": NAME}
    assert demo.get("/v1/models").json() == {"object": "list", "data": [model]}


def test_metrics_are_read_by_prometheus_on_both_ports(demo: Server) -> None:
    demo.generate("Hello", max_new_tokens=2)
    for port in (demo.port, demo.metrics_port):
        samples = demo.metrics(port)
        assert samples["tgi_request_count",] >= samples["tgi_request_success",] >= 1
        assert samples["tgi_request_failure", "overloaded"] == 0
        assert samples["tgi_batch_inference_count", "decode"] >= 1
        assert samples["tgi_request_duration_bucket", "+Inf"] == samples["tgi_request_duration_count",]
        assert samples["tgi_request_generated_tokens_sum",] >= 2
        assert samples["tgi_batch_max_total_tokens",] == 16 * samples["tgi_kv_blocks_capacity",] >= 8192


def test_processes_and_model_are_told_of(demo: Server) -> None:
    samples = demo.metrics()
    for name, package in (("router", "text_generation_router"), ("shard-0", "text_generation_shard")):
        (process,) = (child for child in demo.children(package) if child.ppid() == demo.process.pid)
        now = process.memory_info().rss
        assert samples["tgi_process_resident_memory_bytes", name] == pytest.approx(now, rel=0.2)
    text = demo.get("/metrics").body.decode()
    (model,) = re.findall(r"tgi_model_info\{(.*)\} 1\n", text)
    assert f'model_id="{NAME}"' in model
    assert 'device="cpu",num_shards="1"' in model
    assert f'tgi_build_info{{version="{demo.get("/info").json()["version"]}"' in text
    assert "tgi_gpu" not in text


def test_a_conversation_that_is_only_tokenised_is_a_request(demo: Server) -> None:
    before = demo.check_books()
    reply = demo.post("/chat_tokenize", {"messages": [{"role": "user", "content": "Hello"}]})
    assert reply.status == 200
    assert demo.post("/chat_tokenize", {"messages": 1}).status == 422
    after = demo.check_books()
    assert after["tgi_request_count",] == before["tgi_request_count",] + 2
    assert after["tgi_request_rejected", "validation"] == before["tgi_request_rejected", "validation"] + 1


def test_each_request_moves_the_counters_once(demo: Server) -> None:
    names = ("tgi_request_count", "tgi_request_success", "tgi_request_generated_tokens_count")
    before = [demo.metric(name) for name in names]
    sums = demo.metric("tgi_request_input_length_sum"), demo.metric("tgi_request_generated_tokens_sum")
    reply = demo.post("/generate", {"inputs": "One two three", "parameters": {"max_new_tokens": 3, "ignore_eos": True}})
    assert [demo.metric(name) for name in names] == [value + 1 for value in before]
    num_prompt_tokens = int(reply.headers["x-prompt-tokens"])
    assert demo.metric("tgi_request_input_length_sum") == sums[0] + num_prompt_tokens
    assert demo.metric("tgi_request_generated_tokens_sum") == sums[1] + 3


def test_the_log_has_the_lines_that_scripts_wait_for(demo: Server) -> None:
    before = demo.log().count("Success")
    demo.generate("A secret prompt", max_new_tokens=1)
    demo.wait_for(lambda: demo.log().count("Success") == before + 1, "the line of the request", 10.0)
    log = demo.log()
    assert "Connected" in log
    assert "A secret prompt" not in log
