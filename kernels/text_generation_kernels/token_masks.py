"""Grammars in the sampler: tokens that a row's mask excludes become impossible before anything else is decided.

A mask has a bit for each token, 32 in a word, the lowest first. Rows without a mask cost a program that ends at once.
"""

import torch
import triton
import triton.language as tl

from text_generation_kernels import reference
from text_generation_kernels.dispatch import runs_kernel

WORD_BITS = 32
NO_MASK = -1
_TILE = 4096


def num_words(vocab_size: int) -> int:
    """Words of one mask."""
    return -(-vocab_size // WORD_BITS)


def mask_tokens(logits: torch.Tensor, masks: torch.Tensor, mask_rows: torch.Tensor) -> None:
    """Set, in place, the logits of excluded tokens to -inf; `mask_rows` names each row's mask, or NO_MASK."""
    # [B, V], [M, num_words(V)] int32, [B] int32
    batch, vocab_size = logits.shape
    assert mask_rows.shape == (batch,)
    assert masks.shape[1] == num_words(vocab_size)
    assert masks.is_contiguous()
    if not runs_kernel(logits):
        reference.mask_tokens(logits, masks, mask_rows)
    elif batch:
        grid = (triton.cdiv(vocab_size, _TILE), batch)
        mask_tokens_kernel[grid](
            logits,
            masks,
            mask_rows,
            logits.stride(0),
            masks.shape[1],
            vocab_size,
            TILE=_TILE,
            num_warps=8,
            enable_fp_fusion=True,
        )


@triton.jit
def mask_tokens_kernel(logits, masks, mask_rows, row_stride, num_words, vocab_size, TILE: tl.constexpr):
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    mask_row = tl.load(mask_rows + row).to(tl.int64)
    if mask_row < 0:
        return
    columns = tile * TILE + tl.arange(0, TILE)
    is_token = columns < vocab_size
    words = tl.load(masks + mask_row * num_words + (columns >> 5), is_token, other=-1)
    is_excluded = ((words >> (columns & 31)) & 1) == 0
    excluded = tl.full((TILE,), float("-inf"), logits.dtype.element_ty)
    tl.store(logits + row * row_stride + columns, excluded, is_token & is_excluded)
