"""From the parameters of a trained dense model to those of a cheaper one, to train on from there.

Three methods, which compose: layers are tied (`layer_tying`), dense feed-forwards become mixtures of equal experts, and
mixtures get null experts. What the dense model has not, the routers, begins as in a model that is trained from scratch.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from effjax import registry
from effjax.depth import Plain, Stack
from effjax.depth.sharing import Layout
from effjax.depth.stack import pattern_period
from effjax.ffn import Gated
from effjax.ffn.dense import gated_width
from effjax.ffn.mixture import MixtureOfExperts
from effjax.models.layer_tying import tied_layers
from effjax.models.sequence_model import SequenceModel

# Fields that decide how a model is computed and trained, and not what it computes.
_FREE = ("chunk_size", "dtype", "implementation", "num_microbatches", "remat", "scan_layers")

# Parameters that a model to start from need not have.
_FRESH = re.compile(r"depth/routing/.*|.*/ffn/(router/kernel|balance_bias)")

Shape = tuple[int, ...]

_LAYER = re.compile(r"depth/(?P<stack>\w+)/blocks_(?P<block>\d+)/(?P<local>.*)")


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a stack of blocks begins as.

    Attributes:
      layers: for each block, the layers of the model to start from of which it is the mean.
      period: blocks of the pattern that a scan repeats; None if the stack is not scanned.
    """

    layers: tuple[tuple[int, ...], ...]
    period: int | None


def uptrain(
    model: SequenceModel,
    variables: Mapping[str, Any],
    *,
    depth: nn.Module | Mapping[str, Any] | str | None = None,
    ffn: nn.Module | Mapping[str, Any] | str | None = None,
    initialisation: str = "stepwise",
    key: PRNGKeyArray,
) -> tuple[SequenceModel, dict[str, Any]]:
    """A recursive model, a mixture of experts or both, made from a dense model.

        dense, variables = interop.load_hf(folder)
        model, variables = models.uptrain(dense, variables, depth=Recursive(3, "cycle"), key=key)

    Args:
      model: the dense model, such as `interop.load_hf` gives.
      variables: its `{"params": ...}`.
      depth: the new depth policy, if any: `Recursive` or `MixtureOfRecursions`, also by name or spec.
      ffn: the new feed-forward, if any: a mixture of experts, also by name or spec. Its experts get the width, the
        gating and the nonlinearity of the feed-forward that they are copies of, and where this is a mixture already,
        their number.
      initialisation: of tied layers, one of `layer_tying.INITIALISATIONS`.
      key: for the routers.

    Returns:
      The new model and its variables, in the dtypes of those given. See `convert` for what it computes.

    Raises:
      ValueError: as `convert`.
    """
    target = uptrained_model(model, depth=depth, ffn=ffn)
    return target, convert(model, variables, target, initialisation=initialisation, key=key)


def uptrained_model(
    model: SequenceModel,
    *,
    depth: nn.Module | Mapping[str, Any] | str | None = None,
    ffn: nn.Module | Mapping[str, Any] | str | None = None,
) -> SequenceModel:
    """The model that `uptrain` makes, without its parameters; arguments as there."""
    depth = model.depth if depth is None else registry.build("depth", depth)
    ffn = model.ffn if ffn is None else registry.build("ffn", ffn)
    if isinstance(ffn, MixtureOfExperts) and model.ffn is not None:
        ffn = ffn.clone(**_inherited(model.ffn, model.d_model))
    return model.clone(depth=depth, ffn=ffn)


def convert(
    source: SequenceModel,
    variables: Mapping[str, Any],
    target: SequenceModel,
    *,
    initialisation: str = "stepwise",
    key: PRNGKeyArray,
) -> dict[str, Any]:
    """The variables with which `target` begins where `source` ended. Pure, so that it can be jitted with shardings.

    Tied layers (Bae et al., 2024, arXiv 2410.20672): a shared block begins as `layer_tying.tied_layers` says, and the
    function changes, unless the layers that are tied were equal.

    Sparse up-cycling (Komatsuzaki et al., 2022, arXiv 2212.05055, section 3): every expert begins as a copy of the
    dense feed-forward of its layer, so a token's output is that of the dense model times the sum of its weights. It is
    the dense model's, but for rounding, where the weights sum to 1 and nothing is dropped (`dispatch="dropless"`, or a
    `capacity_factor` of at least `num_experts / expected_experts`): for `TopK`, for `Switch(renormalise=True)`, and in
    `AdaMoE` for tokens that choose a true expert, which all do if `top_k > num_null`. `Switch` as published weights the
    expert with its probability. The paper up-cycles half of the layers; here it is all of them.

    Null experts (Zeng et al., 2024, arXiv 2406.13233, section 3): a mixture that becomes an `AdaMoE` with as many true
    experts keeps these and their scores, and the null ones get fresh scores.

    Args:
      source: a model with `Plain` depth.
      variables: its variables.
      target: a model that differs from it in depth policy, feed-forward, or neither.
      initialisation: of tied layers, one of `layer_tying.INITIALISATIONS`.
      key: for the routers.

    Returns:
      `{"params": ...}`. What does not change is not copied: those arrays are the given ones.

    Raises:
      ValueError: if the models differ in anything else, if layers do not divide into recursions, if layers that would
        share parameters have different mixers, or if the experts cannot be copies of the feed-forward.
    """
    origins = check(source, target, initialisation)
    given = _Trained(source, _flat(variables["params"]))
    shapes = _shapes(target)
    fresh = _fresh(target, key) if any(map(_FRESH.fullmatch, shapes)) else {}
    found = {
        path: given.counterpart(path, shape, origins, fresh.get(path))
        for path, shape in shapes.items()
    }
    return {"params": flax.traverse_util.unflatten_dict(found, sep="/")}


def check(source: SequenceModel, target: SequenceModel, initialisation: str) -> dict[str, Origin]:
    """Checks that `convert` can make the one from the other; arguments and errors as there.

    Returns:
      What each stack of the target begins as.
    """
    if not isinstance(source.depth, Plain):
        raise ValueError(
            f"depth={registry.describe(source.depth)} of the model to start from; valid: 'plain'"
        )
    ours, theirs = (dict(_function(model)) for model in (source, target))
    absent = object()
    for field in sorted(ours.keys() | theirs.keys()):
        if ours.get(field, absent) != theirs.get(field, absent):
            raise ValueError(
                f"{field}={theirs.get(field)!r}; valid: {ours.get(field)!r}, as in the model to start from"
            )
    _check_feed_forward(source, target)
    return _origins(target, initialisation)


class _Trained:
    """The parameters of the model to start from."""

    def __init__(self, model: SequenceModel, params: Mapping[str, Array]):
        self._params = params
        self._period = pattern_period(model.stack().blocks) if model.scan_layers else None

    def counterpart(
        self, path: str, shape: Shape, origins: Mapping[str, Origin], fresh: Array | None
    ) -> Array:
        """What a parameter of the target begins as; `fresh` is its value in a model without a past, if it has one."""
        layer = _LAYER.fullmatch(path)
        if layer is None:
            return self._params[path] if fresh is None else self._cast(fresh)
        origin, block, local = origins[layer["stack"]], int(layer["block"]), layer["local"]
        if origin.period is None:
            return self._block(local, origin.layers[block], shape, fresh)
        repeats = origin.layers[block :: origin.period]
        values = [None] * len(repeats) if fresh is None else fresh
        return jnp.stack(
            [
                self._block(local, layers, shape[1:], value)
                for layers, value in zip(repeats, values, strict=True)
            ]
        )

    def _block(
        self, local: str, layers: tuple[int, ...], shape: Shape, fresh: Array | None
    ) -> Array:
        if not self._has(local):
            if fresh is not None:
                return self._cast(fresh)
            dense = local.replace("ffn/experts/", "ffn/") + "/kernel"
            return jnp.broadcast_to(self._mean(dense, layers), shape)
        known = self._mean(local, layers)
        if known.shape == shape:
            return known
        # A router that gets null experts, the scores of which come last; routers always have fresh ones to take.
        assert fresh is not None
        return jnp.concatenate([known, self._cast(fresh)[..., known.shape[-1] :]], axis=-1)

    def _has(self, local: str) -> bool:
        return f"depth/layers/blocks_0/{local}" in self._params

    def _mean(self, local: str, layers: tuple[int, ...]) -> Array:
        values = [self._layer(local, layer) for layer in layers]
        if len(values) == 1:
            return values[0]
        return jnp.mean(jnp.stack(values), axis=0, dtype=jnp.float32).astype(values[0].dtype)

    def _layer(self, local: str, layer: int) -> Array:
        if self._period is None:
            return self._params[f"depth/layers/blocks_{layer}/{local}"]
        block, repeat = layer % self._period, layer // self._period
        return self._params[f"depth/layers/blocks_{block}/{local}"][repeat]

    def _cast(self, fresh: Array) -> Array:
        return fresh.astype(self._params["embed/embedding"].dtype)


def _flat(params: Mapping[str, Any]) -> dict[str, Array]:
    return flax.traverse_util.flatten_dict(dict(params), sep="/")


def _params(model: SequenceModel, key: PRNGKeyArray) -> dict[str, Array]:
    return _flat(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])


# Tracing a deep model takes seconds.
@functools.lru_cache(maxsize=16)
def _shapes(model: SequenceModel) -> dict[str, Shape]:
    """The shape of each parameter by path."""
    params = jax.eval_shape(functools.partial(_params, model), jax.random.key(0))
    return {path: leaf.shape for path, leaf in params.items()}


@functools.partial(jax.jit, static_argnums=0)
def _fresh(model: SequenceModel, key: PRNGKeyArray) -> dict[str, Array]:
    """The parameters that have no past, by path; the compiler leaves out all others."""
    params = _params(model, key)
    return {path: leaf for path, leaf in params.items() if _FRESH.fullmatch(path)}


def _origins(model: SequenceModel, initialisation: str) -> dict[str, Origin]:
    """What each stack of a model begins as, by the name that its parameters have."""
    stack = model.stack()
    sources: dict[str, dict[int, tuple[int, ...]]]
    if isinstance(model.depth, Plain):
        sources = {"layers": {layer: (layer,) for layer in range(len(stack))}}
    else:
        layout = Layout.of(model.depth.sharing, len(stack), model.depth.num_recursions)
        tied = iter(tied_layers(layout, initialisation))
        sources = {
            name: {i: next(tied) if layers in layout.shared else (i,) for i in layers}
            for name, layers in layout.stacks.items()
        }
        _check_mixers(stack, layout, {k: v for each in sources.values() for k, v in each.items()})
    scanned = model.scan_layers
    return {
        name: Origin(tuple(of.values()), pattern_period(stack.take(of).blocks) if scanned else None)
        for name, of in sources.items()
    }


def _check_mixers(stack: Stack, layout: Layout, sources: Mapping[int, tuple[int, ...]]) -> None:
    """What shares parameters with a layer, and what these come from, computes the same with them."""
    for layer, block in enumerate(layout.layers):
        for other in (layer, *sources[block]):
            mixers = [registry.describe(stack.blocks[i].mixer) for i in (block, other)]
            if mixers[0] != mixers[1]:
                raise ValueError(
                    f"layers {block} and {other} would share parameters, and have the mixers {mixers[0]} and "
                    f"{mixers[1]}; valid: sharing among layers that are alike"
                )


def _function(model: SequenceModel) -> Iterator[tuple[str, Any]]:
    """The values of all fields but those of depth policy and feed-forward that say what a model computes."""
    for field, value in registry.plain_fields(registry.describe_fields(model)):
        parts = field.split(".")
        if parts[0] not in ("depth", "ffn") and parts[-1] not in _FREE:
            yield field, value


def _inherited(ffn: nn.Module, d_model: int) -> dict[str, Any]:
    """What a mixture of experts has in common with the feed-forward that it is made from."""
    is_gated = isinstance(ffn, Gated) or getattr(ffn, "gated", False)
    width = ffn.hidden_dim or (gated_width(d_model) if is_gated else 4 * d_model)
    shape = {"activation": ffn.activation, "gated": is_gated, "hidden_dim": width}
    if isinstance(ffn, MixtureOfExperts):
        shape |= {
            name: getattr(ffn, name) for name in ("num_experts", "shared_hidden_dim", "gate_shared")
        }
    return shape


def _check_feed_forward(source: SequenceModel, target: SequenceModel) -> None:
    ours, theirs = source.ffn, target.ffn
    if registry.describe(ours) == registry.describe(theirs):
        return
    if not isinstance(theirs, MixtureOfExperts) or ours is None:
        described = [registry.describe(ffn) for ffn in (theirs, ours)]
        raise ValueError(f"ffn={described[0]}; valid: {described[1]}, or a mixture of experts")
    if getattr(ours, "use_bias", False):
        raise ValueError(
            "ffn.use_bias=True of the model to start from; valid: False, as experts have no biases"
        )
    wanted = {"shared_hidden_dim": None} | _inherited(ours, source.d_model)
    found = _inherited(theirs, source.d_model)
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(
                f"ffn.{name}={found[name]!r}; valid: {value!r}, as in the model to start from"
            )
    if theirs.nulls < getattr(ours, "nulls", 0):
        raise ValueError(f"ffn.num_null={theirs.nulls}; valid: {ours.nulls} or more, as before")
