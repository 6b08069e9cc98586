"""Permits, on a clock that the test moves."""

import pytest
from text_generation_router.api.permits import Permits
from text_generation_router.errors import Overloaded, ShuttingDown


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_lone_tenant_may_take_all_and_no_more():
    permits = Permits(4)
    permits.take(3)
    permits.check(1)
    with pytest.raises(Overloaded):
        permits.take(2)
    permits.take(1)
    with pytest.raises(Overloaded):
        permits.check()
    permits.give_back(2)
    permits.take(2)
    assert permits.num_taken == 4


def test_a_tenant_is_not_refused_its_share_because_others_hold_more():
    permits = Permits(8)
    permits.take(8, "a")
    for _ in range(4):
        permits.take(1, "b")
    for tenant in ("a", "b"):
        with pytest.raises(Overloaded):
            permits.take(1, tenant)
    permits.take(2, "c")
    assert permits.num_taken == 14
    permits.give_back(8, "a")
    assert permits.num_taken == 6
    permits.take(2, "b")
    with pytest.raises(Overloaded):
        permits.take(3, "b")


def test_there_are_never_more_than_twice_as_many():
    permits = Permits(4)
    for tenant in "abcdefgh":
        for _ in range(4):
            try:
                permits.take(1, tenant)
            except Overloaded:
                break
    assert permits.num_taken <= 8


def test_closed_permits_are_not_given():
    permits = Permits(2)
    permits.close()
    with pytest.raises(ShuttingDown):
        permits.check()


def test_retry_after_is_the_time_that_the_queue_takes_at_the_measured_rate():
    clock = Clock()
    permits = Permits(100, clock)
    assert permits.retry_after_s(50) == 1, "nothing is known yet"
    permits.take(100)
    permits.give_back(5, is_served=False)
    assert permits.retry_after_s(50) == 1, "refusals are no measure"
    for _ in range(20):
        permits.give_back(1)
        clock.now += 0.5
    assert permits.retry_after_s(0) == 1
    assert permits.retry_after_s(7) == 4
    assert permits.retry_after_s(10_000) == 60
    clock.now += 31
    assert permits.retry_after_s(7) == 60, "nothing has ended lately"
