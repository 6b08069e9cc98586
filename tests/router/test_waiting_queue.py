"""The order in which sequences may join the batch: by hand where it is simple, by properties where it is not."""

from collections import Counter, defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st
from text_generation_router.sequence import Sequence
from text_generation_router.valid_request import ValidRequest
from text_generation_router.waiting_queue import WaitingQueue


def make_sequence(
    number: int, tenant: str = "", num_prompt: int = 10, num_new: int = 10, priority: int = 0
) -> Sequence:
    return Sequence(number, ValidRequest([1] * num_prompt, num_new, tenant=tenant, priority=priority))


def take_all(queue: WaitingQueue) -> list[Sequence]:
    """Let one after the other join."""
    taken = []
    while len(queue):
        sequence = next(iter(queue))
        queue.join(sequence)
        taken.append(sequence)
    return taken


def test_one_tenant_is_served_in_order_of_arrival():
    queue = WaitingQueue()
    sequences = [make_sequence(number, num_prompt=100 - number) for number in range(10)]
    for sequence in sequences:
        queue.add(sequence)
    assert list(queue) == take_all(queue) == sequences


def test_a_small_tenant_does_not_wait_behind_a_flood():
    queue = WaitingQueue()
    flood = [make_sequence(number, "a") for number in range(50)]
    for sequence in flood:
        queue.add(sequence)
    for _ in range(10):
        queue.join(next(iter(queue)))
    late = make_sequence(50, "b")
    queue.add(late)
    assert late in [*queue][:2]


def test_turns_are_of_tokens_not_of_requests():
    queue = WaitingQueue()
    for number in range(20):
        queue.add(make_sequence(number, "long", num_prompt=390))
    for number in range(20, 100):
        queue.add(make_sequence(number, "short", num_prompt=90))
    first = take_all(queue)[:50]
    tokens = Counter()
    for sequence in first:
        tokens[sequence.request.tenant] += sequence.num_prompt_tokens + sequence.request.max_new_tokens
    assert abs(tokens["long"] - tokens["short"]) <= 400


def test_nobody_saves_up_turns_while_away():
    queue = WaitingQueue()
    for number in range(30):
        queue.add(make_sequence(number, "a"))
    for _ in range(20):
        queue.join(next(iter(queue)))
    for number in range(30, 50):
        queue.add(make_sequence(number, "b"))
    order = [sequence.request.tenant for sequence in take_all(queue)]
    assert order[:20].count("a") == 10


def test_priority_goes_before_arrival_within_a_tenant_alone():
    queue = WaitingQueue()
    sequences = [make_sequence(number, "a", priority=-number) for number in range(3)]
    other = make_sequence(3, "b", priority=100)
    for sequence in [*sequences, other]:
        queue.add(sequence)
    order = take_all(queue)
    assert [sequence for sequence in order if sequence is not other] == sequences[::-1]
    assert order.index(other) < 2


def test_preempted_sequences_go_first():
    queue = WaitingQueue()
    sequences = [make_sequence(number, tenant) for number, tenant in enumerate("abab")]
    for sequence in sequences:
        queue.add(sequence)
    for sequence in sequences[:2]:
        queue.join(sequence)
        sequence.num_preemptions = 1
    for sequence in sequences[1::-1]:
        queue.add(sequence)
    assert [*queue] == sequences


def test_the_bound_on_prompt_tokens_leaves_each_tenant_its_share():
    queue = WaitingQueue()
    assert queue.has_room("a", 5000, 100), "an empty queue takes anything"
    for number in range(9):
        queue.add(make_sequence(number, "a"))
    assert queue.has_room("a", 10, 100)
    assert not queue.has_room("a", 11, 100)
    assert queue.has_room("b", 50, 100)
    assert not queue.has_room("b", 51, 100)
    sequence = next(iter(queue))
    queue.remove(sequence)
    assert queue.has_room("a", 20, 100)
    assert queue.num_prompt_tokens == 80


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("abc"), st.integers(1, 50), st.integers(1, 50), st.integers(-2, 2)),
        st.tuples(st.just("join"), st.integers(0, 3)),
        st.tuples(st.just("remove"), st.integers(0, 30)),
        st.tuples(st.just("preempt"), st.integers(0, 30)),
        st.tuples(st.just("end"), st.integers(0, 60)),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(actions=actions)
def test_everything_that_waits_is_there_once_and_in_its_lines_order(actions):
    queue, waiting, joined = WaitingQueue(), {}, []
    for number, action in enumerate(actions):
        if action[0] == "add":
            sequence = make_sequence(number, *action[1:])
            queue.add(sequence)
            waiting[number] = sequence
        elif action[0] == "join" and len(queue) > action[1]:
            sequence = [*queue][action[1]]  # not always the first: others may wait for its blocks
            queue.join(sequence)
            joined.append(waiting.pop(sequence.arrival))
        elif action[0] == "remove" and waiting:
            queue.remove(waiting.pop(sorted(waiting)[action[1] % len(waiting)]))
        elif action[0] == "preempt" and joined:
            sequence = joined.pop(action[1] % len(joined))
            sequence.num_preemptions += 1
            queue.add(sequence)
            waiting[sequence.arrival] = sequence
        elif action[0] == "end":
            queue.note_generated(action[1])
        order = [*queue]
        assert len(queue) == len(order)
        assert {sequence.arrival: sequence for sequence in order} == waiting
        fresh = [sequence for sequence in order if not sequence.num_preemptions]
        assert order[: len(order) - len(fresh)] == sorted(set(order) - set(fresh), key=lambda s: s.arrival)
        assert queue.num_prompt_tokens == sum(sequence.num_prompt_tokens for sequence in fresh)
        lines = defaultdict(list)
        for sequence in fresh:
            lines[sequence.request.tenant].append((sequence.request.priority, sequence.arrival))
        assert all(line == sorted(line) for line in lines.values())


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 60)), min_size=30, max_size=120),
)
def test_tenants_that_always_wait_get_equal_shares_of_tokens(sizes):
    """The known bound of fair queueing: two of them never differ by more than the largest request of each."""
    queue = WaitingQueue()
    for number, (tenant, num_prompt) in enumerate(sizes):
        queue.add(make_sequence(number, tenant, num_prompt, num_new=1))
    left = Counter(tenant for tenant, _ in sizes)
    served = dict.fromkeys(left, 0)
    while all(left.values()):
        sequence = next(iter(queue))
        queue.join(sequence)
        tenant = sequence.request.tenant
        left[tenant] -= 1
        served[tenant] += sequence.num_prompt_tokens + 1
        assert max(served.values()) - min(served.values()) <= 2 * 61
