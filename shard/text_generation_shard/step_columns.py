"""The columns that a step on a GPU sends there in one copy: tokens, sampling rows, block tables' changes, plans."""

from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
import torch
from text_generation_kernels.attention_layout import AttentionLayout
from text_generation_kernels.sampling import SamplingParameters
from text_generation_kernels.token_exchange import token_of_row

from text_generation_shard.input_batch import InputBatch
from text_generation_shard.step_buffers import Array, StepBuffers
from text_generation_shard.step_inputs import StepInputs

# Places of the block tables that one copy can change; a step that changes more takes several.
MAX_TABLE_CHANGES = 1024
NO_SLOT = -1

# "short": a few tokens of each sequence, as where all of them decode, and in all no more than there may be sequences.
Kind = Literal["short", "mixed"]
KINDS: tuple[Kind, ...] = ("short", "mixed")


def plan_name(kind: Kind, window: int | None) -> str:
    """The column of a kind's attention plan for layers of this sliding window."""
    return f"{kind} attention plan, window {window}"


def step_buffers(
    num_rows: int, layouts: Mapping[Kind, AttentionLayout], windows: Collection[int | None], device: torch.device
) -> StepBuffers:
    """Buffers for steps of up to so many sequences and of as many tokens as mixed ones hold."""
    num_tokens = layouts["mixed"].max_tokens
    columns: dict[str, tuple[type[np.generic], int]] = {
        "sampling_indices": (np.int32, num_rows),
        "sampling_rows": (np.int32, num_rows),
        "temperatures": (np.float32, num_rows),
        "top_k": (np.int32, num_rows),
        "top_p": (np.float32, num_rows),
        "min_p": (np.float32, num_rows),
        "typical_p": (np.float32, num_rows),
        "seeds": (np.int64, num_rows),
        "sampling_positions": (np.int64, num_rows),
        "mask_rows": (np.int32, num_rows),
        "changed_places": (np.int64, MAX_TABLE_CHANGES),
        "changed_blocks": (np.int32, MAX_TABLE_CHANGES),
        "input_ids": (np.int32, num_tokens),
        "positions": (np.int32, num_tokens),
        "slots": (np.int32, num_tokens),
    }
    # The plans of mixed steps come last: a step of short queries is sent without them.
    for kind in KINDS:
        columns |= {plan_name(kind, window): (np.int32, layouts[kind].size) for window in windows}
    return StepBuffers(columns, device)


def first_mixed_column(buffers: StepBuffers) -> str:
    """The first of the columns that only mixed steps need, which all lie behind the others."""
    return next(name for name in buffers.device if name.startswith("mixed"))


def fill_tokens(host: Mapping[str, Array], inputs: StepInputs, num_tokens: int) -> None:
    """The tokens of the step, padded to `num_tokens`; padded ones are written nowhere and read by nobody."""
    used = inputs.num_tokens
    input_ids = host["input_ids"]
    input_ids[:used] = inputs.input_ids
    decoding = inputs.query_starts[:-1][inputs.is_decoding]
    input_ids[decoding] = token_of_row(inputs.rows[inputs.is_decoding])
    host["positions"][:used] = inputs.positions
    host["slots"][:used] = inputs.slot_mapping
    for name, padding in (("input_ids", 0), ("positions", 0), ("slots", NO_SLOT)):
        host[name][used:num_tokens] = padding


def fill_samples(
    host: Mapping[str, Array], inputs: StepInputs, batch: InputBatch, num_samples: int, padding_row: int
) -> None:
    """The rows that sample, padded to `num_samples`.

    Padded ones choose the best token of the step's first and keep it in `padding_row`.
    """
    used, rows, sampling = inputs.num_samples, inputs.sampling_rows, batch.sampling
    columns: dict[str, tuple[Array, int]] = {
        "sampling_indices": (inputs.sampling_indices, 0),
        "sampling_rows": (rows, padding_row),
        "temperatures": (sampling.temperatures[rows], 0),
        "top_k": (sampling.top_k[rows], 0),
        "top_p": (sampling.top_p[rows], 1),
        "min_p": (sampling.min_p[rows], 0),
        "typical_p": (sampling.typical_p[rows], 1),
        "seeds": (sampling.seeds[rows].view(np.int64), 0),
        "sampling_positions": (inputs.sampling_positions, 0),
    }
    for name, (values, padding) in columns.items():
        host[name][:used] = values
        host[name][used:num_samples] = padding
    # The layers' recording gathers more rows than are sampled.
    host["sampling_indices"][num_samples:] = 0


def sampling_parameters(device: Mapping[str, torch.Tensor], num_samples: int) -> SamplingParameters:
    """What the first so many rows ask for, as the device has it."""
    column = {name: values[:num_samples] for name, values in device.items()}
    return SamplingParameters(
        temperatures=column["temperatures"],
        top_k=column["top_k"],
        top_p=column["top_p"],
        min_p=column["min_p"],
        typical_p=column["typical_p"],
        seeds=column["seeds"],
        positions=column["sampling_positions"],
    )
