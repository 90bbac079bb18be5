"""The tensors of a checkpoint and the parameters of a model: one table, read in both directions."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from effjax.depth import Plain
from effjax.depth.stack import pattern_period
from effjax.interop.error import InteropError
from effjax.models import SequenceModel

# What "{layer}" stands for in the names of a checkpoint, by the path of our parameters of a layer: an object array of
# strings, with an axis for the repeats of a scan, if there is one, and one for all of their layers that share these
# parameters.
Layers = Mapping[str, np.ndarray]

# The paths of the layers of a plain stack, but for their numbers.
_BLOCKS = "depth/layers/blocks_"

Shape = tuple[int, ...]
Spans = tuple[range, ...]
ReadInto = Callable[[str, Spans, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """A tensor of theirs that is, or has within it, a parameter of ours.

    Attributes:
      theirs: name of the tensor; "{layer}" and "{expert}" stand for what tells these apart.
      ours: path of the parameter, in a layer from its block on. Where `theirs` has "{expert}", the first axis is that
        of the experts, each a tensor of theirs.
      axes: for each axis of ours the axis of theirs; the others of theirs have size 1. None: the same axes.
      joined: their axis along which the rows of one tensor lie one after the other, in the order of the table; None if
        the tensor is the parameter.
      mixer: the row is for layers with a mixer of this class; None: for all. Mixers name their parts alike, so models
        with several kinds of them need to tell.
    """

    theirs: str
    ours: str
    axes: tuple[int, ...] | None = None
    joined: int | None = None
    mixer: type | None = None

    def is_for(self, mixer: Any) -> bool:
        """Whether the row is for a layer with that mixer."""
        return self.mixer is None or isinstance(mixer, self.mixer)


def linear(
    theirs: str, ours: str, joined: int | None = None, mixer: type | None = None
) -> tuple[Row, Row]:
    """A PyTorch linear layer, whose weight is [out, in] where our kernel is [in, out], and its bias if there is one."""
    weight = Row(f"{theirs}.weight", f"{ours}/kernel", (1, 0), joined, mixer)
    return weight, Row(f"{theirs}.bias", f"{ours}/bias", None, joined, mixer)


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
      copies: names of their tensors that are the same again, with an axis more.
      joined: as in `Row`.
      start: where ours begins along the joined axis.
    """

    path: str
    shape: Shape
    names: np.ndarray
    axes: tuple[int, ...]
    tensor_shape: Shape
    copies: np.ndarray
    joined: int | None = None
    start: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def first_of(self, names: Container[str]) -> "Leaf":
        """The same, of those tensors of which there may be copies the first that is in `names`."""
        chosen = self.names.copy()
        for where in np.ndindex(chosen.shape):
            there = [name for name in (chosen[where], *self.copies[where]) if name in names]
            chosen[where] = there[0] if there else chosen[where]
        return dataclasses.replace(self, names=chosen)

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
    model = model.clone(parent=None, dtype="float32")
    if model.scan_layers or not isinstance(model.depth, Plain):
        return _traced_shapes(model)
    # To trace layer after layer of a deep model takes longer than to read its files.
    return _unstacked(model, _traced_shapes(model.clone(scan_layers=True)))


def _unstacked(model: SequenceModel, stacked: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of a plain stack's parameters, from those of the same layers scanned."""
    period, found = pattern_period(model.stack().blocks), {}
    for path, shape in stacked.items():
        block, _, local = path.removeprefix(_BLOCKS).partition("/")
        if not path.startswith(_BLOCKS):
            found[path] = shape
            continue
        for layer in range(int(block), model.num_layers, period):
            found[f"{_BLOCKS}{layer}/{local}"] = shape[1:]
    return found


# What was loaded is often saved again.
@functools.lru_cache(maxsize=16)
def _traced_shapes(model: SequenceModel) -> dict[str, Shape]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a parameter tree by slash-joined path."""
    return flax.traverse_util.flatten_dict(dict(params), sep="/")


def plain_layers(model: SequenceModel) -> Layers:
    """The layers of a plain stack, which are numbered; scanned ones have the paths of the pattern's first repeat."""
    count = model.num_layers
    numbers = np.array([str(layer) for layer in range(count)], object)
    if not model.scan_layers:
        return {f"{_BLOCKS}{layer}": numbers[layer : layer + 1] for layer in range(count)}
    period = pattern_period(model.stack().blocks)
    return {f"{_BLOCKS}{b}": numbers[b::period, None] for b in range(period)}


def bind(table: Iterable[Row], model: SequenceModel, layers: Layers) -> list[Leaf]:
    """What the table of a model's family says of each of its parameters.

    Rows of parameters that this model has not are passed over.

    Raises:
      InteropError: for a parameter that is not in the table.
    """
    rows: dict[str, list[tuple[int, Row]]] = {}
    for place, row in enumerate(table):
        rows.setdefault(row.ours, []).append((place, row))
    found = []
    for path, shape in parameter_shapes(model).items():
        layer = next((known for known in _above(path) if known in layers), None)
        local = path if layer is None else path.removeprefix(f"{layer}/")
        mixer = model.mixers[_block(layer) % len(model.mixers)]
        fitting = [known for known in rows.get(local, ()) if known[1].is_for(mixer)]
        if not fitting:
            raise InteropError(
                f"parameter {path} has no place in a checkpoint of this architecture"
            )
        place, row = fitting[0]
        numbers = np.array([""], object) if layer is None else layers[layer]
        found.append((place, _leaf(row, path, shape, numbers)))
    found.sort(key=lambda entry: entry[0])
    return _laid_out([leaf for _, leaf in found])


def _above(path: str) -> Iterator[str]:
    """The paths that a path is within, the longest first."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _block(layer: str | None) -> int:
    """The number of the block in the path of a layer; 0 for what is no part of one."""
    number = re.search(r"/blocks_(\d+)$", layer or "")
    return int(number[1]) if number else 0


def _leaf(row: Row, path: str, shape: Shape, layers: np.ndarray) -> Leaf:
    repeats = layers.shape[:-1]
    experts = np.arange(shape[len(repeats)]) if "{expert}" in row.theirs else np.array(0)
    names = np.empty((*repeats, *experts.shape, layers.shape[-1]), object)
    for where in np.ndindex(names.shape):
        *outer, copy = where
        repeat, chosen = outer[: len(repeats)], outer[len(repeats) :]
        layer, expert = layers[(*repeat, copy)], experts[tuple(chosen)]
        names[where] = row.theirs.format(layer=layer, expert=expert)
    inner = shape[names.ndim - 1 :]
    axes = tuple(range(len(inner))) if row.axes is None else row.axes
    tensor_shape = [1] * (max(axes) + 1)
    for axis, size in zip(axes, inner, strict=True):
        tensor_shape[axis] = size
    first, copies = names[..., 0], names[..., 1:]
    return Leaf(path, shape, np.array(first, object), axes, tuple(tensor_shape), copies, row.joined)


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
