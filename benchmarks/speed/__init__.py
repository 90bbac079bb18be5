"""What a run costs beside its arithmetic, and how fast the models are: `python -m benchmarks.speed`."""
