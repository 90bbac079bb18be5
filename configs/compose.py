"""Any mixers x feed-forward x depth x head, and any optimizer, from the command line.

    --config=configs/compose.py:mixers=short_conv+sliding_window+taylor_linear,ffn=adamoe,depth=mixture_of_recursions

Every field of the parts can then be set: --config.model.ffn.top_k=2 --config.model.mixers[1].window=32. Other fields of
the model fit in too: num_layers=8. `optimizer=lion` takes another of optax's optimizers (`effjax.optim.names()`), with
optax's numbers and the schedule of every recipe, whose peak suits AdamW: --config.optimizer.schedule.peak=1e-3.
"""

from effjax import registry
from effjax.training import config as configs

PARTS = ("mixers", "ffn", "depth", "head", "norm", "num_layers", "d_model", "optimizer")
# What every depth policy takes as it is: the middle three are one layer three times, or three layers.
NUM_LAYERS = 5


def get_config(parts=None):
    overrides = dict(_field(part) for part in parts.split(",")) if parts else {}
    optimizer = overrides.pop("optimizer", None)
    config = configs.default("transformer", **({"num_layers": NUM_LAYERS} | overrides))
    if optimizer:
        config.optimizer = configs.optimizer_config(optimizer)
    return config


def _field(part):
    name, found, value = part.partition("=")
    if not found or name not in PARTS:
        raise ValueError(f"config: {registry.unknown('part', part, [f'{p}=...' for p in PARTS])}")
    if name == "mixers":
        return name, tuple({"name": mixer} for mixer in value.split("+"))
    return name, int(value) if value.isdigit() else value
