"""What the shipped recipes come to on machines of hundreds of chips, by `train.py --plan.topology`."""
