"""The operations of the forward pass and of sampling. Import none of our packages; know no model, no sequence.

Heart of the room: reference.py, every operation in plain PyTorch.
"""
