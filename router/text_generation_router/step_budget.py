"""What a step may cost: its token budget where the user sets none, and what attention to a long context counts.

Running streams wait for their next token while a prompt is computed beside them: by default as long as the products of
a step take, `PRODUCTS_S`.
"""

import math

# From so many rows on arithmetic decides how long products take, not reading the weights: the two bytes of a weight
# take a GPU of the table as long as the arithmetic of 20 (H20) to 300 (L40S) tokens. Budgets are multiples of it:
# steps of these sizes are recorded.
MIN_STEP_TOKENS = 256
# Recorded steps end here, and the products of more rows are no faster for each.
MAX_STEP_TOKENS = 2048
PRODUCTS_S = 0.03
# Of the published rate. An H100 reached 0.71 of it with 2048 rows of the 8B shape: 41 ms.
REACHED_SHARE = 0.7
# The rate of attention to a long context in that of the products: 430 and 700 TFLOP/s on an H100.
ATTENTION_SHARE = 0.6

# Word in the device's name -> dense 16-bit products with float32 sums, TFLOP/s. The first that fits counts.
PUBLISHED_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "H20": 148,
    "A100": 312,
    "NVIDIA A30": 165,
    "NVIDIA A40": 150,
    "NVIDIA A10G": 70,
    "NVIDIA A10": 125,
    "RTX A6000": 155,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "6000 Ada": 364,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def default_step_tokens(device_name: str, num_layer_weights: int) -> int:
    """Tokens of a step on this GPU, where each of its ranks multiplies a token with so many weights.

    The most that there may be where the GPU is not in the table, or the shard does not tell.
    """
    tflops = next((tflops for word, tflops in PUBLISHED_TFLOPS.items() if word in device_name), None)
    if tflops is None or not num_layer_weights:
        return MAX_STEP_TOKENS
    # A multiplication and an addition for each weight.
    wanted = PRODUCTS_S * REACHED_SHARE * tflops * 1e12 / (2 * num_layer_weights)
    return min(MAX_STEP_TOKENS, max(1, round(wanted / MIN_STEP_TOKENS)) * MIN_STEP_TOKENS)


def equal_context(num_layer_weights: int, num_context_features: int) -> float:
    """Tokens of context to which attention takes a token as long as all products of the layers do.

    A rank multiplies a token with so many weights, and so many features of its queries with each key, and as many
    again with each value. Infinite where the shard tells neither, or no layer attends to the whole context.
    """
    if not num_layer_weights or not num_context_features:
        return math.inf
    return ATTENTION_SHARE * num_layer_weights / (2 * num_context_features)
