"""`text-generation-benchmark`: puts load on a running server and reports latency and throughput.

A process of its own, never imported by the launcher; needs nothing of the other packages. Reading order: client.py
(one stream), load.py (many), report.py (the figures), then request_sets.py and plot.py.
"""
