"""Speed and memory, ours and the peer's interleaved in one run, as ratios; `python -m benchmarks.NAME [--json]`."""
