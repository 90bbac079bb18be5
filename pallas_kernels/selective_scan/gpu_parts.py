"""Time cut into parts that the GPU kernels walk side by side, where rows and channels are too few to fill the GPU.

A block takes 128 channels of a row from the first token to the last, and a multiprocessor is busy with one: a row of
768 channels would leave 126 of 132 multiprocessors idle. As over the devices of a mesh (`pallas_kernels.carried`), all
parts are walked from an empty state, which gives what each adds to the state; what is before each part follows, and all
are walked again from there, at twice the work.
"""

import jax.numpy as jnp

from pallas_kernels.hopper import MULTIPROCESSORS
from pallas_kernels.selective_scan.gpu_tile import BLOCK
from pallas_kernels.selective_scan.state import decay_over
from pallas_kernels.varying import vary_alike

# Twice the work, and two kernels to start: fewer or shorter parts do not pay.
FEWEST = 4
SHORTEST = 128


def count(batch: int, time: int, channels: int) -> int:
    """Into how many parts `time` tokens are cut; `channels` are whole blocks."""
    parts = min(MULTIPROCESSORS // (batch * (channels // BLOCK)), time // SHORTEST)
    return parts if parts >= FEWEST else 1


def walk(scan, parts: int, u, delta, A, B, C, D, z, resets, state):
    """`scan` of the same arguments, with time, which the number of parts divides, in parts."""
    if parts == 1:
        return scan(u, delta, A, B, C, D, z, resets, state)
    batch = u.shape[0]

    def cut(x):
        return None if x is None else x.reshape(batch * parts, x.shape[1] // parts, *x.shape[2:])

    def by_row(x):
        return x.reshape(batch, parts, *x.shape[1:])

    def from_states(states):
        states = states.reshape(batch * parts, *state.shape[1:])
        return scan(cut(u), cut(delta), A, cut(B), cut(C), D, cut(z), cut(resets), states)

    nothing = jnp.zeros((batch, parts, *state.shape[1:]), state.dtype)
    _, added = from_states(vary_alike((nothing, state))[0])
    left = decay_over(cut(delta), A)
    if resets is not None:
        left = jnp.where(cut(resets).any(axis=1)[:, None, None], 0, left)
    added, left = by_row(added), by_row(left)
    befores = [state]
    for part in range(parts - 1):
        befores.append(left[:, part] * befores[-1] + added[:, part])
    y, last = from_states(jnp.stack(befores, axis=1))
    return y.reshape(u.shape), by_row(last)[:, -1]
