"""Tells the metrics what each step did: queue, batch, blocks, prefix cache and durations."""

from collections.abc import Iterable, Mapping

from text_generation_router.metrics import Metrics
from text_generation_router.scheduler import Scheduler
from text_generation_router.step import PlanInFlight, StepPlan, StepResult


class StepReport:
    """Turns the scheduler's running totals into counters, step by step. Empty plans are not steps."""

    def __init__(self, metrics: Metrics, scheduler: Scheduler) -> None:
        self._metrics = metrics
        self._scheduler = scheduler
        self._num_preemptions = 0
        self._num_query_tokens = 0
        self._num_hit_tokens = 0
        self._last_result_ns = 0
        metrics.on_scrape(self._report_state)

    @staticmethod
    def _method(plan: StepPlan) -> str:
        return "prefill" if plan.num_prefill_tokens else "decode"

    def sent(self, plan: StepPlan) -> None:
        """A plan has left."""
        scheduler, metrics = self._scheduler, self._metrics
        if not plan.is_empty:
            metrics.step_started(self._method(plan))
        if plan.new_sequences:
            metrics.batch_admitted(len(plan.new_sequences))
            if plan.num_decode_tokens:
                metrics.batch_joined("chunking", 0.0)
            metrics.prefix_query(
                scheduler.num_prefix_query_tokens - self._num_query_tokens,
                scheduler.num_prefix_hit_tokens - self._num_hit_tokens,
            )
            self._num_query_tokens = scheduler.num_prefix_query_tokens
            self._num_hit_tokens = scheduler.num_prefix_hit_tokens
        if scheduler.num_preemptions > self._num_preemptions:
            metrics.preempted(scheduler.num_preemptions - self._num_preemptions)
            self._num_preemptions = scheduler.num_preemptions

    def ended(
        self,
        sent: PlanInFlight,
        result: StepResult,
        result_ns: int,
        text_ns: int,
        handing_ns: int,
        gaps_ns: Mapping[int, int],
    ) -> None:
        """A result has come (at `result_ns`) and its tokens were handed to their readers.

        `text_ns` and `handing_ns` are the time that took; `gaps_ns` says how many tokens came how long after the one
        before. A plan that waited behind another one counts from that one's result.
        """
        if not sent.plan.is_empty:
            self._metrics.step_ended(
                self._method(sent.plan),
                inference_s=(result_ns - max(sent.sent_ns, self._last_result_ns)) / 1e9,
                forward_s=result.forward_ns / 1e9,
                decode_s=text_ns / 1e9,
                filter_s=handing_ns / 1e9,
                mask_s=result.mask_ns / 1e9,
            )
        for gap_ns, count in gaps_ns.items():
            self._metrics.tokens_followed(gap_ns / 1e9, count)
        self._last_result_ns = result_ns

    def abandoned(self, in_flight: Iterable[PlanInFlight]) -> None:
        """No result will come for these plans."""
        for sent in in_flight:
            if not sent.plan.is_empty:
                self._metrics.step_failed(self._method(sent.plan))

    def _report_state(self) -> None:
        scheduler = self._scheduler
        blocks = scheduler.blocks
        self._metrics.set_queue_size(len(scheduler.waiting))
        self._metrics.set_batch(len(scheduler.running), sum(sequence.max_tokens for sequence in scheduler.running))
        self._metrics.set_blocks(blocks.num_held, blocks.num_cached, blocks.num_blocks)
