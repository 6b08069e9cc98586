"""Tokens from logits: the best one, or one at random after temperature, top-k, top-p, min-p and typical-p.

Everything happens on the device and nothing depends on the host reading it, so a graph can hold it. No vocabulary is
sorted: thresholds are searched by digits of the logits' bits, four at a time. Rows that need no search leave its
kernels at once. Same seed and position, same token, whatever else is in the batch.
"""

from typing import NamedTuple

import torch
import triton

from text_generation_kernels import reference_sampling as reference
from text_generation_kernels.dispatch import runs_kernel
from text_generation_kernels.launch_settings import launch_settings
from text_generation_kernels.sampling_kernels import (
    choice_kernel,
    distribution_kernel,
    kept_mass_kernel,
    mass_kernel,
    statistics_kernel,
)
from text_generation_kernels.sampling_search import WAYS, search_kernel, settle_kernel

TILE = 4096  # tokens a program takes
MAX_VOCAB_SIZE = 1 << 22  # weights of 2**40 still sum to less than 2**63
DIGIT_BITS = 4
# How many of a logit's 32 bits, as float32, can differ from zero; rounded up to whole digits.
KEY_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}


class Sampled(NamedTuple):
    """One token for each row."""

    tokens: torch.Tensor  # [B] int64
    logprobs: torch.Tensor  # [B] float32, after all that filtered the row; the model's own where the row is greedy
    is_finite: torch.Tensor  # [B] bool; False: the row held NaN or infinity and its token means nothing


class SamplingParameters(NamedTuple):
    """A value for each row, on the logits' device."""

    temperatures: torch.Tensor  # [B] float32; 0: the best token, and nothing below counts
    top_k: torch.Tensor  # [B] int32 or int64; 0: off
    top_p: torch.Tensor  # [B] float32; 1: off
    min_p: torch.Tensor  # [B] float32; 0: off
    typical_p: torch.Tensor  # [B] float32; 1: off
    seeds: torch.Tensor  # [B] int64
    positions: torch.Tensor  # [B] int64: the token's place in its sequence


def choose_best(logits: torch.Tensor) -> Sampled:
    """The best token of each row: one pass over the logits."""  # [B, V]
    if not runs_kernel(logits):
        return Sampled(*reference.choose_best(logits), reference.finite_rows(logits))
    return _sample(logits, None)


def sample(logits: torch.Tensor, parameters: SamplingParameters) -> Sampled:
    """A token for each row, by the row's own parameters."""  # [B, V]
    assert all(column.shape == logits.shape[:1] for column in parameters)
    if not runs_kernel(logits):
        return Sampled(*reference.sample(logits, *parameters), reference.finite_rows(logits))
    return _sample(logits, parameters)


def final_logprobs(logits: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """Log-probability of every token as `sample` would report it, -inf for one that it never chooses."""
    # [B, V] -> [B, V] float32
    if not runs_kernel(logits):
        return reference.final_logprobs(logits, *parameters[:5])
    result = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        work = _Scratch(logits)
        _measure(logits, work)
        _find_kept_tokens(logits, parameters, work)
        distribution_kernel[work.grid](
            logits, parameters.temperatures, parameters.min_p, work.tile_max, work.tile_sum, work.limits, work.typical,
            work.tile_mass, work.tile_ties, result, logits.stride(0), logits.shape[1], LOW_BITS=work.low_bits,
            TILE=TILE, **work.tiling, **launch_settings("sampling_search", logits.device),
        )  # fmt: skip
    return result


class _Scratch:
    """What the kernels of one call leave for each other. Searches alternate between two sets of columns."""

    def __init__(self, logits: torch.Tensor) -> None:
        batch, vocab_size = logits.shape
        assert vocab_size <= MAX_VOCAB_SIZE
        assert logits.stride(1) == 1
        num_tiles = triton.cdiv(vocab_size, TILE)
        self.grid = (num_tiles, batch)
        self.tiling = {"NUM_TILES": num_tiles, "PADDED_TILES": max(2, triton.next_power_of_2(num_tiles))}
        self.low_bits = 32 - KEY_BITS[logits.dtype]
        device = logits.device
        self.tile_max = torch.empty(batch, num_tiles, dtype=torch.float32, device=device)
        self.tile_sum = torch.empty(batch, num_tiles, dtype=torch.float32, device=device)
        self.tile_best = torch.empty(batch, num_tiles, dtype=torch.int32, device=device)
        self.tile_ties = torch.empty(batch, num_tiles, dtype=torch.int32, device=device)
        self.tile_mass = torch.empty(batch, num_tiles, dtype=torch.int64, device=device)
        self.measures = torch.empty(2, batch, num_tiles, WAYS.value, dtype=torch.int64, device=device)
        # Two tensors: the second half of one would be aligned for some batches alone, and be compiled for twice.
        self.state = [torch.empty(batch, 3, dtype=torch.int64, device=device) for _ in range(2)]
        self.limits = torch.empty(batch, 2, dtype=torch.int64, device=device)
        self.typical = torch.empty(batch, 2, dtype=torch.float32, device=device)
        self.tokens = torch.empty(batch, dtype=torch.int64, device=device)
        self.logprobs = torch.empty(batch, dtype=torch.float32, device=device)
        self.is_finite = torch.empty(batch, dtype=torch.bool, device=device)

    @property
    def searched(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the last pass of a search leaves its state and measures."""
        last = ((32 - self.low_bits) // DIGIT_BITS - 1) % 2
        return self.state[last], self.measures[last]


def _sample(logits: torch.Tensor, parameters: SamplingParameters | None) -> Sampled:
    work = _Scratch(logits)
    if logits.shape[0]:
        _measure(logits, work)
        if parameters is not None:
            _find_kept_tokens(logits, parameters, work)
        _choose(logits, parameters, work)
    return Sampled(work.tokens, work.logprobs, work.is_finite)


def _measure(logits: torch.Tensor, work: _Scratch) -> None:
    statistics_kernel[work.grid](
        logits, work.tile_max, work.tile_best, work.tile_sum, logits.stride(0), logits.shape[1],
        NUM_TILES=work.grid[0], TILE=TILE, **launch_settings("sampling_statistics", logits.device),
    )  # fmt: skip


def _find_kept_tokens(logits: torch.Tensor, parameters: SamplingParameters, work: _Scratch) -> None:
    """Top-k and top-p, top-p again where both are on (of what top-k left), then the rest."""
    settings = launch_settings("sampling_search", logits.device)
    stride, vocab_size = logits.stride(0), logits.shape[1]
    shared = (logits, parameters.temperatures, parameters.top_k, parameters.top_p, work.tile_max)
    for is_after_top_k in (False, True):
        mass_kernel[work.grid](
            *shared, work.tile_mass, *work.searched, stride, vocab_size, AFTER_TOP_K=is_after_top_k,
            LOW_BITS=work.low_bits, TILE=TILE, **work.tiling, **settings,
        )  # fmt: skip
        for index, shift in enumerate(range(32 - DIGIT_BITS, work.low_bits - 1, -DIGIT_BITS)):
            old, new = (index + 1) % 2, index % 2
            search_kernel[work.grid](
                *shared, work.tile_mass, work.state[old], work.measures[old], work.state[new], work.measures[new],
                stride, vocab_size, shift, IS_FIRST=index == 0, AFTER_TOP_K=is_after_top_k, TILE=TILE,
                **work.tiling, **settings,
            )  # fmt: skip
    settle_kernel[(logits.shape[0],)](
        *shared[:4], parameters.min_p, parameters.typical_p, work.tile_max, *work.searched, work.limits, work.typical,
        stride, vocab_size, LOW_BITS=work.low_bits, **work.tiling, **launch_settings("sampling_settle", logits.device),
    )  # fmt: skip
    kept_mass_kernel[work.grid](
        logits, parameters.temperatures, parameters.min_p, work.tile_max, work.limits, work.typical, work.tile_mass,
        work.tile_ties, stride, vocab_size, LOW_BITS=work.low_bits, TILE=TILE, **work.tiling, **settings,
    )  # fmt: skip


def _choose(logits: torch.Tensor, parameters: SamplingParameters | None, work: _Scratch) -> None:
    settings = launch_settings("sampling_choice", logits.device)
    columns: tuple[torch.Tensor | None, ...] = (None, None, None, None)
    if parameters is not None:
        columns = (parameters.temperatures, parameters.min_p, parameters.seeds, parameters.positions)
    choice_kernel[(logits.shape[0],)](
        logits, *columns, work.tile_max, work.tile_best, work.tile_sum, work.limits, work.typical, work.tile_mass,
        work.tile_ties, work.tokens, work.logprobs, work.is_finite, logits.stride(0), logits.shape[1],
        HAS_RANDOM=parameters is not None, LOW_BITS=work.low_bits, TILE=TILE, **work.tiling, **settings,
    )  # fmt: skip
