"""Speculative sampling: which drafted tokens stay, such that the text is distributed as if there had been no draft.

Leviathan et al., 2023, arXiv 2211.17192, algorithm 1 and appendix A.1; Chen et al., 2023, arXiv 2302.01318, algorithm 2
and theorem 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def accept(
    keys: Key[Array, " B"],
    drafted: Int[Array, "B K"],
    num_drafted: Int[Array, " B"],
    draft: Float[Array, "B K V"],
    target: Float[Array, "B K+1 V"],
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many of the drafted tokens stay, and the token that comes after them.

    A token x that was drawn from q stays with probability min(1, p(x) / q(x)). Behind the first that does not stay, and
    in its place, comes one from the residual max(p - q, 0), normalised; behind the last, if all stay, one more from p.
    Where x stays it has the probability min(p(x), q(x)), which the residual fills up to p(x).

    Args:
      keys: one a row.
      drafted: tokens, each drawn from the draft's distribution behind those before it.
      num_drafted: how many of them are to be looked at.
      draft: q, the probabilities that each was drawn by.
      target: p, those of the target at the same places, and behind the last token.

    Returns:
      (number of tokens that stay, the token after them).
    """
    uniform_key, token_key = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    num_slots = drafted.shape[1]
    is_drafted = jnp.arange(num_slots) < num_drafted[:, None]
    of_drafted = lambda p: jnp.take_along_axis(p, drafted[..., None], axis=-1)[..., 0]  # noqa: E731
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (num_slots,)))(uniform_key)
    stays = is_drafted & (uniform * of_drafted(draft) < of_drafted(target[:, :-1]))
    num_accepted = jnp.sum(jnp.cumprod(stays, axis=1, dtype=jnp.int32), axis=1)

    # Behind the last drafted token nothing was drawn, so q is 0 and the residual is p.
    q = jnp.pad(jnp.where(is_drafted[..., None], draft, 0), ((0, 0), (0, 1), (0, 0)))
    at = num_accepted[:, None, None]
    p, q = (jnp.take_along_axis(x, at, axis=1)[:, 0] for x in (target, q))
    residual = jnp.maximum(p - q, 0)
    # Of p = q nothing is left; rounding alone can have rejected a token then, and it is p that is to be drawn from.
    residual = jnp.where(jnp.any(residual > 0, axis=-1, keepdims=True), residual, p)
    token = jax.vmap(jax.random.categorical)(token_key, jnp.log(residual))
    return num_accepted, token.astype(jnp.int32)
