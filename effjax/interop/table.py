"""The tensors of a checkpoint and the parameters of a model: one table, read in both directions."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from effjax.interop.error import InteropError
from effjax.models import SequenceModel

# Where the layers of a plain stack keep their parameters (`effjax.depth.stack`). Scanned ones have the paths of the
# first repeat of the pattern of layers, and a leading axis for the repeats.
_LAYER = re.compile(r"depth/layers/blocks_(?P<block>\d+)/(?P<local>.*)")

Shape = tuple[int, ...]
Spans = tuple[range, ...]
ReadInto = Callable[[str, Spans, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """A tensor of theirs that is, or has within it, a parameter of ours.

    Attributes:
      theirs: name of the tensor; "{layer}" and "{expert}" stand for numbers.
      ours: path of the parameter, in a layer from its block on. Where `theirs` has "{expert}", the first axis is that
        of the experts, each a tensor of theirs.
      axes: for each axis of ours the axis of theirs; the others of theirs have size 1. None: the same axes.
      joined: their axis along which the rows of one tensor lie one after the other, in the order of the table; None if
        the tensor is the parameter.
    """

    theirs: str
    ours: str
    axes: tuple[int, ...] | None = None
    joined: int | None = None


def linear(theirs: str, ours: str, joined: int | None = None) -> tuple[Row, Row]:
    """A PyTorch linear layer, whose weight is [out, in] where our kernel is [in, out], and its bias if there is one."""
    weight = Row(f"{theirs}.weight", f"{ours}/kernel", axes=(1, 0), joined=joined)
    return weight, Row(f"{theirs}.bias", f"{ours}/bias", joined=joined)


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
    """A norm with a scale, there the weight, and perhaps a bias."""
    return Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter of a model and where it lies in the tensors of a checkpoint.

    Attributes:
      path: of the parameter.
      shape: of the parameter.
      names: object array of their tensors, one for each index of our leading axes: those of scanned layers and of
        experts, none for most parameters.
      axes: as in `Row`, for the other axes.
      tensor_shape: shape of each of their tensors.
      joined: as in `Row`.
      start: where ours begins along the joined axis.
    """

    path: str
    shape: Shape
    names: np.ndarray
    axes: tuple[int, ...]
    tensor_shape: Shape
    joined: int | None = None
    start: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self, index: Sequence[slice], read_into: ReadInto, dtype: Any) -> np.ndarray:
        """The part of the parameter at `index`, without reading the rest.

        Args:
          index: a slice for each axis.
          read_into: `(name, spans, destination)` writes that part of their tensor to an array of its shape.
          dtype: of the result.
        """
        spans = tuple(range(*s.indices(n)) for s, n in zip(index, self.shape, strict=True))
        leading, inner = spans[: self.names.ndim], spans[self.names.ndim :]
        part = np.empty([len(span) for span in spans], dtype)
        for where in np.ndindex(*(len(span) for span in leading)):
            name = self.names[tuple(span[i] for span, i in zip(leading, where, strict=True))]
            read_into(name, self._their_spans(inner), self.as_theirs(part[where]))
        return part

    def as_theirs(self, array: np.ndarray) -> np.ndarray:
        """A view of (a part of) what one tensor holds of ours, with their axes."""
        missing = set(range(len(self.tensor_shape))) - set(self.axes)
        return np.expand_dims(array.transpose(np.argsort(self.axes)), tuple(missing))

    def their_spans(self) -> Spans:
        """Where ours lies in each of their tensors."""
        return self._their_spans(tuple(range(n) for n in self.shape[self.names.ndim :]))

    def _their_spans(self, inner: Spans) -> Spans:
        spans = [range(1)] * len(self.tensor_shape)
        for axis, span in zip(self.axes, inner, strict=True):
            shift = self.start if axis == self.joined else 0
            spans[axis] = range(span.start + shift, span.stop + shift)
        return tuple(spans)


def parameter_shapes(model: SequenceModel) -> dict[str, Shape]:
    """The shape of every parameter of a model, by path; nothing is computed."""
    return _traced_shapes(model.clone(parent=None, dtype="float32"))


# Tracing a deep model takes seconds, and what was loaded is often saved again.
@functools.lru_cache(maxsize=16)
def _traced_shapes(model: SequenceModel) -> dict[str, Shape]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a parameter tree by slash-joined path."""
    return flax.traverse_util.flatten_dict(dict(params), sep="/")


def bind(table: Iterable[Row], model: SequenceModel) -> list[Leaf]:
    """What the table of a model's family says of each of its parameters.

    Rows of parameters that this model has not are passed over.

    Raises:
      InteropError: for a parameter that is not in the table.
    """
    order = {row.ours: (i, row) for i, row in enumerate(table)}
    found = []
    for path, shape in parameter_shapes(model).items():
        layer = _LAYER.fullmatch(path)
        local = layer["local"] if layer else path
        if local not in order:
            raise InteropError(
                f"parameter {path} has no place in a checkpoint of this architecture"
            )
        place, row = order[local]
        layers = _layers(int(layer["block"]), shape, model) if layer else np.array(0)
        found.append((place, _leaf(row, path, shape, layers)))
    found.sort(key=lambda entry: entry[0])
    return _laid_out([leaf for _, leaf in found])


def _layers(block: int, shape: Shape, model: SequenceModel) -> np.ndarray:
    """The layers whose parameters lie in one of a block's: an array over the axis of the scan, if there is one."""
    if not model.scan_layers:
        return np.array(block)
    period = model.num_layers // shape[0]
    return np.arange(block, model.num_layers, period)


def _leaf(row: Row, path: str, shape: Shape, layers: np.ndarray) -> Leaf:
    experts = np.arange(shape[layers.ndim]) if "{expert}" in row.theirs else np.array(0)
    names = np.empty((*layers.shape, *experts.shape), object)
    for where in np.ndindex(names.shape):
        layer, expert = layers[where[: layers.ndim]], experts[where[layers.ndim :]]
        names[where] = row.theirs.format(layer=layer, expert=expert)
    inner = shape[names.ndim :]
    axes = tuple(range(len(inner))) if row.axes is None else row.axes
    tensor_shape = [1] * (max(axes) + 1)
    for axis, size in zip(axes, inner, strict=True):
        tensor_shape[axis] = size
    return Leaf(path, shape, names, axes, tuple(tensor_shape), row.joined)


def _laid_out(leaves: list[Leaf]) -> list[Leaf]:
    """The leaves with their places in the tensors that several of them share."""
    totals: dict[str, int] = {}
    starts = []
    for leaf in leaves:
        key = leaf.names.flat[0]
        starts.append(totals.get(key, 0))
        if leaf.joined is not None:
            totals[key] = starts[-1] + leaf.tensor_shape[leaf.joined]
    placed = []
    for leaf, start in zip(leaves, starts, strict=True):
        if leaf.joined is not None:
            shape = list(leaf.tensor_shape)
            shape[leaf.joined] = totals[leaf.names.flat[0]]
            leaf = dataclasses.replace(leaf, tensor_shape=tuple(shape), start=start)
        placed.append(leaf)
    return placed
