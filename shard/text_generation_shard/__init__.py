"""One process per GPU (or CPU rank): the model, KV memory, sampling. Knows token ids, never text.

Imports, of our packages, text_generation_proto and text_generation_kernels. Importing this package stays cheap:
model_files.py and config.py must load without torch.

Heart of the room: model_runner.py, one step. Read config.py, server.py, model_runner.py, input_batch.py,
forward_context.py, then models/ and layers/ (a CPU's forward pass is layers/cpu_decoder.py).
"""
