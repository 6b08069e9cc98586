"""Tensor-parallel building blocks. Each layer holds one rank's share of a weight and knows how to load it.

Read partition.py first: the share of a rank, and where a checkpoint tensor goes.
"""
