"""A run of blocks: the material that depth policies work with."""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax import registry
from effjax.depth import pipeline
from effjax.depth.block import Block
from effjax.nn import scalars
from pallas_kernels import residuals

_TO_HOST = ("device", "pinned_host")
_offload_products = jax.checkpoint_policies.offload_dot_with_no_batch_dims(*_TO_HOST)
_offload_residuals = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[residuals.NAME],
    offload_src=_TO_HOST[0],
    offload_dst=_TO_HOST[1],
)


def _offload(primitive, *operands, **parameters):
    is_product = primitive is jax.lax.dot_general_p
    choose = _offload_products if is_product else _offload_residuals
    return choose(primitive, *operands, **parameters)


REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # Products with weights, and the results of attention and scans, are kept: in the device's memory,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(residuals.NAME),
    ),
    # or in its host's, until the backward pass asks for them.
    "offload": _offload,
}


def fresh[M: nn.Module](part: M, **fields) -> M:
    """An unbound copy of a part, so that each use of a template gets parameters of its own."""
    return part.clone(parent=None, name=None, **fields)


class Stack(nn.Module):
    """Blocks applied one after the other.

    A depth policy gets an unbound stack of all the layers that the model was given, takes the ones it wants and
    binds them under itself; a bound stack that is called twice applies the same parameters twice.

    Attributes:
      blocks: the layers, in order.
      remat: which activations the backward pass recomputes, one of `REMAT_POLICIES`; None, as
        flags write `none`, is "none".
      scan_layers: compile one repeat of the layer pattern and scan over the repeats, with parameters stacked on
        a leading axis. Compile time no longer grows with depth.
      num_microbatches: micro-batches that a batch is cut into where the mesh in use has a pipeline, whose stages hold
        the repeats of the pattern (`depth.pipeline`); a multiple of the stages. It needs `scan_layers`. With a decode
        state there is no pipeline: each device gets all layers, one after the other.
    """

    blocks: tuple[Block, ...]
    remat: str | None = "none"
    scan_layers: bool = False
    num_microbatches: int | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def num_repeats(self) -> int:
        """How often the pattern of blocks occurs."""
        return len(self.blocks) // pattern_period(self.blocks)

    def take(self, indices: Iterable[int]) -> "Stack":
        """An unbound stack of copies of those blocks, for a policy to bind by `clone(parent=..., name=...)`."""
        blocks = tuple(fresh(self.blocks[i]) for i in indices)
        return Stack(blocks, self.remat, self.scan_layers, self.num_microbatches, parent=None)

    def flops_per_token(self, d_model: int, context: int) -> float:
        """Forward FLOPs per token of one pass through every block with nothing skipped."""
        return sum(block.flops_per_token(d_model, context) for block in self.blocks)

    def init_state(self, batch_size: int, max_length: int, d_model: int, dtype="float32") -> tuple:
        """Empty decode states, one a block.

        With `scan_layers`, one a block of the repeated pattern, its arrays with a leading axis of the repeats.
        """
        period = pattern_period(self.blocks) if self.scan_layers else len(self.blocks)
        states = tuple(
            b.mixer.init_state(batch_size, max_length, d_model, dtype) for b in self.blocks[:period]
        )
        if not self.scan_layers:
            return states
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (self.num_repeats, *a.shape)), states)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        states: tuple | None = None,
        train: bool = False,
    ):
        """Returns (x [B, T, D], the new states, laid out as by `init_state`, aux)."""
        if self.remat is not None and self.remat not in REMAT_POLICIES:
            raise ValueError(registry.unknown("remat", self.remat, REMAT_POLICIES))
        if self.scan_layers:
            return self._scan(x, positions, segment_ids, states, train)
        outcomes = []
        for i, block in enumerate(self.blocks):
            state = None if states is None else states[i]
            x, *outcome = self._remat(_apply)(block, x, positions, segment_ids, state, train)
            outcomes.append(outcome)
        new_states, aux = zip(*outcomes, strict=True)
        return x, new_states, scalars.combine(aux)

    def _remat(self, function):
        if self.remat in (None, "none"):
            return function
        return nn.remat(function, policy=REMAT_POLICIES[self.remat], static_argnums=(5,))

    def _scan(self, x, positions, segment_ids, states, train):
        period, repeats = pattern_period(self.blocks), self.num_repeats
        may_pipeline = states is None and not self.is_initializing()
        count = self.num_microbatches
        if may_pipeline and count is not None and pipeline.takes(len(x), repeats, count):
            return self._pipelined(x, positions, segment_ids, train, count)
        group = _Group(
            tuple(fresh(b) for b in self.blocks[:period]), self.remat, parent=self, name="groups"
        )

        def body(group, x, states):
            x, new_states, aux = group(x, positions, segment_ids, states, train)
            return x, (new_states, aux)

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "routing": True, "dropout": True},
            length=repeats,
        )
        x, (new_states, aux) = scan(group, x, states)
        return x, new_states, scalars.collapse(aux)

    def _pipelined(self, x, positions, segment_ids, train, num_microbatches: int):
        """As `_scan` without states; keys differ from micro-batch to micro-batch."""
        repeat = self.take(range(pattern_period(self.blocks))).clone(scan_layers=False)
        keys = {
            name: jax.random.split(self.make_rng(name), self.num_repeats)
            for name in ("routing", "dropout")
            if self.has_rng(name)
        }

        apply = nn.apply(Stack.__call__, repeat)

        def stage(step, layers, rows):
            x, positions, segment_ids = rows

            def layer(x, given):
                params, keys = given
                rngs = {name: jax.random.fold_in(key, step) for name, key in keys.items()}
                x, _, aux = apply(
                    {"params": params},
                    x,
                    positions=positions,
                    segment_ids=segment_ids,
                    train=train,
                    rngs=rngs,
                )
                return x, aux

            x, aux = jax.lax.scan(layer, x, layers)
            return (x, positions, segment_ids), scalars.collapse(aux)

        layers, rows = (self.variables["params"], keys), (x, positions, segment_ids)
        (x, *_), reports = pipeline.run(stage, layers, rows, num_microbatches)
        return x, None, pipeline.of_batch(reports, segment_ids)


class _Group(nn.Module):
    """One repeat of the layer pattern, the body of a scan; its states carry a leading scan axis."""

    blocks: tuple[Block, ...]
    remat: str | None

    @nn.compact
    def __call__(self, x, positions, segment_ids, states, train):
        stack = Stack(self.blocks, self.remat, parent=self, name="blocks")
        return stack(x, positions=positions, segment_ids=segment_ids, states=states, train=train)


def pattern_period(blocks: tuple[Block, ...]) -> int:
    """Length of the shortest pattern of blocks whose repetition gives all of them."""
    specs = [registry.describe(block) for block in blocks]  # bound modules do not compare by value
    count = len(specs)
    for period in range(1, count):
        if count % period == 0 and specs == specs[:period] * (count // period):
            return period
    return count


def _apply(block, x, positions, segment_ids, state: Any, train: bool):
    return block(x, positions=positions, segment_ids=segment_ids, state=state, train=train)
