"""The config of a run: what every recipe fills in, and the checks before anything is built."""

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
from ml_collections import config_dict

from effjax import data, models, optim, registry
from effjax.models.layer_tying import INITIALISATIONS
from effjax.training import sharding

NONFINITE = ("stop", "skip")


def default(model: str, **overrides: Any) -> ml_collections.ConfigDict:
    """A complete config for a model of the zoo, tiny by default; recipes change what they care about.

    Args:
      model: name of a preset (`effjax.models.names`).
      **overrides: dotted or nested fields of the model, as for `effjax.models.spec`.
    """
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = model_config(model, **overrides)
    config.data = editable(data.DataRecipe, data.default_config())
    # A Hugging Face folder to start from, and how its layers are tied if the model is recursive.
    config.init_from = {"path": config_dict.placeholder(str), "initialisation": "stepwise"}
    config.objective = part_config("objective", "next_token")
    config.optimizer = optimizer_config("adamw", weight_decay=0.1, b2=0.95)
    config.training = {
        "num_steps": 150,
        "accumulation_steps": 1,
        "ema_decay": config_dict.placeholder(float),
        "offload_optimizer": False,  # keep the optimizer's state in the hosts' memory between its updates
        # What to do about a step whose loss, gradient or update is not finite: stop, or skip up to so many in a row.
        "nonfinite": "stop",
        "max_skipped": 10,
        "log_every": 10,
        "eval_every": 50,
        "eval_batches": 8,
        "checkpoint_every": 50,
        "keep": 2,
        "keep_best": True,
    }
    config.mesh = dict.fromkeys(sharding.MESH_AXES, 1) | {"data": -1}
    config.evaluation = {
        "step": config_dict.placeholder(int),  # of the checkpoint; none is the newest
        "num_batches": 256,
        "latency_runs": 10,
    }
    return config


def model_config(name: str, **overrides: Any) -> ml_collections.ConfigDict:
    """The model section: every field of the model, settable from the command line."""
    preset = type(registry.lookup("model", name)())
    return editable(preset, models.spec(name, **overrides))


def part_config(kind: str, name: str, **fields: Any) -> ml_collections.ConfigDict:
    """The section of any one registered part, with every field."""
    part = registry.build(kind, {"name": name, **fields})
    return editable(registry.lookup(kind, name), registry.describe(part))


def optimizer_config(name: str, **overrides: Any) -> ml_collections.ConfigDict:
    """The optimizer section, with every number that optax's optimizer takes."""
    spec = optim.spec(name, **overrides)
    config = ml_collections.ConfigDict(spec)
    config.schedule = part_config("schedule", **spec["schedule"])
    for field in ("clip_norm", "momentum", "weight_decay_rate"):
        if field in config and config[field] is None:
            config[field] = config_dict.placeholder(float)
    return config


def editable(part: Any, spec: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A spec as a ConfigDict that flags can override throughout.

    Optional fields become typed placeholders, and specs within tuples become ConfigDicts too.

    Args:
      part: the class or function whose type hints say what an optional field would hold.
      spec: its spec, as `registry.describe` gives it.
    """
    hints = typing.get_type_hints(part)
    config = ml_collections.ConfigDict()
    for field, value in spec.items():
        kind = registry.kind_of(field)
        if kind and isinstance(value, Mapping):
            value = editable(registry.lookup(kind, value["name"]), value)
        elif kind and isinstance(value, tuple):
            value = tuple(editable(registry.lookup(kind, one["name"]), one) for one in value)
        elif value is None:
            value = config_dict.placeholder(_held_type(hints[field]))
        config[field] = value
    return config


def resolve(config: Any) -> Any:
    """Plain dicts, tuples and values of a config, placeholders resolved to None."""
    if isinstance(config, Mapping | ml_collections.ConfigDict):
        return {key: resolve(config[key]) for key in config}
    if isinstance(config, tuple | list):
        return tuple(resolve(value) for value in config)
    return config


def _held_type(annotation: Any) -> type:
    """The type of an optional field when it is not None; `object` where that is not one simple type."""
    choices = [t for t in typing.get_args(annotation) if t is not types.NoneType]
    return choices[0] if len(choices) == 1 and choices[0] in (int, float, str, bool) else object


def check(config: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> None:
    """Raises one clear error for the first thing in a config that cannot work.

    Args:
      config: the config.
      devices: what it has to work on; None: all that are here.

    Raises:
      ValueError: naming field, value and what is valid.
    """
    config, known = resolve(config), resolve(default("transformer"))
    _check_keys("config", config, known)
    for section in ("init_from", "training", "mesh", "evaluation"):
        _check_keys(f"config.{section}", config[section], known[section])
    initialisation = config["init_from"]["initialisation"]
    if initialisation not in INITIALISATIONS:
        wrong = registry.unknown("initialisation", initialisation, INITIALISATIONS)
        raise ValueError(f"init_from.initialisation: {wrong}")
    training, batch_size = config["training"], config["data"]["batch_size"]
    for field in (
        "num_steps",
        "accumulation_steps",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep",
        "max_skipped",
    ):
        if training[field] < 1:
            raise ValueError(f"training.{field}={training[field]}; valid: 1 or more")
    if training["nonfinite"] not in NONFINITE:
        wrong = registry.unknown("choice", training["nonfinite"], NONFINITE)
        raise ValueError(f"training.nonfinite: {wrong}")
    decay = training["ema_decay"]
    if decay is not None and not 0 < decay < 1:
        raise ValueError(f"training.ema_decay={decay}; valid: between 0 and 1, or None")
    model = config["model"]
    if config["data"]["seq_len"] > model["max_seq_len"]:
        raise ValueError(
            f"data.seq_len={config['data']['seq_len']} is longer than model.max_seq_len={model['max_seq_len']}"
        )
    vocab_size = data.tokenizer(config["data"]).vocab_size
    if model["vocab_size"] < vocab_size:
        raise ValueError(
            f"model.vocab_size={model['vocab_size']} is smaller than the tokenizer's; valid: {vocab_size} or more"
        )
    mesh = sharding.make_mesh(config["mesh"], devices)
    sharding.check_batch(
        batch_size, config["data"]["seq_len"], mesh, training["accumulation_steps"]
    )
    if mesh.shape["pipeline"] > 1:
        _check_pipeline(config, mesh)


def _check_pipeline(config: Mapping[str, Any], mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if the layers or the rows do not divide into the stages of the mesh."""
    stages, model = mesh.shape["pipeline"], models.create(**config["model"])
    where, count = f"mesh.pipeline={stages}", model.num_microbatches
    if not model.scan_layers:
        raise ValueError(f"{where} with model.scan_layers=False; valid: True, or mesh.pipeline=1")
    if count is None or count < 1 or count % stages:
        raise ValueError(
            f"{where} with model.num_microbatches={count}; valid: a multiple of {stages} (of M, stages have no work in "
            f"{stages - 1} / (M + {stages - 1}) of the time)"
        )
    for stack in model.depth.repeated(model.stack()):
        if stack.num_repeats % stages:
            raise ValueError(
                f"{where} with model.num_layers={model.num_layers}, which model.mixers and "
                f"model.depth={config['model']['depth']['name']!r} make a stack of {stack.num_repeats} repeats of; "
                f"valid: repeats that {stages} divides"
            )
    parts = sharding.batch_shards(mesh) // stages * count * config["training"]["accumulation_steps"]
    if config["data"]["batch_size"] % parts:
        raise ValueError(
            f"data.batch_size={config['data']['batch_size']}; valid: a multiple of {parts} (mesh axes data x fsdp x "
            "expert, times model.num_microbatches, times training.accumulation_steps)"
        )


def _check_keys(where: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: {registry.unknown('field', key, known)}")
    missing = [key for key in known if key not in given]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")


def of_size(
    model: str, name: str | None, sizes: Mapping[str, Mapping[str, Any]]
) -> ml_collections.ConfigDict:
    """The config of a recipe at a named size (`--config=configs/mor.py:360m`); none named is the tiny one.

    Args:
      model: name of a preset.
      name: one of `sizes`, or None.
      sizes: model fields of each size. Runs of these have long sequences, large batches and many steps.

    Raises:
      ValueError: for a size that the recipe does not have.
    """
    if name is None:
        return default(model)
    if name not in sizes:
        raise ValueError(f"config: {registry.unknown('size', name, sizes)}")
    config = default(model, **sizes[name])
    config.data.seq_len = 2048
    config.data.shuffle_window = 4096
    config.data.batch_size = 512
    config.mesh.update(data=1, fsdp=-1)  # a copy of the state is too large for one device
    config.data.shards = 64  # so many processes read no more than their share of the documents
    if "chunk_size" in config.model.head:
        config.model.head.chunk_size = 8192  # all logits would be the largest arrays of a step
    config.optimizer.schedule = part_config("schedule", "warmup_stable_decay")
    config.training.num_steps = 20_000
    config.training.log_every = 50
    config.training.eval_every = 1000
    config.training.checkpoint_every = 1000
    return config
