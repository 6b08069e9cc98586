"""Real clients against a running server: `python calls.py URL LIBRARY…` prints a JSON object, a result for each call.

Runs in the clients' own environment, or for huggingface_hub in the server's too; imports none of our code. A call
that fails is {"failure": its traceback}. Each answers the same question greedily, so each must say the same.
"""

import asyncio
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

from sse import httpx_sse_stream, sse_splits, sseclient_stream
from structured import hub_structured, langchain_structured, litellm_structured, tgi_structured

QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
PROMPT = f"<|im_start|>system\n{{}}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
RAW = PROMPT.format(SYSTEM)
Call = Callable[[str], Any]


def hub_generate(url: str) -> Any:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=url, timeout=120)
    whole = client.text_generation(RAW, max_new_tokens=32, details=True, return_full_text=False)
    pieces = client.text_generation(RAW, max_new_tokens=32, stream=True, details=True, return_full_text=False)
    texts, last = [], None
    for piece in pieces:
        if not piece.token.special:
            texts.append(piece.token.text)
        last = piece
    plain = client.text_generation(RAW, max_new_tokens=32, stop=["."])
    return {
        "text": whole.generated_text,
        "streamed": "".join(texts),
        "last": last.generated_text,
        "finish": [whole.details.finish_reason, last.details.finish_reason],
        "num_tokens": [whole.details.generated_tokens, len(whole.details.tokens), last.details.generated_tokens],
        "full_text": plain.removeprefix(RAW),
    }


def hub_errors(url: str) -> Any:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError, ValidationError

    client = InferenceClient(model=url, timeout=120)
    found = []
    for work in (
        lambda: client.text_generation(RAW, top_n_tokens=50),
        lambda: list(client.text_generation(RAW, top_n_tokens=50, stream=True)),
        lambda: client.chat_completion(MESSAGES, temperature=-1),
    ):
        try:
            work()
        except (ValidationError, HfHubHTTPError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def hub_chat(url: str) -> Any:
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=url, timeout=120)
    whole = client.chat_completion(MESSAGES, max_tokens=32, temperature=0, logprobs=True)
    chunks = list(
        client.chat_completion(
            MESSAGES, max_tokens=32, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    return {
        "text": whole.choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices),
        "finish": [whole.choices[0].finish_reason, chunks[-2].choices[0].finish_reason],
        "num_tokens": [whole.usage.completion_tokens, len(whole.choices[0].logprobs.content), len(chunks) - 1],
        "usage": chunks[-1].usage.completion_tokens,
    }


async def _hub_async(url: str) -> Any:
    from huggingface_hub import AsyncInferenceClient

    async with AsyncInferenceClient(base_url=url, timeout=120) as client:
        stream = await client.chat_completion(MESSAGES, max_tokens=32, temperature=0, stream=True)
        return "".join([chunk.choices[0].delta.content async for chunk in stream])


def hub_async_chat(url: str) -> Any:
    return asyncio.run(_hub_async(url))


def tgi_generate(url: str) -> Any:
    from text_generation import Client

    client = Client(url, timeout=120)
    whole = client.generate(RAW, max_new_tokens=32)
    pieces = list(client.generate_stream(RAW, max_new_tokens=32))
    return {
        "text": whole.generated_text,
        "streamed": "".join(piece.token.text for piece in pieces if not piece.token.special),
        "last": pieces[-1].generated_text,
        "finish": [str(whole.details.finish_reason), str(pieces[-1].details.finish_reason)],
        "num_tokens": [whole.details.generated_tokens, len(whole.details.tokens), len(pieces)],
    }


def tgi_errors(url: str) -> Any:
    from text_generation import Client, errors

    client = Client(url, timeout=120)
    found = []
    for work in (
        lambda: client.generate(RAW, top_n_tokens=50),
        lambda: client.generate("", max_new_tokens=1),
        lambda: list(client.generate_stream(RAW, top_n_tokens=50)),
    ):
        try:
            work()
        except errors.ValidationError as error:
            found.append(str(error))
    return found


def tgi_chat(url: str) -> Any:
    from text_generation import Client

    client = Client(url, timeout=120)
    whole = client.chat(MESSAGES, max_tokens=32, temperature=0.0)
    chunks = []
    for chunk in client.chat(MESSAGES, max_tokens=32, temperature=0.0, stream=True):
        chunks.append(chunk)
        if chunk.choices[0].finish_reason is not None:
            break  # this client cannot read the [DONE] that TGI and OpenAI send next
    return {
        "text": whole.choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content for chunk in chunks),
        "finish": [whole.choices[0].finish_reason, chunks[-1].choices[0].finish_reason],
    }


async def _tgi_async(url: str) -> Any:
    from text_generation import AsyncClient

    client = AsyncClient(url, timeout=120)
    whole = await client.generate(RAW, max_new_tokens=32)
    return [whole.generated_text] + [
        piece.generated_text async for piece in client.generate_stream(RAW, max_new_tokens=32) if piece.generated_text
    ]


def tgi_async_generate(url: str) -> Any:
    return asyncio.run(_tgi_async(url))


def litellm_chat(url: str) -> Any:
    import litellm

    options = {"model": "openai/tgi", "api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 32}
    whole = litellm.completion(messages=MESSAGES, **options)
    chunks = list(litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options))
    built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    return {
        "text": whole.choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "finish": [whole.choices[0].finish_reason, built.choices[0].finish_reason],
        "usage": [whole.usage.completion_tokens, built.usage.completion_tokens],
        "role": built.choices[0].message.role,
    }


def litellm_completion(url: str) -> Any:
    import litellm

    options = {"model": "text-completion-openai/tgi", "api_base": f"{url}/v1", "api_key": "none", "temperature": 0}
    whole = litellm.text_completion(prompt=RAW, max_tokens=32, **options)
    chunks = list(litellm.text_completion(prompt=RAW, max_tokens=32, stream=True, **options))
    return {
        "text": whole.choices[0].text,
        "streamed": "".join(chunk.choices[0].text or "" for chunk in chunks),
    }


def litellm_errors(url: str) -> Any:
    import litellm

    options = {"model": "openai/tgi", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
    try:
        litellm.completion(messages=MESSAGES, temperature=-1, **options)
    except litellm.exceptions.APIError as error:
        return [type(error).__name__, error.status_code, str(error)]
    except Exception as error:
        return [type(error).__name__, getattr(error, "status_code", None), str(error)]
    return None


def langchain_generate(url: str) -> Any:
    from langchain_huggingface import HuggingFaceEndpoint

    model = HuggingFaceEndpoint(endpoint_url=url, max_new_tokens=32, **_greedy())
    return {
        "text": model.invoke(RAW),
        "streamed": "".join(model.stream(RAW)),
        "stopped": model.invoke(RAW, stop=["is"]),
    }


def langchain_chat(url: str) -> Any:
    from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint

    model = ChatHuggingFace(llm=HuggingFaceEndpoint(endpoint_url=url, max_new_tokens=32, **_greedy()), temperature=0)
    whole = model.invoke(QUESTION)
    chunks = list(model.stream(QUESTION))
    return {
        "text": whole.content,
        "streamed": "".join(chunk.content for chunk in chunks),
        "finish": whole.response_metadata["finish_reason"],
        "usage": whole.usage_metadata["output_tokens"],
    }


def _greedy() -> dict[str, Any]:
    """Langchain's defaults sample; these are what its documentation says for greedy text."""
    return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "typical_p": None}


LIBRARIES: dict[str, tuple[Call, ...]] = {
    "huggingface_hub": (hub_generate, hub_errors, hub_chat, hub_async_chat, hub_structured),
    "text_generation": (tgi_generate, tgi_errors, tgi_chat, tgi_async_generate, tgi_structured),
    "litellm": (litellm_chat, litellm_completion, litellm_errors, litellm_structured),
    "langchain_huggingface": (langchain_generate, langchain_chat, langchain_structured),
    "sse": (httpx_sse_stream, sseclient_stream, sse_splits),
}


def main() -> None:
    """Entry point."""
    url, *libraries = sys.argv[1:]
    results: dict[str, Any] = {}
    for library in libraries:
        for call in LIBRARIES[library]:
            try:
                results[call.__name__] = call(url)
            except BaseException:
                results[call.__name__] = {"failure": traceback.format_exc()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
