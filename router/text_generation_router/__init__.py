"""The router: queueing, batching, validation, tracing, HTTP. Owns requests, sequences, block tables and text.

One asyncio process; imports no torch, and of our packages only text_generation_proto.

Heart of the room: engine.py, the loop around scheduler.py. Read sequence.py, step.py, block_manager.py,
scheduler.py, engine.py, shard_client.py, then output.py, validation.py and api/ for the way in and out.
"""
