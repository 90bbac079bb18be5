"""Recursive Transformers and Mixture-of-Recursions in the layout of their authors (arXiv 2507.10524): recurring Llamas.

The code (github.com/raymin0223/mixture_of_recursions) saves `pytorch_model.bin`, which is pickle, and a `config.json`
that says nothing of the recursions; these are in the YAML file of the training run. What is read here is a folder with
the same tensors as safetensors, in whose `config.json` stand the sections `recursive`, `mor` and `kv_sharing` of that
file too. The tensors are written so:

    tensors = torch.load("pytorch_model.bin", map_location="cpu", weights_only=True)
    safetensors.torch.save_file({k: v.clone() for k, v in tensors.items()}, "model.safetensors")

What recursions share is there once for each of them, and all copies must be equal. The conversion to expert-choice
routing in the code of July 2025 gives each recursion attention weights of its own: what was trained so is loaded with
"untied" as the `sharing` of `recursive`, or "middle_untied" where that is "middle_cycle". What has norms of each
recursion's own (`ln_share: false`) is always loaded so: blocks here share all of their parameters or none, and a copy
of the shared ones for each recursion computes the same. The authors' forward pass takes the highest scores of a
sequence at evaluation too, as the model here does with `train=True`.
"""

from typing import Any

import flax.linen as nn
import numpy as np

from effjax.depth import ExpertChoice, MixtureOfRecursions, Recursive, TokenChoice
from effjax.depth.sharing import STRATEGIES, UNTIED, Layout
from effjax.depth.stack import pattern_period
from effjax.ffn import Gated
from effjax.interop.architecture import Architecture
from effjax.interop.entries import Entries
from effjax.interop.error import InteropError
from effjax.interop.families.decoder import BLOCK, FEED_FORWARD, PARTS, TABLE, UNUSED
from effjax.interop.families.llama import read_llama, write_llama
from effjax.interop.table import Layers, Row
from effjax.models import DecoderLM, SequenceModel

_SECTIONS = ("recursive", "mor", "kv_sharing", "relaxation")

# The strategies of sharing that their conversions know, and those that tell what became of them.
_SHARINGS = {"expert": ("cycle", "middle_cycle", *UNTIED), "token": ("middle_cycle", UNTIED[1])}

# For each strategy the one without sharing that leaves out as many layers at the ends.
_OWN = {sharing: UNTIED[sharing.startswith("middle_")] for sharing in STRATEGIES}

_ROUTERS = {"linear": "linear", "mlp": "mlp", "wide_mlp": "mlp"}

_TABLE = (
    *TABLE,
    *FEED_FORWARD,
    # Of the linear maps of routers, which are named below, and of the bias on their scores.
    Row(f"{BLOCK}weight", "kernel", axes=(1, 0)),
    Row(f"{BLOCK}router_bias", "balance_bias"),
)


def _read(entries: Entries) -> DecoderLM:
    sections = {
        name: Entries(entries.get(name, dict | None, None) or {}, f"{entries.where}: {name}")
        for name in _SECTIONS
    }
    recursive, mor, kv_sharing = (sections[name] for name in _SECTIONS[:3])
    sections["relaxation"].only("enable", False)
    recursive.only("enable", True)
    sharing = recursive.get("sharing", str)
    if not recursive.only("ln_share", True, False):
        sharing = _OWN.get(sharing, sharing)
    every_recursion = Recursive(recursive.size("num_recursion"), sharing)
    depth: Recursive | MixtureOfRecursions = every_recursion
    shares_kv = kv_sharing.get("enable", bool, False)
    if mor.get("enable", bool, False):
        depth = _read_routing(mor, every_recursion, shares_kv)
    elif shares_kv:
        raise InteropError(f"{kv_sharing.where}: enable=True without routing; valid: False")
    kv_sharing.only("update_cache", False)
    return read_llama(entries).clone(depth=depth)


def _read_routing(mor: Entries, depth: Recursive, shares_kv: bool) -> MixtureOfRecursions:
    kind = mor.only("type", "expert", "token")
    if depth.sharing not in _SHARINGS[kind]:
        valid = ", ".join(_SHARINGS[kind])
        raise InteropError(f"{mor.where}: type={kind!r} with {depth.sharing!r}; valid: {valid}")
    mor.only("rand_router", False)
    within = Entries(mor.get(kind, dict), f"{mor.where}: {kind}")
    common = {
        "router": _ROUTERS[mor.only("router_type", *_ROUTERS)],
        "temperature": mor.get("temp", float, 1.0),
        "gating": within.only("gating", "weighted", "additive"),
        "z_weight": mor.get("z_coeff", float, 0.0) if mor.get("z_loss", bool, False) else 0.0,
    }
    routing: ExpertChoice | TokenChoice
    if kind == "expert":
        routing = _read_expert_choice(mor, within, common)
        first, *_ = routing.capacities_now(depth.num_recursions)
        if shares_kv and first < 1:
            raise InteropError(
                f"{mor.where}: capacity={first}, ... with shared keys and values, which are those of all tokens; "
                "valid: 1, ..."
            )
    else:
        routing = _read_token_choice(within, common, depth.num_recursions)
    return MixtureOfRecursions(
        num_recursions=depth.num_recursions,
        sharing=depth.sharing,
        routing=routing,
        kv_sharing="shared" if shares_kv else "recursion_wise",
    )


def _read_expert_choice(mor: Entries, expert: Entries, common: dict[str, Any]) -> ExpertChoice:
    capacity = mor.get("capacity", str | None, None)
    activation = expert.only("router_func", "sigmoid", "tanh", None)
    return ExpertChoice(
        capacities=None if capacity is None else tuple(map(float, capacity.split(","))),
        activation=activation or "identity",
        alpha=expert.get("alpha", float) if activation else 1.0,
        selection=expert.only("sampling", "aux_loss", "aux_router"),
        aux_weight=expert.get("coeff", float, 0.0),
        **common,
    )


def _read_token_choice(token: Entries, common: dict[str, Any], num_recursions: int) -> TokenChoice:
    activation = token.only("router_func", "softmax", "sigmoid")
    return TokenChoice(
        capacity_factor=float(num_recursions),  # room for every token everywhere
        activation=activation,
        alpha=token.get("alpha", float, 1.0 if activation == "softmax" else 0.1),
        balancing=token.only("balancing", "loss", "loss_free"),
        balance_weight=token.get("coeff", float, 0.0),
        **common,
    )


def _write(model: SequenceModel) -> dict[str, Any]:
    depth = model.depth
    is_routed = isinstance(depth, MixtureOfRecursions)
    recursive = {"num_recursion": depth.num_recursions, "sharing": depth.sharing}
    return {
        **write_llama(model),
        "recursive": {"enable": True, "ln_share": True, **recursive},
        "kv_sharing": {"enable": is_routed and depth.kv_sharing == "shared"},
        "mor": _write_routing(depth.routing) if is_routed else {"enable": False},
    }


def _write_routing(routing: nn.Module) -> dict[str, Any]:
    within = {"alpha": routing.alpha, "gating": routing.gating, "router_func": routing.activation}
    written = {
        "enable": True,
        "rand_router": False,
        "router_type": routing.router,
        "temp": routing.temperature,
        "z_coeff": routing.z_weight,
        "z_loss": routing.z_weight > 0,
    }
    if isinstance(routing, TokenChoice):
        within |= {"balancing": routing.balancing, "coeff": routing.balance_weight}
        return {**written, "type": "token", "token": within}
    if routing.activation == "identity":
        within["router_func"] = None
    within |= {"sampling": routing.selection, "coeff": routing.aux_weight}
    capacities = routing.capacities
    capacity = None if capacities is None else ",".join(map(repr, capacities))
    return {**written, "type": "expert", "capacity": capacity, "expert": within}


def _layers(model: SequenceModel) -> Layers:
    """The layers of each shared block, one for each of its uses, and the maps of the routers."""
    depth, stack = model.depth, model.stack()
    layout = Layout.of(depth.sharing, model.num_layers, depth.num_recursions)
    theirs = _theirs(depth, layout)
    named = {}
    for name, layers in layout.stacks.items():
        uses = np.array(
            [[t for t, use in zip(theirs, layout.layers, strict=True) if use == i] for i in layers],
            object,
        )
        scanned = model.scan_layers
        period = pattern_period(stack.take(layers).blocks) if scanned else len(layers)
        for block in range(period):
            named[f"depth/{name}/blocks_{block}"] = uses[block::period] if scanned else uses[block]
    return {**named, **_routers(depth, layout)}


def _theirs(depth: nn.Module, layout: Layout) -> list[str]:
    """What they call each of the layers that a token passes, in order."""
    count = len(layout.layers)
    if isinstance(depth, Recursive):
        return [str(layer) for layer in range(count)]
    before = len(layout.first)
    each = (count - before - len(layout.last)) // depth.num_recursions
    if isinstance(depth.routing, TokenChoice):
        names = [f"{before}.block_list.{{r}}.{j}" for j in range(each)]
        last = before + 1
    else:
        names = [f"{{at}}.block.{j}" for j in range(each)]
        last = before + depth.num_recursions
    recursions = [
        name.format(r=r, at=before + r) for r in range(depth.num_recursions) for name in names
    ]
    return ["0"] * before + recursions + [str(last)] * len(layout.last)


def _routers(depth: nn.Module, layout: Layout) -> Layers:
    if isinstance(depth, Recursive):
        return {}
    before = len(layout.first)
    if isinstance(depth.routing, TokenChoice):
        scopes = {"router": f"{before}.mor_router"}
    else:
        scopes = {f"router_{r}": f"{before + r}.mor_router" for r in range(depth.num_recursions)}
        scopes |= {f"aux_{k}": v.replace("mor", "mlp") for k, v in scopes.items()}
    # A list of modules of which the second is the nonlinearity, if it is not a single map.
    maps = {"up": "router.0", "router": "router.2"}
    if depth.routing.router == "linear":
        maps = {"router": "router"}
    named = {
        f"depth/routing/{ours}/{part}": f"{scope}.{name}"
        for ours, scope in scopes.items()
        for part, name in maps.items()
    }
    named["depth/routing"] = str(before)
    return {path: np.array([name], object) for path, name in named.items()}


ARCHITECTURES = (
    Architecture(
        "MoRLlamaForCausalLM",
        "llama",
        table=_TABLE,
        read=_read,
        write=_write,
        parts={**PARTS, "depth": (Recursive, MixtureOfRecursions), "ffn": (Gated,)},
        unused=UNUSED,
        layers=_layers,
        known_by="recursive",
    ),
)
