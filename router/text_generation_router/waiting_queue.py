"""WaitingQueue: sequences that are not in the batch, in order of arrival."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from text_generation_router.sequence import Sequence


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class WaitingQueue:
    """Fresh sequences join at the end; a preempted one returns to its place among those that arrived later.

    Its length is bounded from outside, by the limit on concurrent requests.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """Oldest first, over a copy, so that the loop may remove what it visits."""
        return iter(self._sequences.copy())

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in its place by arrival."""
        insort(self._sequences, sequence, key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is."""
        index = bisect_left(self._sequences, sequence.arrival, key=_arrival)
        assert self._sequences[index] is sequence
        del self._sequences[index]
