"""Early exit: a shallow model made of the first layers or recursions of a model, with its parameters."""

from collections.abc import Mapping
from typing import Any

import jax

from effjax.depth import MixtureOfRecursions, Plain, Recursive, TokenChoice
from effjax.depth.sharing import Layout
from effjax.depth.stack import pattern_period
from effjax.models import SequenceModel
from effjax.registry import describe


def early_exit(
    model: SequenceModel,
    variables: Mapping[str, Any],
    *,
    num_layers: int | None = None,
    num_recursions: int | None = None,
) -> tuple[SequenceModel, dict[str, Any]]:
    """The model that goes from an inner layer straight to the last norm and the head: a draft without a second model.

    Self-speculative decoding (LayerSkip, Elhoushi et al., 2024, arXiv 2404.16710, section 4.3): the first layers draft,
    all of them judge. How much of a draft stays depends on how well the head reads the inner layer. A plain model has
    to be trained for that, by a loss at the exit too (section 4.1.2); in a recursive one, what leaves early leaves the
    same blocks. LayerSkip also shares the keys and values of the first layers between draft and target; here the draft
    has a decode state of its own, like any draft.

    The parameters are those of the model, not copies, except where a part of an array is left: of scanned layers, which
    lie in one array, and of the router of `TokenChoice`.

    Args:
      model: a model with the depth policy `plain`, `recursive` or `mixture_of_recursions`.
      variables: its variables.
      num_layers: layers that stay, for `plain`; whole repeats of the pattern if they are scanned.
      num_recursions: recursions that stay, for the others; the layers before and behind the recursions stay too. In
        the sequences of `depth.sharing` that is how often each block is applied. `ExpertChoice` decides about the
        recursions that stay as it did; `TokenChoice` picks the best of the depths that are left.

    Returns:
      The shallow model and its variables, for `speculate`.

    Raises:
      ValueError: for another depth policy, or a number that is not valid for it.
    """
    policy = model.depth
    if isinstance(policy, Plain):
        count = _checked(policy, "num_layers", num_layers, model.num_layers, num_recursions)
        shallow, depth = _first_layers(model, variables["params"]["depth"], count)
    elif isinstance(policy, Recursive | MixtureOfRecursions):
        most = policy.num_recursions
        count = _checked(policy, "num_recursions", num_recursions, most, num_layers)
        shallow, depth = _first_recursions(model, variables["params"]["depth"], count)
    else:
        raise ValueError(
            f"early_exit of the depth policy {describe(policy)['name']!r}; "
            "valid: plain, recursive or mixture_of_recursions"
        )
    return shallow, {**variables, "params": {**variables["params"], "depth": depth}}


def _checked(policy, field: str, number: int | None, most: int, other: int | None) -> int:
    if number is None or other is not None or not 1 <= number <= most:
        wrong = {"num_layers": "num_recursions", "num_recursions": "num_layers"}[field]
        given = f"{field}={number}" if other is None else f"{wrong}={other}"
        raise ValueError(
            f"early_exit of the depth policy {describe(policy)['name']!r} by {given}; "
            f"valid: {field} of 1 to {most}, and nothing else"
        )
    return number


def _first_layers(model: SequenceModel, params: Mapping[str, Any], num_layers: int):
    if not model.scan_layers:
        layers = {f"blocks_{i}": params["layers"][f"blocks_{i}"] for i in range(num_layers)}
        return model.clone(num_layers=num_layers), {**params, "layers": layers}
    period = pattern_period(model.stack().blocks)
    if num_layers % period:
        raise ValueError(
            f"num_layers={num_layers} of scanned layers whose pattern repeats every {period}; valid: a multiple of it"
        )
    layers = jax.tree.map(lambda stacked: stacked[: num_layers // period], params["layers"])
    return model.clone(num_layers=num_layers), {**params, "layers": layers}


def _first_recursions(model: SequenceModel, params: Mapping[str, Any], num_recursions: int):
    policy = model.depth
    layout = Layout.of(policy.sharing, model.num_layers, policy.num_recursions)
    blocks = sum(map(len, layout.shared))
    num_layers = len(layout.first) + blocks * num_recursions + len(layout.last)
    shallow = policy.clone(num_recursions=num_recursions)
    if isinstance(policy, MixtureOfRecursions):
        routing, routing_params = _first_routers(policy, params["routing"], num_recursions)
        shallow = shallow.clone(routing=routing)
        params = {**params, "routing": routing_params}
    # The pattern of mixers counts layers, of which there are fewer now: each set of parameters keeps its mixer.
    before = _own_layers(layout)
    now = _own_layers(Layout.of(policy.sharing, num_layers, num_recursions))
    source = dict(zip(now, before, strict=True))
    pattern = model.mixers
    mixers = tuple(pattern[source.get(i, 0) % len(pattern)] for i in range(num_layers))
    return model.clone(num_layers=num_layers, depth=shallow, mixers=mixers), params


def _own_layers(layout: Layout) -> tuple[int, ...]:
    """The layers by which those with parameters of their own are built."""
    return (*layout.first, *(layer for layers in layout.shared for layer in layers), *layout.last)


def _first_routers(policy: MixtureOfRecursions, params: Mapping[str, Any], num_recursions: int):
    routing = policy.routing
    if isinstance(routing, TokenChoice):
        # One router scores all depths: its last layer, and the bias on the scores, have a column for each.
        last = {k: v[..., :num_recursions] for k, v in params["router"]["router"].items()}
        left = {**params, "router": {**params["router"], "router": last}}
        if "balance_bias" in params:
            left["balance_bias"] = params["balance_bias"][:num_recursions]
        return routing, left
    left = {k: v for k, v in params.items() if int(k.rsplit("_", 1)[1]) < num_recursions}
    capacities = routing.capacities_now(policy.num_recursions)[:num_recursions]
    return routing.clone(capacities=capacities, warmup_progress=1.0), left
