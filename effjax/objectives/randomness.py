"""The random streams of a model while it trains."""

import jax
from jaxtyping import PRNGKeyArray


def streams(rng: PRNGKeyArray | None) -> dict[str, PRNGKeyArray] | None:
    """Independent keys for `routing` and `dropout`; None, which means evaluation, has none."""
    if rng is None:
        return None
    return dict(zip(("routing", "dropout"), jax.random.split(rng), strict=True))
