"""The memory that request bodies take together while they are read: bounded, with a part kept for small ones."""

from collections import Counter

from text_generation_router.errors import BodiesOverloaded

# Far more than the text of the prompts that may wait: four times the tokens of the KV cache are some ten megabytes.
MAX_BODIES_BYTES = 128 << 20
# However few, bodies of the largest size must be readable at once.
MIN_LARGEST_BODIES = 4
SMALL_BODY_BYTES = 64 << 10


class BodyMemory:
    """Counts bytes that have come, not those that are announced: nobody is refused for what a client never sends."""

    def __init__(self, payload_limit: int) -> None:
        """`payload_limit`: bytes that one body may have."""
        self._max_bytes = max(MAX_BODIES_BYTES, MIN_LARGEST_BODIES * payload_limit)
        self._num_bytes = 0
        self._held: Counter[str] = Counter()  # by tenant

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self._num_bytes

    def take(self, num_bytes: int, num_before: int, tenant: str = "") -> None:
        """Hold more bytes of a tenant's body that has so many already; raises BodiesOverloaded.

        Bodies that are no longer small must leave a quarter free: so clients that send large ones slowly do not keep
        small requests out. Nor do other tenants: one that holds less than its share, the bound over the tenants that
        hold any, may hold up to it; so there is at times more in use than the bound, at most twice as much.
        """
        is_small = num_before + num_bytes <= SMALL_BODY_BYTES
        most = self._max_bytes if is_small else self._max_bytes * 3 // 4
        share = most // (len(self._held) + (tenant not in self._held))
        if self._num_bytes + num_bytes > most and (
            self._held[tenant] + num_bytes > share or self._num_bytes + num_bytes > 2 * most
        ):
            raise BodiesOverloaded(
                f": the request bodies that are being read take {self._num_bytes} bytes, at most {most} may. "
                f"Send this one again later; those of up to {SMALL_BODY_BYTES} bytes are taken for longer"
            )
        self._num_bytes += num_bytes
        self._held[tenant] += num_bytes

    def give_back(self, num_bytes: int, tenant: str = "") -> None:
        """Bytes are held no more."""
        assert 0 <= num_bytes <= self._held[tenant], "more bytes returned than taken"
        self._num_bytes -= num_bytes
        self._held[tenant] -= num_bytes
        if not self._held[tenant]:
            del self._held[tenant]
