"""Time and memory of a decoded token against the length of the text before it: `python -m benchmarks.decoding`."""
