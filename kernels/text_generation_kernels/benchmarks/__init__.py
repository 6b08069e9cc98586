"""How close each operation comes to what the GPU can do: `python -m text_generation_kernels.benchmarks [OPERATION …]`.

harness.py measures; each bench_<operation>.py only builds inputs; tune.py finds entries of the launch table.
"""
