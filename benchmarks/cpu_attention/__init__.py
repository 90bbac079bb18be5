"""Attention on a CPU beside PyTorch's, forward and backward: `python -m benchmarks.cpu_attention`."""
