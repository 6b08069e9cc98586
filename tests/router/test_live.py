"""The live page's data against numpy, and who gets the page, its data, or neither."""

import asyncio
import base64
import hashlib
import re

import numpy as np
import pytest
from text_generation_router.block_manager import BlockManager
from text_generation_router.exposition import DURATION_BOUNDS, Histogram
from text_generation_router.live import MAX_SAMPLES, MAX_STEPS, WINDOW, LiveHistory, quantile
from text_generation_router.metrics import Metrics
from text_generation_router.scheduler import Scheduler, SchedulerLimits
from text_generation_router.step import PlanInFlight, StepPlan
from text_generation_router.valid_request import ValidRequest

GENERATE = {"inputs": "abc", "parameters": {"max_new_tokens": 5}}


def make_history() -> tuple[LiveHistory, Metrics, Scheduler]:
    scheduler = Scheduler(SchedulerLimits(8, 8), BlockManager(16, 4), frozenset())
    metrics = Metrics()
    metrics.set_limits(10, 10)
    return LiveHistory(metrics, scheduler), metrics, scheduler


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_quantiles_lie_in_the_bucket_of_the_true_one(share):
    values = np.random.default_rng(0).lognormal(-3, 1, 1000)
    histogram = Histogram(DURATION_BOUNDS)
    for value in values:
        histogram.observe(float(value))
    true = np.quantile(values, share)
    assert true / 1.5 <= quantile(histogram.counts, share) <= true * 1.5


def test_a_quantile_of_nothing_is_none_and_of_the_longest_is_the_last_bound():
    counts = [0] * (len(DURATION_BOUNDS) + 1)
    assert quantile(counts, 0.5) is None
    counts[-1] = 1
    assert quantile(counts, 0.5) == DURATION_BOUNDS[-1]


def test_samples_tell_of_the_last_seconds_alone(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr("text_generation_router.live.time.monotonic", lambda: now_s)
    history, metrics, scheduler = make_history()
    names = history.state()["columns"]

    def newest() -> dict[str, float | None]:
        nonlocal now_s
        now_s += 1
        history.sample()
        return dict(zip(names, history.state()["samples"][-1], strict=True))

    scheduler.add(ValidRequest([1, 2, 3], 4))
    metrics.tokens.sampled(50)
    metrics.tokens.followed(0.01, 49)
    metrics.requests.first_token_read(0.2)
    metrics.steps.started("prefill", 30, 0)
    sample = newest()
    assert (sample["running"], sample["waiting"], sample["used_blocks"]) == (0, 1, 0)
    assert sample["generated_per_s"] == pytest.approx(50)
    assert sample["prompt_per_s"] == pytest.approx(30)
    assert 0.2 / 1.5 < sample["first_token_p50_s"] < 0.2 * 1.5
    assert 0.01 / 1.5 < sample["next_token_p99_s"] < 0.01 * 1.5

    scheduler.schedule()
    assert (newest()["running"], newest()["waiting"], newest()["used_blocks"]) == (1, 0, 1)
    for _ in range(WINDOW):
        sample = newest()
    assert sample["generated_per_s"] == 0
    assert sample["first_token_p50_s"] is None


def test_what_is_kept_is_bounded_and_empty_plans_are_no_steps():
    history, _, _ = make_history()
    for number in range(2 * MAX_SAMPLES):
        history.sample()
        plan = StepPlan(number, num_decode_tokens=number % 2)
        history.note_step(PlanInFlight(plan, sent_ns=number * 1000), result_ns=number * 1000 + 1500)
    state = history.state()
    assert len(state["samples"]) == MAX_SAMPLES
    assert len(state["steps"]) == MAX_STEPS
    assert {step[4] for step in state["steps"]} == {1}
    last = state["steps"][-1]
    assert last[0] == 2 * MAX_SAMPLES - 1
    assert last[2] - last[1] == pytest.approx(0.001, abs=1e-3), "from the end of the step before, 1 us in all"


def test_the_page_is_open_and_its_data_needs_the_key(serving):
    async def run():
        async with serving(api_key="secret") as served:
            async with served.client.get("/ui") as response:
                assert response.status == 200
                assert "org/model" not in await response.text()
            async with served.client.get("/ui/state") as response:
                assert response.status == 401
            async with served.client.get("/ui/state", headers={"Authorization": "Bearer secret"}) as response:
                state = await response.json()
            assert state["model"] == "org/model"
            assert state["is_healthy"]
            assert state["num_blocks"] == 64
            assert len(state["samples"][-1]) == len(state["columns"])

    asyncio.run(run())


def test_the_page_may_run_its_own_script_alone(serving):
    async def run():
        async with serving() as served, served.client.get("/ui") as response:
            return response.headers["Content-Security-Policy"], await response.text()

    policy, page = asyncio.run(run())
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    for kind, tag in (("style", "style"), ("script", "script")):
        (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not re.findall(r"https?://|//[a-z]+\.|@import|url\(", page), "nothing from elsewhere"


def test_without_the_page_its_paths_are_unknown(serving):
    async def run():
        async with serving(disable_ui=True) as served:
            for path in ("/ui", "/ui/state"):
                async with served.client.get(path) as response:
                    assert response.status == 404
            async with served.client.get("/api-doc/openapi.json") as response:
                assert not [path for path in (await response.json())["paths"] if path.startswith("/ui")]

    asyncio.run(run())
