"""When the next plan should leave: late enough to take in requests that arrive meanwhile, never too late for the GPU.

A plan sent the moment there is room for it waits behind the running step, and a request that arrives in between misses
it. So a plan is held back until a lead before the running step's predicted end. The lead finds itself: it becomes the
one at which a small share of plans comes late, however late those are. Pure: no clock of its own.
"""

from collections import deque

from text_generation_router.step import PlanInFlight, StepResult

MIN_STEP_NS = 4_000_000  # shorter steps are never waited for
MIN_LEAD_NS = 1_000_000
FIRST_LEAD_NS = 3_000_000
MAX_LEAD_NS = 50_000_000
TOLERATED_IDLE_NS = 50_000  # shorter idle times of the device come of themselves
# So many of all plans may come late: a longer lead saves the device time in those steps alone, and costs every request.
LATE_SHARE = 0.04
# By so much the lead grows for a late plan. For any other it shrinks, by as much as keeps the share.
LEAD_STEP_NS = 100_000
# Of so many results the quickest tells how the device's time relates to ours.
NUM_RESULTS = 64


class PlanTiming:
    """Follows plans and results of one run of the shards."""

    def __init__(self) -> None:
        self._lead_ns = FIRST_LEAD_NS
        self._step_ns = 0  # how long the device was busy with the last step of decodes
        self._publish_ns = 0  # how long the router was last busy with tokens, without a look at anything else
        self._device_ns = 0  # the device's own time at the end of its last step: busy and idle times added up
        self._offsets_ns: deque[int] = deque(maxlen=NUM_RESULTS)  # from that time to the arrival of the result

    def due_ns(self, running: PlanInFlight, now_ns: int) -> int:
        """When the plan behind `running` is to leave, on the clock of `now_ns`; not later than `now_ns`: at once."""
        if self._step_ns < MIN_STEP_NS or running.plan.is_empty:
            return now_ns
        # A step with prompts takes longer; how much longer is not known well enough to wait for it.
        started_ns = max(running.sent_ns, self._device_ns + min(self._offsets_ns))
        due_ns = started_ns + self._step_ns - self._lead_ns
        return due_ns if due_ns - now_ns > self._publish_ns else now_ns

    def ended(self, sent: PlanInFlight, result: StepResult, now_ns: int) -> None:
        """A result has come."""
        device_ns = result.forward_ns + result.sample_ns
        if not device_ns:
            return
        is_late = sent.is_held and result.idle_ns > TOLERATED_IDLE_NS
        self._lead_ns += int(LEAD_STEP_NS * (is_late - LATE_SHARE))
        self._lead_ns = min(max(self._lead_ns, MIN_LEAD_NS), MAX_LEAD_NS)
        if not sent.plan.num_prefill_tokens:
            self._step_ns = device_ns
        self._device_ns += result.idle_ns + device_ns
        self._offsets_ns.append(now_ns - self._device_ns)

    def published(self, duration_ns: int) -> None:
        """Tokens were turned into text, which kept the loop busy so long."""
        self._publish_ns = duration_ns
