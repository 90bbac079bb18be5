"""Tokens a second of Mixture-of-Recursions against mean depth: `python -m benchmarks.depthwise`."""
