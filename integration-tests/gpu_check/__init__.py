"""`make gpu-check`: everything that a machine with a GPU has to show, in ten minutes and without a network.

`python integration-tests/gpu_check` runs the parts one after the other, each in a process of its own with a time
limit (parts.py), and writes gpu-check.json and gpu-check.md (report.py). The other files are what parts run.
"""
