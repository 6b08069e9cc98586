"""Sampling on a GPU for steps in which a row changes its logits or wants to know the most likely tokens.

Such steps are launched kernel by kernel, a piece of the rows at a time: float32 logits of a whole batch would take
memory that is the KV cache's otherwise. No other step pays for any of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from text_generation_kernels.sampling import Sampled, SamplingParameters, choose_best, final_logprobs, sample

from text_generation_shard.changed_logits import ChangedLogits, Watermark
from text_generation_shard.sampling_columns import MAX_TOP_N_TOKENS, RowChange, SamplingColumns
from text_generation_shard.step import TopTokens
from text_generation_shard.step_buffers import to_device, to_host
from text_generation_shard.step_inputs import Int64Array
from text_generation_shard.token_scores import find_candidates, tell_top_tokens

ROWS_AT_ONCE = 128


class _Piece(NamedTuple):
    """Candidates on their way to the host."""

    logprobs: torch.Tensor
    token_ids: torch.Tensor
    samples: Int64Array
    wanted: np.ndarray


class TopTokensUnderway:
    """The most likely tokens of a step that has not ended yet."""

    def __init__(self, pieces: list[_Piece], num_samples: int) -> None:
        self._pieces = pieces
        self._num_samples = num_samples

    def tell(self) -> TopTokens:
        """Once the device has ended the step."""
        told = [
            tell_top_tokens(
                piece.logprobs.numpy(), piece.token_ids.numpy(), piece.samples, piece.wanted, self._num_samples
            )
            for piece in self._pieces
        ]
        return TopTokens(
            np.sum([top.num_tokens for top in told], axis=0, dtype=np.int32),
            np.concatenate([top.token_ids for top in told]),
            np.concatenate([top.logprobs for top in told]),
        )


class ChangedHead:
    """Holds what changes logits, and samples with it."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device, watermark: Watermark) -> None:
        self._device = device
        self._changed = ChangedLogits(num_rows, vocab_size, device, watermark)

    def update(self, row_changes: list[RowChange]) -> None:
        """See ChangedLogits."""
        self._changed.update(row_changes)

    def run_worst_case(
        self,
        logits: torch.Tensor,  # [S, V]
        parameters: SamplingParameters,
        rows: torch.Tensor,  # [S] int32, of rows that have nothing set
        previous: torch.Tensor,  # [S] int64
    ) -> torch.Tensor:
        """As much as `choose` may launch and take for one piece; answers the changed logits."""
        piece = slice(0, ROWS_AT_ONCE)
        own = SamplingParameters(*(column[piece] for column in parameters))
        changed = self._changed.launch_all(logits[piece], rows[piece], own.positions, previous[piece])
        choose_best(changed)
        sample(changed, own)
        index = torch.arange(len(changed), device=self._device)
        find_candidates(final_logprobs(changed[index], own), MAX_TOP_N_TOKENS)
        return changed

    def choose(
        self,
        logits: torch.Tensor,  # [S, V]
        parameters: SamplingParameters,
        rows: torch.Tensor,  # [S] int32
        previous: torch.Tensor,  # [S] int64 the token before each that is chosen
        batch_rows: Int64Array,  # [S] `rows` on the host
        sampling: SamplingColumns,
        mask: Callable[[torch.Tensor, slice], None],
        publish: Callable[[Sampled, slice], torch.Tensor],
    ) -> TopTokensUnderway | None:
        """Hand each piece's changed logits to `mask`, and what is sampled to `publish`, which answers the tokens.

        Answers what is told beside the tokens, None if no row asked.
        """
        pieces = []
        for start in range(0, len(batch_rows), ROWS_AT_ONCE):
            piece = slice(start, start + ROWS_AT_ONCE)
            own_rows, own_parameters = batch_rows[piece], SamplingParameters(*(column[piece] for column in parameters))
            own_logits = self._changed.apply(
                logits[piece],
                own_rows,
                sampling.has_watermark[own_rows],
                rows[piece],
                own_parameters.positions,
                previous[piece],
            )
            mask(own_logits, piece)
            has_random = bool((sampling.temperatures[own_rows] > 0).any())
            sampled = sample(own_logits, own_parameters) if has_random else choose_best(own_logits)
            self._changed.count(publish(sampled, piece), own_rows, rows[piece])
            samples = np.flatnonzero(sampling.top_n_tokens[own_rows])
            if len(samples):
                wanted = sampling.top_n_tokens[own_rows[samples]]
                pieces.append(self._find_top_tokens(own_logits, own_parameters, samples, wanted, start))
        return TopTokensUnderway(pieces, len(batch_rows)) if pieces else None

    def _find_top_tokens(
        self, logits: torch.Tensor, parameters: SamplingParameters, samples: Int64Array, wanted: np.ndarray, start: int
    ) -> _Piece:
        index = to_device(samples, self._device)
        final = final_logprobs(logits[index], SamplingParameters(*(column[index] for column in parameters)))
        best = find_candidates(final, int(wanted.max()))
        return _Piece(to_host(best.logprobs), to_host(best.token_ids), samples + start, wanted)
