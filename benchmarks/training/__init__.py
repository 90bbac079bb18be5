"""Training on a CPU beside PyTorch, eager and compiled: `python -m benchmarks.training`."""
