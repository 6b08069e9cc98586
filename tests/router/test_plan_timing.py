"""When plans leave, against a device that is simulated step by step."""

from dataclasses import dataclass, field
from random import Random

import pytest
from text_generation_router.plan_timing import MIN_LEAD_NS, PlanTiming
from text_generation_router.step import PlanInFlight, StepPlan, StepResult

MS = 1_000_000


@dataclass
class Device:
    """Runs plans in order; each reaches it `latency_ns` after it was sent, and so does its result the router."""

    timing: PlanTiming
    step_ns: int
    latency_ns: int
    jitter_ns: int = 0  # how much later than that results come, in the mean
    stalls: tuple[float, int] = (0.0, 0)  # the share of plans that reach it so much later
    random: Random = field(default_factory=lambda: Random(1))
    now_ns: int = 1_000 * MS
    free_ns: int = 0
    step: int = 0
    idle_ns: int = 0
    held: list[bool] = field(default_factory=list)
    headroom_ns: list[int] = field(default_factory=list)  # how long before its start each plan left

    def send(self, is_held: bool) -> "tuple[PlanInFlight, StepResult, int]":
        """The plan, its result, and when that comes."""
        self.step += 1
        sent = PlanInFlight(StepPlan(self.step, num_decode_tokens=1), self.now_ns, is_held)
        share, stall_ns = self.stalls
        stall_ns *= self.random.random() < share
        start_ns = max(self.free_ns, self.now_ns + self.latency_ns + stall_ns)
        idle_ns = start_ns - self.free_ns if self.free_ns else 0
        self.idle_ns += idle_ns
        self.free_ns = start_ns + self.step_ns
        self.held.append(is_held)
        self.headroom_ns.append(start_ns - self.now_ns)
        result = StepResult(self.step, [], [], [], forward_ns=self.step_ns, idle_ns=idle_ns)
        late_ns = int(self.random.expovariate(1 / self.jitter_ns)) if self.jitter_ns else 0
        return sent, result, self.free_ns + self.latency_ns + late_ns

    def run(self, num_steps: int) -> None:
        """Two plans in flight, as the engine keeps them."""
        in_flight = [self.send(False), self.send(False)]
        for _ in range(num_steps):
            sent, result, arrived_ns = in_flight.pop(0)
            self.now_ns = max(self.now_ns, arrived_ns)
            self.timing.ended(sent, result, self.now_ns)
            due_ns = self.timing.due_ns(in_flight[0][0], self.now_ns)
            is_held = due_ns > self.now_ns
            self.now_ns = max(self.now_ns, due_ns)
            in_flight.append(self.send(is_held))


@pytest.mark.parametrize("jitter_ns", [0, MS // 3])
def test_plans_leave_late_and_the_device_hardly_ever_waits(jitter_ns: int) -> None:
    device = Device(PlanTiming(), step_ns=7 * MS, latency_ns=MS, jitter_ns=jitter_ns)
    device.run(4000)
    assert sum(device.held[100:]) > 3500
    # Without holding back, each plan would leave a whole step before its start.
    later = sorted(device.headroom_ns[1000:])
    assert later[len(later) // 2] < 3 * MS
    assert device.idle_ns / device.free_ns < 0.01


@pytest.mark.parametrize("stalls", [(0.01, 3 * MS), (0.05, MS), (0.002, 50 * MS)])
def test_stalls_now_and_then_are_no_reason_to_send_all_plans_early(stalls: tuple[float, int]) -> None:
    device = Device(PlanTiming(), step_ns=6 * MS, latency_ns=MS, stalls=stalls)
    device.run(4000)
    later = sorted(device.headroom_ns[1000:])
    assert later[len(later) // 2] < 2.5 * MS
    early = Device(PlanTiming(), step_ns=6 * MS, latency_ns=MS, stalls=stalls)
    early.timing.due_ns = lambda running, now_ns: now_ns  # type: ignore[method-assign]
    early.run(4000)
    assert device.idle_ns / device.free_ns < early.idle_ns / early.free_ns + 0.008


def test_the_lead_shrinks_again_once_a_slow_way_has_become_quick() -> None:
    device = Device(PlanTiming(), step_ns=6 * MS, latency_ns=2 * MS)
    device.run(1000)
    slow = sorted(device.headroom_ns[500:])
    device.latency_ns = MS // 2
    device.run(4000)
    quick = sorted(device.headroom_ns[-500:])
    assert quick[len(quick) // 2] < slow[len(slow) // 2] - MS // 2


@pytest.mark.parametrize("latency_ms", [3, 6, 20])
def test_a_slow_way_to_the_device_makes_plans_leave_earlier(latency_ms: int) -> None:
    device = Device(PlanTiming(), step_ns=7 * MS, latency_ns=latency_ms * MS)
    device.run(1000)
    before = device.idle_ns
    device.run(1000)
    usual = Device(PlanTiming(), step_ns=7 * MS, latency_ns=latency_ms * MS)
    usual.timing.due_ns = lambda running, now_ns: now_ns  # type: ignore[method-assign]
    usual.run(1000)
    assert device.idle_ns - before <= usual.idle_ns + 0.02 * 1000 * 7 * MS


def test_short_steps_are_not_waited_for() -> None:
    device = Device(PlanTiming(), step_ns=3 * MS, latency_ns=MS // 10)
    device.run(200)
    assert not any(device.held)


def test_nothing_waits_before_anything_is_known() -> None:
    timing = PlanTiming()
    assert timing.due_ns(PlanInFlight(StepPlan(1, num_decode_tokens=1), 5), 7) == 7


def test_a_busy_router_sends_at_once() -> None:
    device = Device(PlanTiming(), step_ns=7 * MS, latency_ns=MS)
    device.run(100)
    running = PlanInFlight(StepPlan(99, num_decode_tokens=1), device.now_ns)
    assert device.timing.due_ns(running, device.now_ns) > device.now_ns + MIN_LEAD_NS
    device.timing.published(6 * MS)
    assert device.timing.due_ns(running, device.now_ns) == device.now_ns
