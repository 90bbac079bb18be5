"""From the logits of the next token to the token: pure functions, each of which leaves fewer tokens or other odds.

A parameter is one number, or one a row: [B] to go with logits [B, V].
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

# Of one number for all rows, or of one number a row.
Parameter = Float[Array | np.ndarray, "B"] | float

# Which settings are in use, and their values; under `jax.jit` the first is static and the second is not.
Settings = Mapping[str, Parameter]

# Values of each setting that leave nothing to do. Where the most likely token is taken, it passes every filter.
_OFF = {
    "temperature": (0.0,),
    "top_k": (None,),
    "top_p": (None, 1.0),
    "min_p": (None,),
    "repetition_penalty": (1.0,),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The steps apply in the order of the fields, the penalty before all of them.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token (greedy).
      top_k: so many of the most likely tokens can be drawn (Fan et al., 2018, arXiv 1805.04833); None: all.
      top_p: the most likely tokens that have this probability together (Holtzman et al., 2020, arXiv 1904.09751).
      min_p: tokens with at least this share of the probability of the most likely one (Nguyen et al., 2024,
        arXiv 2407.01082).
      repetition_penalty: divides the logits of tokens that the text has already, prompt included (Keskar et al., 2019,
        arXiv 1909.05858, section 4.1); 1: none.

    Raises:
      ValueError: for a value that is not valid.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}; valid: 0 or greater")
        if self.top_k is not None and (self.top_k != int(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k={self.top_k}; valid: None or an int of at least 1")
        for field in ("top_p", "min_p"):
            value = getattr(self, field)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{field}={value}; valid: None or 0 < {field} <= 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}; valid: greater than 0")

    def settings(self) -> Settings:
        """Those that change something: what is not in use costs nothing, and another value is not another program."""
        used = {name: getattr(self, name) for name in _OFF if getattr(self, name) not in _OFF[name]}
        if "temperature" not in used:
            used = {name: used[name] for name in used if name == "repetition_penalty"}
        return {name: float(value) for name, value in used.items()}


# The model's own distribution.
PLAIN = Sampling()


def draw(
    keys: Key[Array, " B"],
    logits: Float[Array, "B V"],
    settings: Settings,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """A token for each row, by a key of its own: what a row gets does not depend on what else is in the batch.

    Args:
      keys: one a row.
      logits: of the next token.
      settings: see `Sampling.settings`; without a temperature the most likely token is taken.
      seen: tokens that the row has already, for `repetition_penalty`.
    """
    logits = adjust(logits, settings, seen)
    if "temperature" not in settings:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def adjust(
    logits: Float[Array, "B V"], settings: Settings, seen: Bool[Array, "B V"] | None = None
) -> Float[Array, "B V"]:
    """Logits of the distribution that tokens are drawn from: the penalty, the temperature, and then the filters."""
    if "repetition_penalty" in settings:
        if seen is None:
            raise ValueError("repetition_penalty and seen=None; valid: the tokens that were seen")
        logits = penalise_repetition(logits, seen, settings["repetition_penalty"])
    for name, step in STEPS.items():
        if name in settings:
            logits = step(logits, settings[name])
    return logits


def probabilities(
    logits: Float[Array, "... V"], settings: Settings, seen: Bool[Array, "... V"] | None = None
) -> Float[Array, "... V"]:
    """What `draw` draws tokens by; without a temperature all of it is on the most likely one.

    Args:
      logits: of the next token, at one or more places.
      settings: see `Sampling.settings`; one number for all rows, or one a row, the first axis of the logits.
      seen: tokens that the text has already before that place, for `repetition_penalty`.
    """
    num_tokens = logits.shape[-1]
    flat = lambda x: x.reshape(-1, num_tokens)  # noqa: E731
    settings = {name: _at_every_place(value, logits) for name, value in settings.items()}
    adjusted = adjust(flat(logits), settings, None if seen is None else flat(seen))
    if "temperature" in settings:
        found = jax.nn.softmax(adjusted)
    else:
        found = jax.nn.one_hot(jnp.argmax(adjusted, axis=-1), num_tokens)
    return found.reshape(logits.shape)


def penalise_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Parameter
) -> Float[Array, "B V"]:
    """Divides the logits of tokens that were seen by the penalty (CTRL, arXiv 1909.05858, section 4.1).

    A negative logit would rise by that, which is not what it is for, so it is multiplied.
    """
    penalty = _per_row(penalty)
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, penalised, logits)


def temper(logits: Float[Array, "B V"], temperature: Parameter) -> Float[Array, "B V"]:
    """Divides the logits by the temperature; in a row whose temperature is 0 only the first of the largest stays."""
    temperature = _per_row(temperature)
    largest = jnp.argmax(logits, axis=-1, keepdims=True) == jnp.arange(logits.shape[-1])
    tempered = logits / jnp.where(temperature > 0, temperature, 1.0)
    return jnp.where((temperature > 0) | largest, tempered, -jnp.inf)


def keep_top_k(logits: Float[Array, "B V"], k: Parameter) -> Float[Array, "B V"]:
    """Leaves the k largest; equals of the last of them stay too."""
    descending = -jnp.sort(-logits, axis=-1)
    last = jnp.clip(_per_row(k).astype(jnp.int32), 1, logits.shape[-1]) - 1
    threshold = jnp.take_along_axis(
        descending, jnp.broadcast_to(last, (*logits.shape[:-1], 1)), axis=-1
    )
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: Parameter) -> Float[Array, "B V"]:
    """Leaves the nucleus (arXiv 1904.09751, section 3.1): the fewest of the largest whose probability is p or more.

    Equals of the last of them stay too.
    """
    p = _per_row(p)
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding may let `before` reach 1 ahead of the last token.
    inside = (before < p) | (p >= 1)
    threshold = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "B V"], p: Parameter) -> Float[Array, "B V"]:
    """Leaves tokens with at least p times the probability of the likeliest (arXiv 2407.01082, section 3)."""
    threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(_per_row(p))
    return jnp.where(logits >= threshold, logits, -jnp.inf)


# In the order of Hugging Face's and vLLM's samplers: temperature first, so it changes who is in the nucleus.
STEPS = {"temperature": temper, "top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p}


def _per_row(parameter: Parameter) -> Array:
    """As float32 that goes with logits [B, V]: [1], or [B, 1] of one a row."""
    return jnp.asarray(parameter, jnp.float32)[..., None]


def _at_every_place(value: Parameter, logits: Float[Array, "... V"]) -> Parameter:
    """A setting of each row as one of each of its places, in the order of a table of all places."""
    if not jnp.ndim(value):
        return value
    per_row = jnp.reshape(value, (-1, *[1] * (logits.ndim - 2)))
    return jnp.broadcast_to(per_row, logits.shape[:-1]).reshape(-1)
