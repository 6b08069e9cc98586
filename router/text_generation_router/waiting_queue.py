"""WaitingQueue: sequences that are not in the batch, in the order in which they may join it.

Tenants take turns by the tokens that their sequences ask for (start-time fair queueing): a tenant's virtual time grows
by the cost of each of its sequences that joins, and the tenant that is furthest behind goes first. One that was away
comes back at the queue's own virtual time, so nobody saves up turns. Within a tenant priority goes before arrival.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from text_generation_router.sequence import Sequence

# What a sequence is expected to generate before any has ended, and the weight of the newest in the running mean.
_FIRST_EXPECTED_TOKENS = 128.0
_SMOOTHING = 0.02


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.arrival


class _Line:
    """One tenant's sequences, in order. Without any it is kept for its virtual time."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.num_prompt_tokens = 0
        self.virtual_time = 0.0


class WaitingQueue:
    """Fresh sequences stand in their tenant's line; those that were in the batch before go ahead of all lines."""

    def __init__(self) -> None:
        self._returned: list[Sequence] = []  # by arrival
        self._lines: dict[str, _Line] = {}
        self._num_fresh = 0
        self._num_prompt_tokens = 0
        self._virtual_time = 0.0
        self._expected_tokens = _FIRST_EXPECTED_TOKENS

    def __len__(self) -> int:
        return len(self._returned) + self._num_fresh

    def __iter__(self) -> Iterator[Sequence]:
        """First to last, over copies, so that the loop may take out what it visits."""
        yield from self._returned.copy()
        heap = [
            (line.virtual_time, line.sequences[0].arrival, 0, line.sequences.copy())
            for line in self._lines.values()
            if line.sequences
        ]
        heapify(heap)
        while heap:
            virtual_time, _, index, sequences = heappop(heap)
            sequence = sequences[index]
            yield sequence
            if index + 1 < len(sequences):
                virtual_time += self._cost(sequence)
                heappush(heap, (virtual_time, sequences[index + 1].arrival, index + 1, sequences))

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of the fresh sequences."""
        return self._num_prompt_tokens

    def has_room(self, tenant: str, num_prompt_tokens: int, max_prompt_tokens: int) -> bool:
        """Whether a sequence may be added where so many prompt tokens may wait.

        A tenant that has less than its share of them waiting may add up to it, whatever others have; and a queue
        without tokens takes anything.
        """
        if not self._num_prompt_tokens or self._num_prompt_tokens + num_prompt_tokens <= max_prompt_tokens:
            return True
        line = self._lines.get(tenant)
        own = 0 if line is None else line.num_prompt_tokens
        num_tenants = sum(bool(line.sequences) for line in self._lines.values()) + (own == 0)
        return own + num_prompt_tokens <= max_prompt_tokens // num_tenants

    def note_generated(self, num_tokens: int) -> None:
        """A sequence ended after so many tokens: others are expected to generate about as many."""
        self._expected_tokens += _SMOOTHING * (num_tokens - self._expected_tokens)

    def _cost(self, sequence: Sequence) -> float:
        """Tokens that a sequence is expected to take."""
        return sequence.num_prompt_tokens + min(sequence.request.max_new_tokens, self._expected_tokens)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in its place."""
        if sequence.has_had_turn:
            insort(self._returned, sequence, key=_arrival)
            return
        line = self._lines.get(sequence.request.tenant)
        if line is None:
            self._forget_lines()
            line = self._lines[sequence.request.tenant] = _Line()
        if not line.sequences:
            line.virtual_time = max(line.virtual_time, self._virtual_time)
        insort(line.sequences, sequence, key=_rank)
        line.num_prompt_tokens += sequence.num_prompt_tokens
        self._num_prompt_tokens += sequence.num_prompt_tokens
        self._num_fresh += 1

    def _forget_lines(self) -> None:
        """Drop the empty lines whose tenants would come back at the queue's own virtual time anyway."""
        self._lines = {
            tenant: line
            for tenant, line in self._lines.items()
            if line.sequences or line.virtual_time > self._virtual_time
        }

    def join(self, sequence: Sequence) -> None:
        """Take out a sequence that joins the batch: its tenant has had this turn."""
        if not sequence.has_had_turn:
            line = self._lines[sequence.request.tenant]
            self._virtual_time = max(self._virtual_time, line.virtual_time)
            line.virtual_time += self._cost(sequence)
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is."""
        if sequence.has_had_turn:
            index = bisect_left(self._returned, sequence.arrival, key=_arrival)
            assert self._returned[index] is sequence
            del self._returned[index]
            return
        line = self._lines[sequence.request.tenant]
        index = bisect_left(line.sequences, _rank(sequence), key=_rank)
        assert line.sequences[index] is sequence
        del line.sequences[index]
        line.num_prompt_tokens -= sequence.num_prompt_tokens
        self._num_prompt_tokens -= sequence.num_prompt_tokens
        self._num_fresh -= 1
