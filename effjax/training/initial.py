"""What a run starts from that does not start from nothing: a Hugging Face folder."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from effjax.models import SequenceModel, uptraining
from effjax.training import sharding


def parameters(
    config: Mapping[str, Any], model: SequenceModel, shardings: Any, mesh: Mesh
) -> dict[str, Any] | None:
    """The parameters that `config.init_from` names, made into those of the model; None if it names none.

    Args:
      config: a resolved config.
      model: the model to train, which may be the folder's own or what `uptraining.convert` makes of it.
      shardings: where each of its parameters is to live.
      mesh: the devices.

    Returns:
      Float32 parameters. While they are made, those of the folder are on the mesh beside them.

    Raises:
      ValueError: for a folder that cannot be read, or that holds no model to start from; nothing is loaded then.
    """
    path, initialisation = config["init_from"]["path"], config["init_from"]["initialisation"]
    if path is None:
        return None
    from effjax import interop  # which few runs need

    try:
        uptraining.check(interop.read_model(path), model, initialisation)
        source, variables = interop.load_hf(
            path, dtype="float32", shardings=functools.partial(_place, mesh)
        )
    except ValueError as error:
        raise ValueError(f"init_from.path={path!r}: {error}") from error
    convert = functools.partial(
        uptraining.convert, source, target=model, initialisation=initialisation
    )
    key = jax.random.key(config["seed"])
    return jax.jit(convert, out_shardings={"params": shardings})(variables, key=key)["params"]


def _place(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, sharding.parameter_spec(path, shape, mesh))
