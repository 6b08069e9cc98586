"""Penalties for tokens that a sequence has seen, and the record of those tokens that stays on the device.

A record is a row of int16 as wide as the vocabulary: twice the number of times a token counts, plus one if it stands
in the prompt without counting. The host cannot know a row's last tokens when it sends the next step, so the record is
brought up to date on the device, one kernel a step. Every row of the batch has one from the start, though few sequences
have penalties: so the memory is there before that of keys and values is sized, and no sequence can fail for want of it.
With Llama-3.1's vocabulary a record takes 256 KB, as two of the 8B model's tokens in the KV cache. A list of (token,
count) for each row would be smaller for a short sequence, but must be searched for each new token and is larger than
this for a long one.
"""

import torch
import triton
import triton.language as tl

from text_generation_kernels.dispatch import runs_kernel

MAX_COUNT = (1 << 14) - 1
# Repetition: logits of seen tokens are divided by it where positive, multiplied where negative. Frequency: taken away
# for each time a token counts. Presence: taken away once from a token that counts. Share: taken away times the share
# of the row's tokens so far.
NO_PENALTIES = (1.0, 0.0, 0.0, 0.0)
_BLOCK = 2048
_COUNT_BLOCK = 256


class TokenRecords:
    """Records of a batch's rows."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        # Nothing is read of a row before `start`; so on a CPU a row takes no memory before.
        self._records = torch.empty(num_rows, vocab_size, dtype=torch.int16, device=device)

    def start(self, row: int, token_ids: torch.Tensor, values: torch.Tensor) -> None:
        """Begin a row's record with these tokens."""  # [n] int64, [n] int16
        self._records[row].zero_().index_copy_(0, token_ids, values)

    def penalize(
        self,
        logits: torch.Tensor,  # [S, V] float32, changed
        rows: torch.Tensor,  # [S] int32
        positions: torch.Tensor,  # [S] int64 how many tokens each row has
        penalties: torch.Tensor,  # [num_rows + 1, 4] float32 for each row; see NO_PENALTIES
    ) -> None:
        """Make seen tokens less likely, in rows that have penalties; those were started."""
        num_samples, vocab_size = logits.shape
        assert logits.dtype == torch.float32
        assert logits.stride(1) == 1
        assert vocab_size == self._records.shape[1]
        if runs_kernel(logits):
            if num_samples:
                penalize_kernel[(triton.cdiv(vocab_size, _BLOCK), num_samples)](
                    logits, rows, positions, penalties, self._records, logits.stride(0), vocab_size, BLOCK=_BLOCK,
                    num_warps=4, enable_fp_fusion=False,
                )  # fmt: skip
            return
        for sample in self._with_penalties(rows, penalties):
            row = int(rows[sample])
            repetition, frequency, presence, share = penalties[row].tolist()
            seen = self._records[row].nonzero().squeeze(1)
            counts = self._records[row, seen] >> 1
            scores = logits[sample, seen]
            scores = torch.where(scores > 0, scores / repetition, scores * repetition)
            scores -= counts * (frequency + share / int(positions[sample])) + (counts > 0) * presence
            logits[sample, seen] = scores

    def count(self, tokens: torch.Tensor, rows: torch.Tensor, penalties: torch.Tensor) -> None:
        """Count one more token of each row that has penalties."""  # [S] int64, [S] int32, [num_rows + 1, 4]
        if runs_kernel(tokens):
            if len(tokens):
                count_kernel[(triton.cdiv(len(tokens), _COUNT_BLOCK),)](
                    tokens, rows, penalties, self._records, len(tokens), self._records.shape[1],
                    MAX_COUNT=MAX_COUNT, BLOCK=_COUNT_BLOCK, num_warps=4, enable_fp_fusion=False,
                )  # fmt: skip
            return
        for sample in self._with_penalties(rows, penalties):
            record, token = self._records[int(rows[sample])], int(tokens[sample])
            if record[token] >> 1 < MAX_COUNT:
                record[token] += 2

    @staticmethod
    def _with_penalties(rows: torch.Tensor, penalties: torch.Tensor) -> list[int]:
        is_set = (penalties[rows.long()] != torch.tensor(NO_PENALTIES)).any(dim=1)
        samples: list[int] = is_set.nonzero().squeeze(1).tolist()
        return samples


@triton.jit
def _load_penalties(penalties, rows, mask):
    repetition = tl.load(penalties + rows * 4, mask, other=1.0)
    frequency = tl.load(penalties + rows * 4 + 1, mask, other=0.0)
    presence = tl.load(penalties + rows * 4 + 2, mask, other=0.0)
    share = tl.load(penalties + rows * 4 + 3, mask, other=0.0)
    has_any = (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0) | (share != 0.0)
    return repetition, frequency, presence, share, has_any


@triton.jit
def penalize_kernel(
    logits, rows, positions, penalties, records, row_stride, vocab_size, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one row's logits; a row without penalties leaves at once."""
    sample = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + sample)
    repetition, frequency, presence, share, has_any = _load_penalties(penalties, row, True)
    if not has_any:
        return
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocab_size
    value = tl.load(records + row.to(tl.int64) * vocab_size + columns, mask, other=0)
    count = value >> 1
    x = tl.load(logits + sample * row_stride + columns, mask, other=0.0)
    x = tl.where(value != 0, tl.where(x > 0, x / repetition, x * repetition), x)
    each = frequency + share / tl.load(positions + sample).to(tl.float32)
    x -= count.to(tl.float32) * each + tl.where(count > 0, presence, 0.0)
    tl.store(logits + sample * row_stride + columns, x, mask)


@triton.jit(do_not_specialize=["num_samples"])
def count_kernel(
    tokens, rows, penalties, records, num_samples, vocab_size, MAX_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    samples = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = samples < num_samples
    row = tl.load(rows + samples, mask, other=0)
    _, _, _, _, has_any = _load_penalties(penalties, row, mask)
    mask = mask & has_any
    places = records + row.to(tl.int64) * vocab_size + tl.load(tokens + samples, mask, other=0)
    value = tl.load(places, mask, other=0)
    tl.store(places, value + 2, mask & ((value >> 1) < MAX_COUNT))
