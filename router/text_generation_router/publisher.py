"""The way from results to streams: tokens become text and are handed to their readers, a slice of time at a time."""

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from text_generation_router.errors import GenerationError, IncompleteGeneration, InternalError, RouterError
from text_generation_router.output import SequenceOutput
from text_generation_router.scheduler import Progress, Scheduler
from text_generation_router.step import PlanInFlight, StepResult
from text_generation_router.step_report import StepReport
from text_generation_router.token_stream import PrefillChunk

logger = logging.getLogger(__name__)

# As long as a slice may keep the loop from results and requests.
SLICE_NS = 1_000_000
# What a client that does not read may leave in its stream before its generation ends: 16 384 tokens, or fewer with
# the best tokens at their places.
MAX_UNREAD_BYTES = 4 << 20
# Sequences between two looks at the clock.
CHUNK_SIZE = 32


@dataclass(slots=True)
class _Step:
    """A result whose tokens are not handed out yet, or not all."""

    sent: PlanInFlight
    result: StepResult
    result_ns: int
    progress: Sequence[Progress]
    num_published: int = 0
    text_ns: int = 0
    handing_ns: int = 0
    gaps_ns: Counter[int] = field(default_factory=Counter)  # since a sequence's last token: how many had this gap


class Publisher:
    """Holds the outputs of all unfinished sequences and the results that they have not got yet, oldest first."""

    def __init__(self, scheduler: Scheduler, report: StepReport) -> None:
        self._scheduler = scheduler
        self._report = report
        self._outputs: dict[int, SequenceOutput] = {}  # by sequence id
        self._steps: deque[_Step] = deque()
        self._last_result_ns = 0
        self.num_dropped_tokens = 0  # they came for sequences that had ended

    def add(self, output: SequenceOutput) -> None:
        """A sequence may get tokens from now on."""
        self._outputs[output.sequence.sequence_id] = output

    def get(self, sequence_id: int) -> SequenceOutput | None:
        """The output of a sequence that has not ended."""
        return self._outputs.get(sequence_id)

    def cancel(self, sequence_id: int, error: RouterError) -> None:
        """End a sequence with an error; does nothing when it has ended already."""
        if (output := self._outputs.get(sequence_id)) is not None:
            self._fail(output, error)

    def put(self, sent: PlanInFlight, result: StepResult, result_ns: int, progress: Sequence[Progress]) -> None:
        """Take a result, which came at `result_ns`, and what the scheduler made of it."""
        self._steps.append(_Step(sent, result, result_ns, progress))
        if sent.plan.prefill_sequence_ids:
            self._note_prefills(sent, result_ns)
        self._last_result_ns = result_ns

    def _note_prefills(self, sent: PlanInFlight, result_ns: int) -> None:
        """Tell the streams of traced requests what the step computed; a plan may have waited for the one before."""
        plan, started_ns = sent.plan, max(sent.sent_ns, self._last_result_ns)
        for sequence_id, num_tokens in zip(plan.prefill_sequence_ids, plan.prefill_num_tokens, strict=True):
            output = self._outputs.get(sequence_id)
            if output is not None and output.stream.prefills is not None:
                output.stream.prefills.append(
                    PrefillChunk(
                        plan.step, started_ns, result_ns, num_tokens, plan.num_prefill_tokens, plan.num_decode_tokens
                    )
                )

    @property
    def has_work(self) -> bool:
        """Whether there is something to hand out."""
        return bool(self._steps)

    @property
    def num_waiting(self) -> int:
        """Results that are not handed out yet, or not all."""
        return len(self._steps)

    def num_held_tokens(self) -> int:
        """Tokens in results that are not handed out yet."""
        return sum(
            change.failure is None for step in self._steps for change in islice(step.progress, step.num_published, None)
        )

    def publish_slice(self) -> None:
        """Hand out what can be handed out in one slice of time."""
        end_ns = time.monotonic_ns() + SLICE_NS
        while self._steps and self._publish_chunk(self._steps[0]) < end_ns:
            pass

    def _publish_chunk(self, step: _Step) -> int:
        """Hand out the next tokens of a step; returns the time."""
        started_ns = time.monotonic_ns()
        chunk = step.progress[step.num_published : step.num_published + CHUNK_SIZE]
        step.num_published += len(chunk)
        touched = self._push(step, chunk)
        texts_done_ns = time.monotonic_ns()
        for output in touched:
            try:
                output.publish()
            except Exception:
                logger.exception("The events of one sequence failed")
                self._fail(output, InternalError())
                continue
            if output.stream.num_unread_bytes > MAX_UNREAD_BYTES:
                self._fail(output, IncompleteGeneration(": the client does not read its answer"))
            elif output.finish_reason is not None:
                self._scheduler.finish(output.sequence)
                del self._outputs[output.sequence.sequence_id]
        now_ns = time.monotonic_ns()
        step.text_ns += texts_done_ns - started_ns
        step.handing_ns += now_ns - texts_done_ns
        if step.num_published == len(step.progress):
            self._steps.popleft()
            self._report.ended(step.sent, step.result, step.result_ns, step.text_ns, step.handing_ns, step.gaps_ns)
        return now_ns

    def _push(self, step: _Step, chunk: Sequence[Progress]) -> list[SequenceOutput]:
        """Turn tokens into text."""
        touched = []
        result_ns, gaps_ns = step.result_ns, step.gaps_ns
        for change in chunk:
            output = self._outputs.get(change.sequence.sequence_id)
            if output is None:
                self.num_dropped_tokens += change.failure is None
                continue  # its client left meanwhile, or a stop string ended it
            if change.failure is not None:
                self._fail(output, GenerationError(change.failure))
                continue
            try:
                output.push(change.token_id, change.logprob, change.finish_reason, change.top_tokens)
            except Exception:
                logger.exception("The text of one sequence failed")
                self.num_dropped_tokens += 1
                self._fail(output, InternalError())
                continue
            touched.append(output)
            if output.last_token_ns:
                gaps_ns[result_ns - output.last_token_ns] += 1
            output.last_token_ns = result_ns
        return touched

    def _fail(self, output: SequenceOutput, error: RouterError) -> None:
        del self._outputs[output.sequence.sequence_id]
        self._scheduler.finish(output.sequence)
        output.fail(error)

    def end_all(self, error: RouterError) -> None:
        """Hand out what is there, then end every sequence with an error."""
        while self._steps:
            self.publish_slice()
        for output in [*self._outputs.values()]:
            self._fail(output, error)

    def abandon(self, error: RouterError) -> None:
        """As `end_all`, but for the end of the whole engine: whatever is wrong, every stream ends."""
        try:
            while self._steps:
                self.publish_slice()
        except Exception:
            logger.exception("The last tokens could not be handed out")
        outputs, self._outputs = self._outputs, {}
        for output in outputs.values():
            output.fail(error)
