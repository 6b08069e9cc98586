"""Limits on requests and steps, from flags, model and memory; what contradicts is refused with the flag's name."""

import pytest
from text_generation_router.config import RouterConfig
from text_generation_router.limits import (
    DEFAULT_MAX_NUM_SEQUENCES,
    DEFAULT_MAX_STEP_TOKENS,
    InvalidLimits,
    derive_limits,
    step_limits,
)
from text_generation_router.shard_client import ShardInfo

BLOCK_SIZE = 16


def info_with(max_position_embeddings):
    fields = {"max_position_embeddings": max_position_embeddings, "block_size": BLOCK_SIZE, "vocab_size": 300}
    return ShardInfo(**{name: fields.get(name) for name in ShardInfo.__dataclass_fields__})


@pytest.mark.parametrize(
    ("flags", "num_positions", "num_blocks", "expected"),
    [
        ({}, 2048, 1000, (2047, 2048)),  # the model's positions
        ({}, 2048, 10, (159, 160)),  # the memory
        ({"max_input_tokens": 100}, 2048, 1000, (100, 2048)),
        ({"max_total_tokens": 100}, 2048, 1000, (99, 100)),
        ({"max_input_tokens": 50, "max_total_tokens": 160}, 2048, 10, (50, 160)),
    ],
)
def test_limits_on_requests(flags, num_positions, num_blocks, expected):
    limits = derive_limits(RouterConfig(**flags), info_with(num_positions), num_blocks)
    assert (limits.max_input_tokens, limits.max_total_tokens) == expected
    assert limits.vocab_size == 300


@pytest.mark.parametrize(
    ("flags", "num_blocks", "reason"),
    [
        ({"max_total_tokens": 2049}, 1000, "--max-total-tokens 2049 is more than the 2048 positions"),
        ({"max_total_tokens": 161}, 10, "--max-total-tokens 161 is more than the 160 tokens of KV memory"),
        ({"max_input_tokens": 160}, 10, "--max-input-tokens 160 does not fit"),
        ({"max_input_tokens": 100, "max_total_tokens": 100}, 10, "--max-input-tokens 100 must be below"),
    ],
)
def test_limits_that_contradict(flags, num_blocks, reason):
    with pytest.raises(InvalidLimits, match=reason):
        derive_limits(RouterConfig(**flags), info_with(2048), num_blocks)


@pytest.mark.parametrize(
    ("flags", "num_positions", "expected"),
    [
        ({}, 131_072, (DEFAULT_MAX_STEP_TOKENS, DEFAULT_MAX_NUM_SEQUENCES)),
        ({}, 100, (100, 50)),
        ({"max_batch_prefill_tokens": 1}, 2048, (1, 1)),
        ({"max_batch_prefill_tokens": 1000, "max_batch_size": 32}, 2048, (1000, 32)),
        ({"max_batch_prefill_tokens": 10, "max_batch_size": 32}, 2048, (10, 5)),
    ],
)
def test_limits_on_steps(flags, num_positions, expected):
    assert step_limits(RouterConfig(**flags), info_with(num_positions)) == expected
