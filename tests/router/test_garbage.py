"""Garbage: cycles go away once the loop rests or the server is idle, and not before; then free memory does."""

import ctypes
import gc
import weakref
from pathlib import Path

import pytest
from text_generation_router import garbage
from text_generation_router.garbage import GarbageCollection


class Node:
    """An object that keeps itself alive."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def collection():
    collection = GarbageCollection()
    collection.take_over()
    yield collection
    gc.enable()
    gc.unfreeze()


def test_young_cycles_wait_for_a_rest(collection, monkeypatch):
    monkeypatch.setattr(garbage, "NUM_YOUNG_OBJECTS", 1000)
    monkeypatch.setattr(garbage, "NUM_URGENT_OBJECTS", 1_000_000)
    cycle = weakref.ref(Node())
    kept = [[] for _ in range(5000)]
    collection.collect_young(is_resting=False)
    assert cycle() is not None
    collection.collect_young(is_resting=True)
    assert cycle() is None
    assert len(kept) == 5000


def test_a_loop_that_never_rests_collects_all_the_same(collection, monkeypatch):
    monkeypatch.setattr(garbage, "NUM_URGENT_OBJECTS", 1000)
    cycle = weakref.ref(Node())
    kept = [[] for _ in range(5000)]
    collection.collect_young(is_resting=False)
    assert cycle() is None
    assert len(kept) == 5000


def test_old_cycles_go_when_the_server_becomes_idle(collection, monkeypatch):
    monkeypatch.setattr(garbage, "NUM_YOUNG_OBJECTS", 0)
    node = Node()
    cycle = weakref.ref(node)
    for _ in range(2 * garbage.SECOND_GENERATION_EVERY):
        collection.collect_young(is_resting=True)
    del node  # by now it is among the old
    collection.collect_young(is_resting=True)
    assert cycle() is not None
    collection.collect_all(is_idle=False)
    assert cycle() is not None
    collection.collect_all(is_idle=True)
    assert cycle() is None


def test_a_server_that_is_never_idle_collects_everything_at_last(collection, monkeypatch):
    monkeypatch.setattr(garbage, "NUM_YOUNG_OBJECTS", 0)
    monkeypatch.setattr(garbage, "FULL_INTERVAL_S", 0.0)
    collection.collect_young(is_resting=True)
    cycle = weakref.ref(Node())
    collection.collect_all(is_idle=False)
    assert cycle() is None


def anonymous_kib() -> int:
    """Memory that this process shares with nobody."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc alone can be asked")
def test_a_server_that_stays_idle_gives_free_memory_back(collection, monkeypatch):
    monkeypatch.setattr(garbage, "NUM_YOUNG_OBJECTS", 0)
    texts = [bytes(2000) for _ in range(20_000)]  # 40 MB
    kept = texts[::100]  # behind each of which the heap cannot shrink by itself
    del texts
    collection.collect_young(is_resting=True)
    before_kib = anonymous_kib()
    collection.collect_all(is_idle=True)
    collection.collect_all(is_idle=False)
    assert before_kib - anonymous_kib() < 10_000
    collection.collect_all(is_idle=True)
    assert before_kib - anonymous_kib() > 20_000
    assert len(kept) == 200
