"""The router: queueing, batching, validation, tracing, HTTP. Owns requests, sequences, block tables and text.

One asyncio process; imports no torch, and of our packages only text_generation_proto.

Heart of the room: engine.py, the loop around scheduler.py. Read sequence.py, step.py, block_manager.py,
prefix_sharing.py, scheduler.py, engine.py, shard_client.py, then output.py, validation.py and api/ for the way in
and out.
"""

import os

# grpc reads this when it is imported. The processes that the router starts never call it, so that they need none of
# its preparations for a fork, which it cannot make beside its own threads and says so in the log.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
