"""Where the time of a step goes on the device at hand: `python -m text_generation_shard.profiling MODEL_FOLDER`.

scripted_router.py writes plans as the router would, plan_feed.py keeps two of them in flight, measurement.py runs a
case and trace_summary.py reduces the profiler's trace to times by kernel and to idle time.
"""
