"""A step that a GPU has been given: when it began and ended, and the one read of its tokens."""

import time
from collections.abc import Callable

import numpy as np
import torch

from text_generation_shard.changed_head import TopTokensUnderway
from text_generation_shard.execution import StepOutput
from text_generation_shard.step_inputs import PromptInputs
from text_generation_shard.token_scores import ScoredTokens, tell_prompt_scores


class GpuStep:
    """A step under way; see `RunningStep`."""

    def __init__(
        self,
        events: "StepEvents",
        before: "StepEvents | None",
        host_output: torch.Tensor,
        num_samples: int,
        launch_head: Callable[[], TopTokensUnderway | None],
        scores: tuple[PromptInputs, ScoredTokens] | None,
    ) -> None:
        self._events = events
        self._before = before  # of the step ahead: marked anew only when a third step follows
        self._host_output = host_output
        self._num_samples = num_samples
        self._launch_head: Callable[[], TopTokensUnderway | None] | None = launch_head
        self._top_tokens: TopTokensUnderway | None = None
        self._scores = scores

    def choose_tokens(self) -> None:
        """Launch the head, if that has not been done."""
        if self._launch_head is not None:
            self._top_tokens = self._launch_head()
            self._launch_head = None

    def is_done(self) -> bool:
        """Whether the device has ended it."""
        return self._launch_head is None and self._events.is_done()

    def wait(self) -> StepOutput:
        """The one read of the step's tokens."""
        forward_ns, sample_ns = self._events.wait()
        idle_ns = self._events.idle_since(self._before) if self._before is not None else 0
        columns = self._host_output.numpy()[:, : self._num_samples]
        return StepOutput(
            token_ids=columns[0].astype(np.int64),
            logprobs=columns[1].copy().view(np.float32),
            is_valid=columns[2] != 0,
            forward_ns=forward_ns,
            sample_ns=sample_ns,
            idle_ns=idle_ns,
            top_tokens=None if self._top_tokens is None else self._top_tokens.tell(),
            prompt_scores=None if self._scores is None else tell_prompt_scores(*self._scores),
        )


class StepEvents:
    """When a step began, when its layers ended, and when its tokens were copied to the host."""

    def __init__(self, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)] if is_gpu else []
        self._times_ns = [0, 0, 0]

    def mark(self, index: int) -> None:
        """Note the moment that the device reaches this point of its stream."""
        if self._events:
            self._events[index].record()
        else:
            self._times_ns[index] = time.perf_counter_ns()

    def idle_since(self, before: "StepEvents") -> int:
        """Nanoseconds between the end of the step ahead and the beginning of this one, once both have ended."""
        if not self._events:
            return max(0, self._times_ns[0] - before._times_ns[2])
        return max(0, int(before._events[2].elapsed_time(self._events[0]) * 1e6))

    def is_done(self) -> bool:
        return not self._events or self._events[2].query()

    def wait(self) -> tuple[int, int]:
        """Nanoseconds of the layers and of the sampling, once both have ended."""
        if not self._events:
            begin, middle, end = self._times_ns
            return middle - begin, end - middle
        self._events[2].synchronize()
        begun, layers_done, done = self._events
        return int(begun.elapsed_time(layers_done) * 1e6), int(layers_done.elapsed_time(done) * 1e6)
