"""The parameters that every dialect has under one name and type; their ranges are the validator's."""

from text_generation_router.api.fields import Fields
from text_generation_router.generation_options import GenerationOptions


def read_shared_options(fields: Fields, is_stream: bool) -> GenerationOptions:
    """What the dialects share; each replaces what means something else to it and adds its own."""
    return GenerationOptions(
        temperature=fields.number("temperature"),
        top_k=fields.integer("top_k"),
        top_p=fields.number("top_p"),
        typical_p=fields.number("typical_p"),
        seed=fields.integer("seed"),
        stop=fields.strings("stop"),
        ignore_eos=fields.boolean("ignore_eos"),
        repetition_penalty=fields.number("repetition_penalty"),
        best_of=fields.integer("best_of"),
        priority=fields.integer("priority"),
        is_stream=is_stream,
    )
