"""Tells the metrics what each step did, and whenever they are asked for, how queue, batch and memory stand."""

from collections.abc import Iterable, Mapping

from text_generation_router.metrics import Metrics
from text_generation_router.scheduler import Scheduler
from text_generation_router.step import PlanInFlight, StepPlan, StepResult


class StepReport:
    """What the metrics hear of the engine. Empty plans are not steps."""

    def __init__(self, metrics: Metrics, scheduler: Scheduler) -> None:
        self._metrics = metrics
        self._scheduler = scheduler
        self._last_result_ns = 0
        metrics.on_scrape(self._report_state)

    def sent(self, plan: StepPlan) -> None:
        """A plan has left."""
        steps = self._metrics.steps
        if not plan.is_empty:
            steps.started(_method(plan), plan.num_prefill_tokens, plan.num_decode_tokens)
        if plan.new_sequences:
            steps.admitted(len(plan.new_sequences))
            if plan.num_decode_tokens:
                steps.joined("chunking", 0.0)  # part of the step: joining has no cost of its own

    def received(self, result: StepResult) -> None:
        """A result has come."""
        self._metrics.tokens.sampled(len(result.token_ids))

    def ended(
        self,
        sent: PlanInFlight,
        result: StepResult,
        result_ns: int,
        text_ns: int,
        handing_ns: int,
        gaps_ns: Mapping[int, int],
    ) -> None:
        """The tokens of a result, which came at `result_ns`, were handed to their readers.

        `text_ns` and `handing_ns` are the time that took; `gaps_ns` says how many tokens came how long after the one
        before. A plan that waited behind another one counts from that one's result.
        """
        plan, steps = sent.plan, self._metrics.steps
        if not plan.is_empty:
            steps.ended(
                _method(plan),
                _kind(plan),
                inference_s=(result_ns - max(sent.sent_ns, self._last_result_ns)) / 1e9,
                device_s=(result.forward_ns + result.sample_ns) / 1e9,
                forward_s=result.forward_ns / 1e9,
                decode_s=text_ns / 1e9,
                filter_s=handing_ns / 1e9,
                mask_s=result.mask_ns / 1e9,
            )
        for gap_ns, count in gaps_ns.items():
            self._metrics.tokens.followed(gap_ns / 1e9, count)
        self._last_result_ns = result_ns

    def abandoned(self, in_flight: Iterable[PlanInFlight]) -> None:
        """No result will come for these plans."""
        for sent in in_flight:
            if not sent.plan.is_empty:
                self._metrics.steps.failed(_method(sent.plan))

    def _report_state(self) -> None:
        scheduler, memory = self._scheduler, self._metrics.memory
        blocks = scheduler.blocks
        memory.set_queue(len(scheduler.waiting), scheduler.waiting.num_prompt_tokens)
        memory.set_batch(len(scheduler.running), sum(sequence.max_tokens for sequence in scheduler.running))
        memory.set_blocks(blocks.num_held, blocks.num_cached, blocks.num_blocks)
        memory.set_preempted(scheduler.num_preemptions, scheduler.num_recomputed_tokens)
        memory.set_prefix_cache(scheduler.num_prefix_query_tokens, scheduler.num_prefix_hit_tokens)


def _method(plan: StepPlan) -> str:
    return "prefill" if plan.num_prefill_tokens else "decode"


def _kind(plan: StepPlan) -> str:
    return "mixed" if plan.num_prefill_tokens and plan.num_decode_tokens else _method(plan)
