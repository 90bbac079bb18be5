"""Small models with random parameters of a size that makes their parts, routers included, matter."""

import jax
import jax.numpy as jnp
import numpy as np

from effjax import pytree


def random_variables(model, rng):
    """Parameters drawn so that logits are of order 1, decisions vary and no two layers are alike."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path.endswith("embed/embedding"):
            values = noise / np.sqrt(leaf.shape[-1])
        elif leaf.ndim > 1:
            values = noise / np.sqrt(leaf.shape[-2])
        else:
            values = 0.1 * noise + ("bias" not in path)
        return np.float32(values)

    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, map(draw, pytree.paths(shapes), leaves))
