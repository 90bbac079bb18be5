"""Validation that ops share: errors that name the argument and what is valid."""

import jax.numpy as jnp


def check_array(op: str, name: str, x, axes: str, shape: tuple[int | None, ...]) -> None:
    """Checks that `x` is floating and of `shape`, where None stands for any size."""
    sizes = jnp.shape(x)
    fits = len(sizes) == len(shape) and all(
        want in (None, size) for size, want in zip(sizes, shape, strict=True)
    )
    if not fits:
        want = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} must be {axes} = [{want}], not of shape {sizes}")
    if 0 in sizes:
        raise ValueError(f"{op}: {name} has an axis of size 0: {sizes}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{op}: {name} must be floating point, not {x.dtype}")


def check_same_dtype(op: str, name: str, x, of: str, like) -> None:
    if x.dtype != like.dtype:
        raise ValueError(f"{op}: {name} has dtype {x.dtype} but {of} has {like.dtype}")


def check_segment_ids(op: str, segment_ids, shape: tuple[int, int]) -> None:
    if jnp.shape(segment_ids) != shape:
        raise ValueError(
            f"{op}: segment_ids must be of shape {shape}, not {jnp.shape(segment_ids)}"
        )
    if not jnp.issubdtype(jnp.result_type(segment_ids), jnp.integer):
        raise ValueError(f"{op}: segment_ids must be integer, not {jnp.result_type(segment_ids)}")


def check_positive_int(op: str, name: str, value) -> None:
    """Checks an option that None leaves out."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{op}: {name} must be a positive int or None, not {value!r}")


def check_soft_cap(op: str, value) -> None:
    """A soft cap of logits, or None."""
    if value is not None and not value > 0:
        raise ValueError(f"{op}: logits_soft_cap must be positive or None, not {value!r}")
