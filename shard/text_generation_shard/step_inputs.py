"""One step laid out as flat arrays, and the limits that bound every step."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from text_generation_proto.columns import Int32Array

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class BatchLimits:
    """What bounds a plan."""

    vocab_size: int
    block_size: int
    num_blocks: int
    max_num_sequences: int
    max_step_tokens: int
    max_sequence_length: int

    @property
    def max_blocks_per_sequence(self) -> int:
        """Width of the block table matrix."""
        return -(-self.max_sequence_length // self.block_size)


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """The prompt tokens of a step whose log-probabilities are asked for."""

    sequence_ids: Int32Array  # [num_sequences]
    first_positions: Int32Array  # [num_sequences] where in its sequence the first of them stands
    num_tokens: Int32Array  # [num_sequences]
    indices: Int64Array  # [total] the flat index of the token before each
    token_ids: Int64Array  # [total]
    top_n_tokens: int  # the most that any of the sequences asked for


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step laid out for the model: sequences in batch order, their tokens one after another."""

    rows: Int64Array  # [num_sequences] batch rows that compute something
    input_ids: Int64Array  # [num_tokens]; of a decoding row: the last token that `settle` was told
    positions: Int64Array  # [num_tokens]
    slot_mapping: Int64Array  # [num_tokens]
    query_starts: Int32Array  # [num_sequences + 1]
    sequence_lengths: Int32Array  # [num_sequences] tokens attended to, this step's included
    is_decoding: BoolArray  # [num_sequences] rows whose one token was sampled by an earlier step
    max_query_length: int
    max_sequence_length: int
    sampling_rows: Int64Array  # [num_samples] batch rows that reach their last known token
    sampling_indices: Int64Array  # [num_samples] the flat index of that token
    sampling_positions: Int64Array  # [num_samples] where in its sequence the sampled token will stand
    prompt: PromptInputs | None = None  # None: nobody asked

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return len(self.input_ids)

    @property
    def num_samples(self) -> int:
        """Rows that sample a token."""
        return len(self.sampling_rows)
