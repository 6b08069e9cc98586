"""Several answers to one prompt (`n`), and the best of several (`best_of`)."""

import asyncio
import json

import pytest

USER = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def assert_runs(requests, num_runs):
    """One prompt, seeds that differ and follow from the first one."""
    assert len(requests) == num_runs
    assert len({tuple(request.token_ids) for request in requests}) == 1
    assert len({request.sampling.seed for request in requests}) == num_runs
    assert [request.scores_prompt for request in requests[1:]] == [False] * (num_runs - 1)


def test_n_of_a_chat(serving, client_of):
    async def run():
        async with serving(max_best_of=4) as served, client_of(served) as client:
            seeds = []
            for _ in range(2):
                served.engine.log.clear()
                answer = await client.chat.completions.create(model="m", messages=USER, n=3, seed=5)
                assert [(one.index, one.message.content) for one in answer.choices] == [(i, "Hi you") for i in range(3)]
                assert_runs(served.engine.log, 3)
                seeds.append([request.sampling.seed for request in served.engine.log])
            assert seeds[0] == seeds[1]
            assert seeds[0][0] == 5
            # The prompt counts once, all that was generated counts.
            num_prompt = len(served.engine.log[0].token_ids)
            usage = answer.usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt, 21)
            assert usage.total_tokens == num_prompt + 21
            assert usage.prompt_tokens_details.cached_tokens == 2
            assert usage.recomputed_tokens == 3 * 3  # of each run
            assert served.context.permits.num_taken == 0

    asyncio.run(run())


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_streams_of_n_interleave(serving, openai_events_of, route):
    async def run():
        async with serving() as served:
            body = {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
            body |= {"prompt": ["a", "b"]} if route == "completions" else {"messages": USER}
            num_choices = 4 if route == "completions" else 2
            async with served.client.post(f"/v1/{route}", json=body) as response:
                *events, last = await openai_events_of(response)
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 7 * num_choices
            prompts = [request.token_ids for request in served.engine.log[::2]]
            assert last["usage"]["prompt_tokens"] == sum(map(len, prompts))
            choices = [event["choices"][0] for event in events]
            assert [one["index"] for one in choices] != sorted(one["index"] for one in choices)
            for index in range(num_choices):
                mine = [one for one in choices if one["index"] == index]
                texts = [one["text"] if "text" in one else one["delta"]["content"] for one in mine]
                assert "".join(texts) == "Hi you"
                assert [one["finish_reason"] for one in mine] == [None] * 6 + ["stop"]
                if "delta" in mine[0]:
                    assert "".join(one["delta"]["role"] for one in mine) == "assistant"
            assert_runs(served.engine.log[:2], 2)

    asyncio.run(run())


def test_choices_call_tools_each_for_itself(serving, make_engine, client_of):
    call = json.dumps({"function": {"_name": "f", "x": 1}})

    async def run():
        async with serving(make_engine(answer=call)) as served, client_of(served) as client:
            options = {"model": "m", "messages": USER, "tools": TOOLS, "tool_choice": "required", "n": 2}
            answer = await client.chat.completions.create(**options)
            for choice in answer.choices:
                assert choice.finish_reason == "tool_calls"
                assert json.loads(choice.message.tool_calls[0].function.arguments) == {"x": 1}
            assert len({choice.message.tool_calls[0].id for choice in answer.choices}) == 2
            stream = await client.chat.completions.create(**options, stream=True)
            chunks = [chunk.choices[0] async for chunk in stream]
            for index in (0, 1):
                mine = [one for one in chunks if one.index == index]
                assert mine[-1].finish_reason == "tool_calls"
                parts = [part.function.arguments for one in mine for part in one.delta.tool_calls or []]
                assert json.loads("".join(parts)) == {"x": 1}

    asyncio.run(run())


def test_best_of_generate(serving, make_engine):
    async def run():
        engine = make_engine()
        engine.logprobs = [-2.0, -1.0, -3.0]
        async with serving(engine, max_best_of=3) as served:
            parameters = {"best_of": 3, "do_sample": True, "details": True}
            async with served.client.post("/generate", json={"inputs": "x", "parameters": parameters}) as response:
                details = (await response.json())["details"]
            assert_runs(engine.log, 3)
            shown = [details, *details["best_of_sequences"]]
            assert [one["tokens"][0]["logprob"] for one in shown] == [-1.0, -2.0, -3.0]
            assert [one["seed"] for one in shown] == [engine.log[i].sampling.seed for i in (1, 0, 2)]
            assert {one["generated_text"] for one in details["best_of_sequences"]} == {"Hi you"}
            assert {one["finish_reason"] for one in shown} == {"eos_token"}
            assert response.headers["x-prompt-tokens"] == "2"
            assert response.headers["x-generated-tokens"] == "21"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 2}, "`best_of` > 1 needs sampling"),
        ({"best_of": 2, "do_sample": True, "seed": 3}, "`seed` must not be set when `best_of` > 1"),
    ],
)
def test_what_best_of_excludes(serving, parameters, text):
    async def run():
        async with serving() as served:
            body = {"inputs": "x", "parameters": parameters}
            async with served.client.post("/generate", json=body) as response:
                assert response.status == 422
                assert text in (await response.json())["error"]
            body = {"inputs": "x", "parameters": {"best_of": 2, "do_sample": True}}
            async with served.client.post("/generate_stream", json=body) as response:
                assert response.status == 200
                assert b"`best_of` != 1 is not supported when streaming tokens" in await response.read()
            async with served.client.post("/vertex", json={"instances": [body]}) as response:
                assert response.status == 422
                assert "`best_of` above 1 is not supported here" in (await response.json())["error"]
            assert served.engine.log == []
            assert served.context.permits.num_taken == 0

    asyncio.run(run())


def test_best_of_completions(serving, make_engine, client_of):
    """The best ones first, of each prompt; all runs count as generated."""

    async def run():
        engine = make_engine()
        engine.logprobs = [-3.0, -1.0, -2.0, -1.5, -0.5, -1.0]
        async with serving(engine, max_best_of=3) as served, client_of(served) as client:
            answer = await client.completions.create(model="m", prompt=["x", "y"], n=2, best_of=3, logprobs=0, seed=1)
            assert [one.index for one in answer.choices] == [0, 1, 2, 3]
            assert [one.logprobs.token_logprobs[0] for one in answer.choices] == [-1.0, -2.0, -0.5, -1.0]
            assert answer.usage.completion_tokens == 42
            assert answer.usage.prompt_tokens == 4

    asyncio.run(run())


def test_each_run_takes_a_permit(serving, client_of):
    """One that can never have them all is told so; others wait their turn."""

    async def run():
        async with serving(max_concurrent_requests=3, max_best_of=9) as served:
            body = {"prompt": ["a", "b"], "n": 2}
            async with served.client.post("/v1/completions", json=body) as response:
                assert response.status == 422
                assert "at most 3 answers, `n` and `best_of` counted. Given: 4" in await response.text()
            async with served.client.post("/v1/completions", json={"prompt": "a", "n": 4}) as response:
                assert response.status == 422
                assert "`n` must be >= 1 and <= 3" in await response.text()
            served.context.permits.take(1)
            async with served.client.post("/v1/completions", json={"prompt": "a", "n": 3}) as response:
                assert response.status == 429
            served.context.permits.give_back(1, "", is_served=False)

    asyncio.run(run())


def test_a_client_that_leaves_cancels_every_run(serving, make_engine, until):
    async def run():
        engine = make_engine(is_hanging=True)
        async with serving(engine) as served:
            body = {"messages": USER, "n": 2, "stream": True}
            async with served.client.post("/v1/chat/completions", json=body) as response:
                await response.content.readany()
            await until(lambda: len(engine.left) == 2)
            assert served.context.permits.num_taken == 0

    asyncio.run(run())
