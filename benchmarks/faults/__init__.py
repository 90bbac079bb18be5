"""Hurts real training runs and looks whether anything is lost: `python -m benchmarks.faults`.

Each fault is done to processes of `train.py`, which are then started again as a user would start them. A fault is
survived if the run ends with parameters, optimizer state and data state that are bit for bit those of a run of the same
config on the same mesh to which nothing was done, and if what the fault should make it say was said.
"""

# Names the fault that the parts of `faulty` are to have, in the environment of a run.
FAULT = "EFFJAX_FAULT"
# Of the run that is hurt.
NUM_STEPS, CHECKPOINT_EVERY = 80, 5
