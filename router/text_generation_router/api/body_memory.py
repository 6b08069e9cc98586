"""The memory that request bodies take together while they are read: bounded, with a part kept for small ones."""

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

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self._num_bytes

    def take(self, num_bytes: int, num_before: int) -> None:
        """Hold more bytes of a body that has so many already; raises BodiesOverloaded.

        Bodies that are no longer small must leave a quarter free: so clients that send large ones slowly do not keep
        small requests out.
        """
        is_small = num_before + num_bytes <= SMALL_BODY_BYTES
        most = self._max_bytes if is_small else self._max_bytes * 3 // 4
        if self._num_bytes + num_bytes > most:
            raise BodiesOverloaded(
                f": the request bodies that are being read take {self._num_bytes} bytes, at most {most} may. "
                f"Send this one again later; those of up to {SMALL_BODY_BYTES} bytes are taken for longer"
            )
        self._num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Bytes are held no more."""
        assert 0 <= num_bytes <= self._num_bytes, "more bytes returned than taken"
        self._num_bytes -= num_bytes
