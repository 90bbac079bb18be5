"""Everything that a training run carries from one step to the next, besides the data iterator."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray


@flax.struct.dataclass
class TrainState:
    """State of a run, a pytree.

    Attributes:
      step: scalar int32, updates done so far.
      params: float32 parameters.
      opt_state: state of the optimizer.
      ema: exponential moving average of the parameters, or None.
      rng: key that all randomness of later steps is folded from.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    ema: Any
    rng: PRNGKeyArray

    def variables(self) -> dict[str, Any]:
        """What to evaluate: the averaged parameters where there are any."""
        return {"params": self.params if self.ema is None else self.ema}


def initialise(
    init: Callable[..., TrainState], shardings: Any = None, params: Any = None
) -> TrainState:
    """Runs `init_state` (its arguments bound) in one compiled program that makes each array where it is to live.

    `params`, if given, are where the run starts from; their memory becomes the state's.
    """
    # The program runs once and is almost all random bits: on CPU, optimising its code takes longer than running it.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    program = jax.jit(
        init, out_shardings=shardings, compiler_options=options, donate_argnames="params"
    )
    # Called as for its shapes (`sharding.abstract_state`), so that it is not traced a second time.
    return program() if params is None else program(params=params)


def initialiser(
    model, optimizer: optax.GradientTransformation, config: Mapping[str, Any]
) -> Callable[..., TrainState]:
    """`init_state` with its arguments, but for `params`, bound to what a resolved config says."""
    return functools.partial(
        init_state,
        model,
        optimizer,
        seq_len=config["data"]["seq_len"],
        seed=config["seed"],
        ema=config["training"]["ema_decay"] is not None,
    )


def init_state(
    model,
    optimizer: optax.GradientTransformation,
    *,
    seq_len: int,
    seed: int,
    ema: bool,
    params: Any = None,
) -> TrainState:
    """The state before the first step; pure, so that it can be traced for shapes or jitted with shardings.

    Args:
      model: the model.
      optimizer: the optimizer.
      seq_len: tokens a row.
      seed: all randomness of the run.
      ema: whether to keep an average of the parameters.
      params: where the run starts from; None: random parameters.
    """
    init_key, rng = jax.random.split(jax.random.key(seed))
    if params is None:
        params = model.init(init_key, jnp.zeros((1, seq_len), jnp.int32))["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        rng=jax.random.key_data(rng),
    )
