"""Side-by-side benchmarks: time, peak memory and error against float64 for this library and its peers.

`python -m benchmarks` runs what the machine can run; docs/benchmarks/running.md says how each figure is taken.
"""
