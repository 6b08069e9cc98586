"""What is counted of the queue, the batch and the KV memory, told by the engine whenever somebody asks."""

from text_generation_router.exposition import Registry


class MemoryMetrics:
    """Queue, batch and KV memory as they are, and what the scheduler has counted so far."""

    def __init__(self, registry: Registry) -> None:
        self._queue_size = registry.gauge("tgi_queue_size", "Requests waiting")
        self._queue_tokens = registry.gauge(
            "tgi_queue_prompt_tokens", "Prompt tokens of requests that have not run yet"
        )
        self._batch_size = registry.gauge("tgi_batch_current_size", "Running sequences")
        self._batch_max_tokens = registry.gauge("tgi_batch_current_max_tokens", "Tokens the running batch may grow to")
        self._capacity = registry.gauge("tgi_batch_max_total_tokens", "Tokens the KV memory holds")
        self._readerless = registry.gauge(
            "tgi_sequences_without_reader", "Unfinished sequences whose client is gone: 0 but for moments"
        )
        self._used = registry.gauge("tgi_kv_blocks_used", "KV blocks owned by sequences")
        self._cached = registry.gauge("tgi_kv_blocks_cached", "KV blocks kept by the prefix cache alone")
        self._total = registry.gauge("tgi_kv_blocks_capacity", "KV blocks")
        self._preemptions = registry.counter("tgi_preemptions", "Sequences whose blocks were taken back")
        self._recomputed_tokens = registry.counter(
            "tgi_recomputed_tokens", "Tokens computed once more after a preemption"
        )
        self._query_tokens = registry.counter(
            "tgi_prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache"
        )
        self._hit_tokens = registry.counter("tgi_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache")

    def set_capacity(self, max_total_tokens: int) -> None:
        """Tokens that the KV memory holds, known after warm-up."""
        self._capacity.set(max_total_tokens)

    def set_queue(self, size: int, num_prompt_tokens: int) -> None:
        """Sequences waiting, and the prompt tokens of those that have not run yet."""
        self._queue_size.set(size)
        self._queue_tokens.set(num_prompt_tokens)

    def set_batch(self, size: int, max_tokens: int) -> None:
        """Running sequences, and the tokens that they may grow to."""
        self._batch_size.set(size)
        self._batch_max_tokens.set(max_tokens)

    def set_readerless(self, count: int) -> None:
        """Unfinished sequences whose tokens nobody will read."""
        self._readerless.set(count)

    def set_blocks(self, used: int, cached: int, total: int) -> None:
        """KV blocks: owned by sequences, kept by the prefix cache alone, and all."""
        self._used.set(used)
        self._cached.set(cached)
        self._total.set(total)

    def set_preempted(self, preemptions: int, recomputed_tokens: int) -> None:
        """How often sequences lost their blocks so far, and the tokens that were computed again for that."""
        self._preemptions.set_total(preemptions)
        self._recomputed_tokens.set_total(recomputed_tokens)

    def set_prefix_cache(self, query_tokens: int, hit_tokens: int) -> None:
        """Prompt tokens looked up in the prefix cache so far, and those it held."""
        self._query_tokens.set_total(query_tokens)
        self._hit_tokens.set_total(hit_tokens)
