"""Training steps a second of the models that save something, beside a dense transformer of the same cost.

The transformer has the headliner's width, depth and task, and a feed-forward as wide as gives it as many parameters, or
as many FLOPs a token: those that are really spent, as the models count them, with the load of experts even.
"""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from benchmarks import turns
from benchmarks.speed.step import Step
from configs import adamoe, based, mamba, mamba2, matryoshka, mor, switch
from effjax import models, pytree
from effjax.training import config as configs
from effjax.training import lowering, sharding
from effjax.training.planning import model_flops

RECIPES = {
    "mor": mor,
    "switch": switch,
    "adamoe": adamoe,
    "based": based,
    "mamba": mamba,
    "mamba2": mamba2,
    "matryoshka": matryoshka,
}
D_MODEL, SEQ_LEN, BATCH_SIZE = 256, 256, 4
# A hidden width is a multiple of it.
MULTIPLE = 8


def measure(name: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Sizes and seconds of steps of a headliner and of its two transformers, in turns."""
    config = sized(RECIPES[name].get_config())
    named = {
        name: config,
        "equal parameters": dense(config, parameters),
        "equal FLOPs": dense(config, flops_per_token),
    }
    steps = {key: Step(configs.resolve(config)).seconds for key, config in named.items()}
    seconds = turns.in_turn(steps, rounds)
    return {
        key: {
            "parameters": parameters(config),
            "flops_per_token": flops_per_token(config),
            "seconds_per_step": seconds[key],
        }
        for key, config in named.items()
    }


def sized(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A recipe at the size of this benchmark; rows and pairs of the same number of tokens."""
    config.model.d_model = D_MODEL
    config.data.batch_size = BATCH_SIZE * SEQ_LEN // config.data.seq_len
    config.mesh.data = 1
    return config


def dense(
    config: ml_collections.ConfigDict, cost: Callable[[ml_collections.ConfigDict], float]
) -> ml_collections.ConfigDict:
    """The transformer of a config's width, depth and task whose `cost` comes next to that of the config.

    Raises:
      ValueError: if its attention and embedding alone cost more.
    """
    target = cost(config)
    # Costs are linear in the hidden width.
    near, far = (cost(_transformer(config, hidden_dim)) for hidden_dim in (MULTIPLE, 2 * MULTIPLE))
    multiples = 1 + round((target - near) / (far - near))
    if multiples < 1:
        raise ValueError(f"the model costs {target}; valid: {near} or more, as a transformer does")
    return _transformer(config, multiples * MULTIPLE)


def _transformer(config, hidden_dim):
    config = config.copy_and_resolve_references()
    fields = {"d_model": config.model.d_model, "num_layers": config.model.num_layers}
    if config.objective.name == "contrastive":
        mixers = ({"name": "attention", "num_heads": 4, "causal": False},)
        config.model = configs.model_config("matryoshka", mixers=mixers, **fields)
        config.objective.matryoshka_dims = None
    else:
        config.model = configs.model_config("transformer", **fields)
    config.model.ffn.hidden_dim = hidden_dim
    return config


def parameters(config: ml_collections.ConfigDict) -> int:
    """All of them; those that layers share count once."""
    model = models.create(**configs.resolve(config.model))
    tokens = jax.ShapeDtypeStruct((1, config.data.seq_len), "int32")
    return pytree.count(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])


def flops_per_token(config: ml_collections.ConfigDict) -> float:
    """Forward, of an input token in training."""
    resolved = configs.resolve(config)
    batch = lowering.abstract_batch(resolved, sharding.make_mesh(resolved["mesh"]))
    return model_flops.forward_flops_per_token(resolved, batch)
