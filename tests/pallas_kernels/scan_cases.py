"""What the tests of the scans share: segments, and where a recurrence meets them."""

import jax.numpy as jnp
import numpy as np


def random_segments(rng, batch, length):
    """Segments in order, with padding between and inside."""
    segments = np.sort(rng.integers(1, 4, (batch, length)), axis=1)
    return (segments * (rng.random((batch, length)) > 0.2)).astype(np.int32)


def tokens_of(segment_ids):
    """`(t, whether the state is emptied before it)` for each token of a row [T] that is no padding."""
    segment = None
    for t in np.flatnonzero(segment_ids):
        yield t, segment not in (None, segment_ids[t])
        segment = segment_ids[t]


def positive_steps(rng, shape):
    """Steps as a softplus gives them: from hardly anything to more than one."""
    return np.log1p(np.exp(rng.normal(size=shape) - 1))


def weighted_sum(*arrays):
    """A loss in float32: every number times one of its own, which does not depend on it.

    States grow, and of a large number a sine would keep few digits.
    """
    return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in arrays)
