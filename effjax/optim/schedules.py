"""Learning-rate schedules over a run of `num_steps`, assembled from optax's.

Each is `(num_steps, *, fields) -> optax.Schedule`; lengths are fractions of the run, so a longer run keeps its shape.
"""

import optax

from effjax.registry import register


@register("schedule", "warmup_cosine")
def warmup_cosine(
    num_steps: int, *, peak: float = 3e-3, warmup: float = 0.05, final: float = 0.1
) -> optax.Schedule:
    """Linear from 0 to `peak` over `warmup` of the run, then a cosine to `final * peak`."""
    _check_fraction("warmup", warmup)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=_steps(warmup, num_steps),
        decay_steps=max(num_steps, 2),
        end_value=final * peak,
    )


@register("schedule", "warmup_stable_decay")
def warmup_stable_decay(
    num_steps: int, *, peak: float = 3e-3, warmup: float = 0.05, decay: float = 0.2
) -> optax.Schedule:
    """Trapezoid: linear warm-up, constant, linear to 0 over the last `decay` of the run
    (Hägele et al., 2024, arXiv 2405.18392).

    The Mixture-of-Recursions paper trains with this shape (arXiv 2507.10524, appendix C).
    """
    _check_fraction("warmup", warmup)
    _check_fraction("decay", decay)
    if warmup + decay > 1:
        raise ValueError(
            f"schedule: warmup={warmup} and decay={decay} overlap; valid: a sum of at most 1"
        )
    rise, fall = _steps(warmup, num_steps), _steps(decay, num_steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, rise),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, fall),
        ],
        [rise, max(num_steps - fall, rise)],
    )


@register("schedule", "constant")
def constant(num_steps: int, *, peak: float = 1e-3) -> optax.Schedule:
    """`peak` throughout."""
    return optax.constant_schedule(peak)


def _steps(fraction: float, num_steps: int) -> int:
    return max(1, round(fraction * num_steps))


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"schedule: {name}={value}; valid: a fraction of the run, 0 <= {name} < 1")
