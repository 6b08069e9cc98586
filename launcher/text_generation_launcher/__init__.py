"""Starts, watches and stops the shard and router processes; owns no request state.

Imports, of our packages, only the two config modules. Heart of the room: processes.py; then cli.py, gpus.py.
"""
