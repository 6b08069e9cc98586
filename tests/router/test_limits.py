"""Limits on requests and steps, from flags, model and memory; what contradicts is refused with the flag's name."""

import pytest
from text_generation_router.config import RouterConfig
from text_generation_router.limits import (
    DEFAULT_MAX_NUM_SEQUENCES,
    InvalidLimits,
    derive_limits,
    step_limits,
)
from text_generation_router.scheduler import SchedulerLimits
from text_generation_router.shard_client import ShardInfo
from text_generation_router.step_budget import MAX_STEP_TOKENS, MIN_STEP_TOKENS

BLOCK_SIZE = 16
H100 = "NVIDIA H100 80GB HBM3"
WEIGHTS_8B = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14_336)


def info_with(max_position_embeddings, device_name="cpu", num_layer_weights=1000, num_context_features=0):
    return ShardInfo(
        device_name, "bfloat16", 300, max_position_embeddings, BLOCK_SIZE, num_layer_weights, num_context_features
    )


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
        ({}, 131_072, (MAX_STEP_TOKENS, DEFAULT_MAX_NUM_SEQUENCES)),
        ({}, 100, (100, 66)),
        ({"max_batch_total_tokens": 500}, 131_072, (500, 333)),
        ({"max_batch_prefill_tokens": 1}, 2048, (1, 1)),
        ({"max_batch_prefill_tokens": 1000, "max_batch_size": 32}, 2048, (1000, 32)),
        ({"max_batch_prefill_tokens": 10, "max_batch_size": 32}, 2048, (10, 6)),
    ],
)
def test_limits_on_steps(flags, num_positions, expected):
    assert step_limits(RouterConfig(**flags), info_with(num_positions)) == SchedulerLimits(*expected)


@pytest.mark.parametrize(
    ("device_name", "num_layer_weights", "budget"),
    [
        (H100, WEIGHTS_8B, 1536),
        ("NVIDIA H200", WEIGHTS_8B, 1536),
        ("NVIDIA A100-SXM4-80GB", WEIGHTS_8B, 512),
        ("NVIDIA GeForce RTX 4090", WEIGHTS_8B, 256),
        ("NVIDIA L40S", WEIGHTS_8B, 512),
        ("NVIDIA L40", WEIGHTS_8B, 256),
        ("NVIDIA L4", WEIGHTS_8B, 256),
        (H100, 31 * 10**9, 256),
        ("NVIDIA A100-SXM4-80GB", 10**9, MAX_STEP_TOKENS),
        ("NVIDIA A100-SXM4-80GB", 68 * 10**9, MIN_STEP_TOKENS),
        ("NVIDIA A100-SXM4-80GB", 68 * 10**9 // 8, 512),  # a rank's share
        ("a GPU of another make", 68 * 10**9, MAX_STEP_TOKENS),
    ],
)
def test_the_derived_budget_follows_gpu_and_model(device_name, num_layer_weights, budget):
    info = info_with(131_072, device_name, num_layer_weights)
    assert step_limits(RouterConfig(), info) == SchedulerLimits(budget, min(DEFAULT_MAX_NUM_SEQUENCES, budget * 2 // 3))
    assert step_limits(RouterConfig(max_batch_prefill_tokens=100), info).max_step_tokens == 100


def test_a_context_counts_as_much_as_its_attention_takes():
    features = 32 * 32 * 128
    equal_context = step_limits(RouterConfig(), info_with(131_072, H100, WEIGHTS_8B, features)).equal_context_tokens
    # As an H100 measured them: 700 TFLOP/s products, 430 TFLOP/s attention; keys and values, multiplied and added.
    products_s, attention_s = 2 * WEIGHTS_8B / 700e12, 2 * 2 * features * equal_context / 430e12
    assert attention_s == pytest.approx(products_s, rel=0.05)
