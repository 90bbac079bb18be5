"""A few steps of every preset at small size, on fresh random tokens."""

import functools
import itertools

import flax.linen as nn
import jax
import numpy as np

from effjax import models, optim, registry
from effjax.training import sharding
from effjax.training.state import init_state, initialise
from effjax.training.step import make_train_step

# Routers choose by comparing scores, so a rounding error can move a token that is almost a tie to another expert or
# depth. The rows are long enough that one token among theirs stays within the tolerance.
STEPS, ROWS, LENGTH, VOCAB = 20, 8, 64, 32
SMALL = {"d_model": 16, "num_layers": 1, "vocab_size": VOCAB, "max_seq_len": LENGTH}
RECURSION = {"num_layers": 2, "depth.num_recursions": 2, "depth.sharing": "cycle"}
HEADLINERS = {
    "transformer": {},
    "recursive": RECURSION,
    "mor": RECURSION,
    "switch": {},
    "adamoe": {},
    "based": {"num_layers": 3},
    "matryoshka": {},
}
STATE_SPACE = {
    "mamba": {"mixers": ({"name": "mamba", "state_dim": 4},)},
    "mamba2": {"mixers": ({"name": "mamba2", "head_dim": 8, "state_dim": 4},)},
}
FIELDS = HEADLINERS | STATE_SPACE


def batches(name, seed):
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        tokens = rng.integers(VOCAB, size=(ROWS, LENGTH + 1), dtype=np.int32)
        segments = 1 + (np.arange(LENGTH) >= rng.integers(4, LENGTH, size=(ROWS, 1))).astype(
            np.int32
        )
        if name == "matryoshka":
            # Unrelated pairs: where the loss nears 0, a rounding error is a large part of it, on one device too.
            whole = np.ones_like(segments)
            yield {
                "query_tokens": tokens[:, 1:],
                "query_segment_ids": whole,
                "document_tokens": rng.integers(VOCAB, size=segments.shape, dtype=np.int32),
                "document_segment_ids": whole,
            }
        else:
            yield {
                "tokens": tokens[:, :-1],
                "targets": tokens[:, 1:],
                "segment_ids": segments,
                "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
                "loss_mask": np.ones((ROWS, LENGTH), np.float32),
            }


@functools.cache
def losses_on_one_device(name, seed):
    return losses(small(name), name, {}, seed)


def small(name):
    """A preset at a size that compiles in seconds."""
    return models.create(name, **(SMALL | FIELDS[name]))


def losses(model, name, mesh_sizes, seed, steps=STEPS):
    """The losses of the first steps of a model like preset `name`."""
    mesh = sharding.make_mesh(
        mesh_sizes, jax.devices()[: np.prod(list(mesh_sizes.values()) or [1])]
    )
    objective = registry.build("objective", objective_of(name))
    state = first_state(name, seed)
    shardings = sharding.state_shardings(state, mesh)
    rows = sharding.batch_sharding(mesh)
    found = []
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
        state = jax.device_put(state, shardings)
        step = jax.jit(
            make_train_step(model, objective, adamw()),
            in_shardings=(shardings, rows),
            out_shardings=(shardings, None),
        )
        for batch in itertools.islice(batches(name, seed), steps):
            state, metrics = step(state, jax.device_put(batch, rows))
            found.append(float(metrics["loss"]))
    return np.array(found)


@functools.cache
def first_state(name, seed):
    """The state of preset `name` before the first step, made once for all meshes."""
    return initialise(initialiser_of(name, seed))


def initialiser_of(name, seed):
    return functools.partial(
        init_state, small(name), adamw(), seq_len=LENGTH, seed=seed % 1000, ema=False
    )


def adamw():
    schedule = {"name": "constant", "peak": 1e-3}
    return optim.build(optim.spec("adamw", schedule=schedule), STEPS)[0]


def objective_of(name):
    if name == "matryoshka":
        return {"name": "contrastive", "matryoshka_dims": (4, 8, 16)}
    return {"name": "next_token"}
