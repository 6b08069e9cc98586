"""POST /invocations: SageMaker's one route for bodies of all dialects, told apart by their fields."""

from aiohttp import web

from text_generation_router.api.body import read_body
from text_generation_router.api.chat import answer_chat
from text_generation_router.api.completions import answer_completions
from text_generation_router.api.generate import answer_compatible
from text_generation_router.api.generation import GenerationRequest
from text_generation_router.errors import ValidationError

_DIALECTS = {"inputs": answer_compatible, "messages": answer_chat, "prompt": answer_completions}


async def invocations(request: web.Request) -> web.StreamResponse:
    """Answer as `/` does, or as OpenAI's routes do; errors have TGI's shape."""
    async with GenerationRequest(request) as record:
        body = await read_body(request)
        for name, answer in _DIALECTS.items():
            if body.get(name) is not None:
                return await answer(record, body)
        raise ValidationError("the body must have `inputs`, `messages` or `prompt`")
