"""Which sequences of the batch want to know the log-probabilities of their prompts, and which of them a step tells."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from text_generation_proto.columns import Int32Array

from text_generation_shard.step import NewSequence
from text_generation_shard.step_inputs import PromptInputs


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens that a sequence computes in one step."""

    sequence_id: int
    start: int  # flat index of the first
    position: int  # its place in the sequence
    num_tokens: int


class ScoredPrompts:
    """Prompts by sequence id."""

    def __init__(self) -> None:
        self._prompts: dict[
            int, tuple[Int32Array, int]
        ] = {}  # token ids, and how many most likely tokens are asked for

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, sequence: NewSequence) -> None:
        """Remember a sequence's prompt."""
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        self._prompts[sequence.sequence_id] = prompt, sequence.prompt_top_n_tokens

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence's prompt, if it was there."""
        self._prompts.pop(sequence_id, None)

    def inputs(self, spans: Iterable[Span]) -> PromptInputs | None:
        """The prompt tokens that come right after the computed ones; None if there are none."""
        scored, indices, token_ids, most = [], [], [], 0
        for span in spans:
            prompt, top_n_tokens = self._prompts[span.sequence_id]
            after = prompt[span.position + 1 : span.position + 1 + span.num_tokens]
            if len(after):
                scored.append((span.sequence_id, span.position + 1, len(after)))
                indices.append(span.start + np.arange(len(after)))
                token_ids.append(after)
                most = max(most, top_n_tokens)
        if not scored:
            return None
        sequence_ids, first_positions, num_tokens = np.array(scored, np.int32).T
        return PromptInputs(
            sequence_ids=sequence_ids,
            first_positions=first_positions,
            num_tokens=num_tokens,
            indices=np.concatenate(indices),
            token_ids=np.concatenate(token_ids).astype(np.int64),
            top_n_tokens=most,
        )
