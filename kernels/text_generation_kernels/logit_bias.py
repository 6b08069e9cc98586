"""Values added to the logits of single tokens, and tokens that may not be chosen yet, by row of the batch."""

import torch
import triton
import triton.language as tl

from text_generation_kernels.dispatch import runs_kernel

# Tokens of one row that a bias or a ban can name.
MAX_ENTRIES = 1024
_BLOCK = 256


class LogitBias:
    """Each row's list of tokens with what is added to them; the first few of a list are banned for a while."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        # The last row is that of padding.
        self._token_ids = torch.zeros(num_rows + 1, MAX_ENTRIES, dtype=torch.int32, device=device)
        self._values = torch.zeros(num_rows + 1, MAX_ENTRIES, dtype=torch.float32, device=device)
        # Of each row: entries; how many of them, the first ones, are banned; and before which position.
        self._bounds = torch.zeros(num_rows + 1, 3, dtype=torch.int32, device=device)

    def set(
        self,
        row: int,
        token_ids: torch.Tensor,  # [n] int32, all different; those that are banned come first
        values: torch.Tensor,  # [n] float32
        bounds: torch.Tensor,  # [3] int32: n, how many are banned, before which position
    ) -> None:
        """Replace a row's list."""
        count = len(token_ids)
        assert count <= MAX_ENTRIES
        self._token_ids[row, :count] = token_ids
        self._values[row, :count] = values
        self._bounds[row] = bounds

    def clear(self, row: int) -> None:
        """A row has no list any more."""
        self._bounds[row] = 0

    def add(
        self,
        logits: torch.Tensor,  # [S, V] float32, changed
        rows: torch.Tensor,  # [S] int32
        positions: torch.Tensor,  # [S] int64 of the token that is chosen
    ) -> None:
        """Change the listed tokens' logits."""
        assert logits.dtype == torch.float32
        if not runs_kernel(logits):
            for sample, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
                count, num_banned, end = self._bounds[row].tolist()
                token_ids = self._token_ids[row, :count].long()
                logits[sample, token_ids] += self._values[row, :count]
                if position < end:
                    logits[sample, token_ids[:num_banned]] = -torch.inf
        elif len(logits):
            logit_bias_kernel[(triton.cdiv(MAX_ENTRIES, _BLOCK), len(logits))](
                logits, rows, positions, self._token_ids, self._values, self._bounds, logits.stride(0),
                MAX_ENTRIES=MAX_ENTRIES, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


@triton.jit
def logit_bias_kernel(
    logits, rows, positions, token_ids, values, bounds, row_stride, MAX_ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of one row's list; one beyond its end leaves at once."""
    sample = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + sample).to(tl.int64)
    count = tl.load(bounds + row * 3)
    start = tl.program_id(0) * BLOCK
    if start >= count:
        return
    num_banned = tl.where(tl.load(positions + sample) < tl.load(bounds + row * 3 + 2), tl.load(bounds + row * 3 + 1), 0)
    entries = start + tl.arange(0, BLOCK)
    mask = entries < count
    places = logits + sample * row_stride + tl.load(token_ids + row * MAX_ENTRIES + entries, mask, other=0)
    x = tl.load(places, mask, other=0.0) + tl.load(values + row * MAX_ENTRIES + entries, mask, other=0.0)
    tl.store(places, tl.where(entries < num_banned, float("-inf"), x), mask)
