"""From a Hugging Face folder to a model and its parameters, tensor by tensor."""

import fnmatch
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from effjax.interop import families
from effjax.interop.architecture import Architecture
from effjax.interop.entries import CONFIG_FILE, Entries, read_config
from effjax.interop.error import InteropError
from effjax.interop.shards import Shards, some
from effjax.interop.table import Leaf, bind
from effjax.models import SequenceModel

logger = logging.getLogger(__name__)

Place = Callable[[str, tuple[int, ...]], Sharding]


def load_hf(
    path: str | Path,
    *,
    dtype: Any = None,
    shardings: Place | None = None,
    scan_layers: bool = False,
) -> tuple[SequenceModel, dict[str, Any]]:
    """The model in a local Hugging Face folder: `config.json` and safetensors, in one file or in shards.

    Names, shapes and dtypes of all tensors are checked against the model before the first is read. Then one parameter
    after the other goes from its file to where it is to live, the largest first, so that the peak of host memory is
    little more than the parameters that live there; on a mesh each device's part alone is read.

    Args:
      path: the folder.
      dtype: of the parameters, and of the computation; None keeps each parameter as it is stored and computes in the
        dtype of the embedding table (`model.clone(dtype=...)` computes in another).
      shardings: `(path, shape) -> Sharding` says where each parameter lives, for a mesh:
        `lambda path, shape: NamedSharding(mesh, training.sharding.parameter_spec(path, shape, mesh))`. None takes the
        default device.
      scan_layers: whether the model scans over its layers, with their parameters stacked.

    Returns:
      The model and its variables, `{"params": ...}`.

    Raises:
      InteropError: for a folder that is none, an architecture or an option of it that we lack, a tensor that is
        missing, unexpected, of another shape or dtype, or unlike another that the model shares with it, a file that is
        missing or truncated, and weights that are there as pickle only; the message names each. Nothing is loaded then.
    """
    folder = Path(path)
    entries, architecture, model = _described(folder)
    shards = Shards(folder, architecture.rename)
    model = architecture.complete(model, shards.shapes).clone(scan_layers=scan_layers)
    try:
        leaves = bind(architecture.table, model, architecture.layers(model))
    except (ArithmeticError, TypeError, ValueError) as error:  # sizes that do not go together
        raise InteropError(f"{entries.where}: {error}") from error
    if overlooked := entries.overlooked():
        logger.warning("%s: entries that are not known and not read: %s", entries.where, overlooked)
    target = None if dtype is None else _floating(dtype)
    leaves = [leaf.first_of(shards.shapes) for leaf in leaves]
    _check(leaves, shards, architecture.unused, folder)
    _check_copies(leaves, shards)
    stored = {leaf.path: _stored_dtype(leaf, shards, target) for leaf in leaves}
    leaves.sort(key=lambda leaf: leaf.size * stored[leaf.path].itemsize, reverse=True)
    params = {leaf.path: _load(leaf, shards, stored[leaf.path], shardings) for leaf in leaves}
    model = model.clone(dtype=stored["embed/embedding"].name)
    return model, {"params": flax.traverse_util.unflatten_dict(params, sep="/")}


def read_model(path: str | Path) -> SequenceModel:
    """The model that the `config.json` of a local Hugging Face folder describes.

    Its weights are not looked at, so that a pooler of which they alone tell is not there.

    Raises:
      InteropError: for a folder that is none, an architecture or an option of it that we lack.
    """
    return _described(Path(path))[2]


def _described(folder: Path) -> tuple[Entries, Architecture, SequenceModel]:
    if not folder.is_dir():
        raise InteropError(
            f"{str(folder)!r} is no folder; valid: a local Hugging Face model folder"
        )
    entries = Entries(read_config(folder), str(folder / CONFIG_FILE))
    architecture = families.of_config(entries)
    return entries, architecture, architecture.model(entries)


def _load(leaf: Leaf, shards: Shards, dtype: np.dtype, shardings: Place | None) -> jax.Array:
    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        whole = (slice(None),) * len(leaf.shape)
        return leaf.read(whole if index is None else index, shards.read_into, dtype)

    if shardings is None:
        array = jax.device_put(read(None))
    else:
        where = shardings(leaf.path, leaf.shape)
        array = jax.make_array_from_callback(leaf.shape, where, read, dtype=dtype)
    # Otherwise host buffers pile up behind transfers that are still under way.
    return jax.block_until_ready(array)


def _check(leaves: list[Leaf], shards: Shards, unused: Sequence[str], folder: Path) -> None:
    """All tensors of the model are there, in their shapes, and there are no others."""
    expected = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names.flat}
    missing = sorted(expected.keys() - shards.shapes.keys())
    copies = {name: leaf.tensor_shape for leaf in leaves for name in leaf.copies.flat}
    expected |= {name: shape for name, shape in copies.items() if name in shards.shapes}
    unexpected = sorted(
        name
        for name in shards.shapes.keys() - expected.keys()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in unused)
    )
    if missing or unexpected:
        lists = [("missing", missing), ("unexpected", unexpected)]
        raise InteropError(
            f"{folder}: the tensors are not those of the model that {CONFIG_FILE} describes; "
            + "; ".join(f"{what}: {some(names)}" for what, names in lists if names)
        )
    wrong = [
        f"{name} is {shards.shapes[name]} and not {shape}"
        for name, shape in expected.items()
        if shards.shapes[name] != shape
    ]
    if wrong:
        raise InteropError(
            f"{folder}: tensors have other shapes than {CONFIG_FILE} says: {some(wrong)}"
        )


def _check_copies(leaves: list[Leaf], shards: Shards) -> None:
    """Tensors that are one parameter of ours are equal, where a checkpoint holds more than one of them."""
    pairs = {
        (str(leaf.names[where]), copy)
        for leaf in leaves
        for where in np.ndindex(leaf.names.shape)
        for copy in leaf.copies[where]
        if copy in shards.shapes
    }
    for name, copy in sorted(pairs):
        if not shards.equal(name, copy):
            raise InteropError(
                f"{name} and {copy} differ, and the model has one parameter for both; valid: equal tensors, or a "
                f"{CONFIG_FILE} in which these layers do not share parameters"
            )


def _stored_dtype(leaf: Leaf, shards: Shards, target: np.dtype | None) -> np.dtype:
    """The dtype that a parameter is to have: that of its tensors, if no other is asked for."""
    dtypes = {shards.dtype(name) for name in leaf.names.flat}
    if target is not None:
        return target
    if len(dtypes) > 1:
        kinds = some(sorted(map(str, dtypes)))
        raise InteropError(
            f"parameter {leaf.path} is of tensors of {kinds}; valid: one dtype, or give dtype"
        )
    return _kept(dtypes.pop(), f"parameter {leaf.path}")


def _floating(dtype: Any) -> np.dtype:
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.floating):
        raise InteropError(f"dtype is {dtype!r}; valid: a floating-point dtype")
    return _kept(known, "dtype")


def _kept(dtype: np.dtype, what: str) -> np.dtype:
    """The dtype, which JAX must not narrow in silence."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise InteropError(
            f"{what} is {dtype}; valid: give a narrower dtype, or set jax_enable_x64"
        )
    return dtype
