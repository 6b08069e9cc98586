"""Sampled tokens stay on the device: one kernel hands them to the next step, one reads them there.

A batch keeps the last token of each of its rows in device memory. A step names the tokens that the host knows, and for
the others the row to take the token from; so a step can be sent before the one ahead of it has ended.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from text_generation_kernels.dispatch import runs_kernel

NUM_OUTPUT_COLUMNS = 3  # token id, the bits of its log-probability, whether the row was finite
_BLOCK = 256


def token_of_row(rows: np.ndarray) -> np.ndarray:
    """What stands in a step's input ids for the last token of a row of the batch."""
    places: np.ndarray = -1 - rows
    return places


def read_tokens(input_ids: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    """The ids themselves, and where one is `token_of_row(row)`, that row's last token."""
    # [T] int32, [rows] int64 -> [T] int64
    if not runs_kernel(input_ids):
        rows = (-1 - input_ids).clamp(min=0).long()
        return torch.where(input_ids < 0, last_tokens[rows], input_ids.long())
    token_ids = torch.empty(input_ids.shape, dtype=torch.int64, device=input_ids.device)
    num_tokens = input_ids.shape[0]
    if num_tokens:
        read_tokens_kernel[(triton.cdiv(num_tokens, _BLOCK),)](
            input_ids, last_tokens, token_ids, num_tokens, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return token_ids


def publish_tokens(
    tokens: torch.Tensor,  # [S] int64
    logprobs: torch.Tensor,  # [S] float32
    is_finite: torch.Tensor,  # [S] bool
    rows: torch.Tensor,  # [S] int32 the batch's row of each
    last_tokens: torch.Tensor,  # [rows] int64, written
    output: torch.Tensor,  # [3, at least S] int32, written: what the host reads
) -> None:
    """Keep the sampled tokens for the next step and lay them out for the host's one read."""
    num_samples = tokens.shape[0]
    assert output.shape[0] == NUM_OUTPUT_COLUMNS
    assert output.shape[1] >= num_samples
    if not runs_kernel(tokens):
        last_tokens[rows.long()] = tokens
        output[0, :num_samples] = tokens
        output[1, :num_samples] = logprobs.view(torch.int32)
        output[2, :num_samples] = is_finite
    elif num_samples:
        publish_tokens_kernel[(triton.cdiv(num_samples, _BLOCK),)](
            tokens, logprobs, is_finite, rows, last_tokens, output, output.stride(0), num_samples,
            BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def read_tokens_kernel(input_ids, last_tokens, token_ids, num_tokens, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = places < num_tokens
    ids = tl.load(input_ids + places, mask, other=0).to(tl.int64)
    sampled = tl.load(last_tokens + (-1 - ids), mask & (ids < 0), other=0)
    tl.store(token_ids + places, tl.where(ids < 0, sampled, ids), mask)


@triton.jit(do_not_specialize=["num_samples", "output_stride"])
def publish_tokens_kernel(
    tokens, logprobs, is_finite, rows, last_tokens, output, output_stride, num_samples, BLOCK: tl.constexpr
):  # fmt: skip
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = places < num_samples
    ids = tl.load(tokens + places, mask, other=0)
    tl.store(last_tokens + tl.load(rows + places, mask, other=0), ids, mask)
    tl.store(output + places, ids.to(tl.int32), mask)
    bits = tl.load(logprobs + places, mask, other=0.0).to(tl.int32, bitcast=True)
    tl.store(output + output_stride + places, bits, mask)
    tl.store(output + 2 * output_stride + places, tl.load(is_finite + places, mask, other=0).to(tl.int32), mask)
