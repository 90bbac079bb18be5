"""Models as compositions: embedding -> depth policy over a stack of (mixer, feed-forward) blocks -> norm -> head."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import VariableDict
from jaxtyping import Array, Float, Int

from effjax.depth import Block, Depthwise, Journey, Plain, Stack, fresh
from effjax.ffn import Gated
from effjax.heads import Tied
from effjax.mixers import Attention
from effjax.nn import RMSNorm, TokenEmbedding, constrain, scalars
from effjax.registry import describe


@flax.struct.dataclass
class DecodeState:
    """What a model remembers of the tokens that it has seen: an argument and a result, never hidden.

    Attributes:
      layers: what the depth policy keeps: keys and values, sums, inputs of convolutions.
      length: [B] tokens seen, which is the position of the next one.
      max_length: room of a row. Tokens beyond it push the oldest out of a full cache.
    """

    layers: Any
    length: Int[Array, " B"]
    max_length: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Output:
    """What a model returns.

    Attributes:
      hidden: [B, T, D] states after the last norm.
      aux: weighted auxiliary losses, scalars under `loss/...`.
      metrics: everything else the parts report (see `effjax.nn.scalars`).
      state: the decode state after the tokens, if one was given.
      logits: [B, T, V] float32 scores, from heads that score the vocabulary; [B, K, V] of the K tokens that `head_at`
        names.
      embeddings: [B, E] float32 vectors, from heads that embed the text.
      class_logits: [B, C] float32 scores of the text's class by how many leading coordinates of the embedding they are
        from, from heads that classify.
    """

    hidden: Float[Array, "B T D"]
    aux: scalars.Scalars
    metrics: scalars.Scalars
    state: DecodeState | None = None
    logits: Float[Array, "B T V"] | None = None
    embeddings: Float[Array, "B E"] | None = None
    class_logits: dict[int, Float[Array, "B C"]] | None = None


class SequenceModel(nn.Module):
    """Any mixer x any feed-forward x any depth policy x any head.

    Attributes:
      vocab_size: number of token ids.
      d_model: width of the residual stream.
      num_layers: layers that a token passes if nothing is skipped or shared away.
      mixers: pattern of mixers, repeated over the layers.
      ffn: feed-forward of every layer.
      depth: which token passes which layer.
      head: what becomes of the hidden states.
      norm: norm of mixers, feed-forwards and, unless it comes after them, before the head.
      norm_order: where it stands in a layer, one of `depth.block.NORM_ORDERS`.
      embed: from token ids to the first hidden states.
      max_seq_len: longest sequence that the model takes.
      dtype: compute dtype; parameters stay float32.
      remat: activations that the backward pass recomputes (`depth.stack.REMAT_POLICIES`).
      scan_layers: scan over layers with stacked parameters instead of unrolling them.
      num_microbatches: micro-batches of a batch on a mesh with a pipeline, which scanned layers are (`depth.Stack`).
    """

    vocab_size: int = 260
    d_model: int = 128
    num_layers: int = 4
    mixers: tuple[nn.Module, ...] = (Attention(),)
    ffn: nn.Module | None = Gated()
    depth: nn.Module = Plain()
    head: nn.Module = Tied()
    norm: nn.Module = RMSNorm()
    norm_order: str = "pre"
    embed: nn.Module = TokenEmbedding()
    max_seq_len: int = 2048
    dtype: str = "float32"
    remat: str | None = "none"
    scan_layers: bool = False
    num_microbatches: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(vocabulary, width, positions), which the embedding asks for."""
        return self.vocab_size, self.d_model, self.max_seq_len

    def stack(self) -> Stack:
        """All the layers, unbound."""
        blocks = tuple(
            Block(
                mixer=fresh(self.mixers[i % len(self.mixers)]),
                ffn=None if self.ffn is None else fresh(self.ffn),
                mixer_norm=fresh(self.norm),
                ffn_norm=fresh(self.norm),
                norm_order=self.norm_order,
                mixer_out_norm=fresh(self.norm) if self.norm_order == "sandwich" else None,
                ffn_out_norm=fresh(self.norm) if self.norm_order == "sandwich" else None,
                parent=None,
            )
            for i in range(self.num_layers)
        )
        return Stack(blocks, self.remat, self.scan_layers, self.num_microbatches, parent=None)

    def at_step(self, step: int) -> "SequenceModel":
        """The model as it is at a training step: parts with a schedule of static fields (capacities) move along it."""
        parts: dict[str, Any] = {"depth": self.depth, "ffn": self.ffn, "head": self.head}
        moved = {k: p.at_step(step) for k, p in parts.items() if hasattr(p, "at_step")}
        return self.clone(**moved) if any(moved[k] != parts[k] for k in moved) else self

    def init_state(self, batch_size: int, max_length: int) -> DecodeState:
        """The state before the first token, for rows of up to `max_length` tokens; the model need not be bound.

        Raises:
          ValueError: for a length or batch that is not valid, or a mixer that sees later tokens.
        """
        if not 1 <= max_length <= self.max_seq_len:
            raise ValueError(f"max_length={max_length}; valid: 1 to max_seq_len={self.max_seq_len}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; valid: at least 1")
        check_causal(self.mixers, "decoding")
        layers = self.depth.init_state(
            self.stack(), batch_size, max_length, self.d_model, self.dtype
        )
        return DecodeState(layers, jnp.zeros((batch_size,), jnp.int32), max_length)

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: DecodeState | None = None,
        head_at: Int[Array, "B K"] | None = None,
        train: bool = False,
    ) -> Output:
        """Runs the model.

        Args:
          tokens: token ids.
          positions: position of each token within its segment; None counts from 0 along the row, and with a state it
            counts the tokens that are not padding on from those seen.
          segment_ids: tokens see only tokens of their own segment, and 0 is padding; None means one segment a row.
          state: what was seen before, from `init_state` or from the call before; the tokens go on from there, one or
            more at a time. Padding on either side of a row leaves no trace in it, so prompts may differ in length.
          head_at: index in the row of each token that the head reads; None: all. After a prompt only the last token's
            logits are of use, and those of all of them are the largest array of the call.
          train: training behaviour (top-k routing over the sequence, jitter); needs `rngs={"routing": key}`.

        Raises:
          ValueError: if the sequence is longer than `max_seq_len` or than the state has room for, or a shape does not
            match the tokens', or a state comes with `train`.
        """
        positions, segment_ids = self._check_inputs(tokens, positions, segment_ids, state, train)
        x, table = self.embed(tokens, positions, sizes=self.sizes, dtype=self.dtype)
        x = constrain(x, "batch length _")
        x, layers, aux = self.depth(
            self.stack(),
            x,
            positions=positions,
            segment_ids=segment_ids,
            state=None if state is None else state.layers,
            train=train,
        )
        if state is not None:
            seen = jnp.sum(segment_ids > 0, axis=1, dtype=jnp.int32)
            state = dataclasses.replace(state, layers=layers, length=state.length + seen)
        hidden = self._normed(x)
        head, head_aux = self._read(hidden, table, segment_ids, head_at)
        aux = scalars.combine([aux, head_aux])
        return Output(
            hidden=hidden,
            aux=scalars.losses(aux),
            metrics=scalars.metrics(aux),
            state=state,
            **head,
        )

    @nn.compact
    def cross_entropy(
        self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """Cross-entropy of the head's logits for `targets`, in nats, and their log-sum-exp.

        Args:
          hidden: of an `Output`; its logits are not computed where, in a compiled program, nothing is made of them.
          targets: token ids.
        """
        table = self.embed.table(sizes=self.sizes)
        return self.head.cross_entropy(hidden, embedding=table, targets=targets)

    def init_pool(self, batch_size: int, max_length: int) -> DecodeState:
        """The state for `enter`, `recurse` and `leave`, which take each row at a depth of its own.

        Raises:
          ValueError: as `init_state` does, or for a depth policy without recursions.
        """
        if not isinstance(self.depth, Depthwise):
            raise ValueError(
                f"depth={describe(self.depth)['name']!r} has no recursions that rows could be at different ones of; "
                "valid: 'recursive' or 'mixture_of_recursions'"
            )
        # Whether the arguments are valid, and the rest of the state.
        state = jax.eval_shape(functools.partial(self.init_state, batch_size, max_length))
        layers = self.depth.init_pool(
            self.stack(), batch_size, max_length, self.d_model, self.dtype
        )
        return dataclasses.replace(state, layers=layers, length=jnp.zeros_like(state.length))

    @nn.compact
    def enter(
        self,
        tokens: Int[Array, "K 1"],
        *,
        rows: Int[Array, " K"],
        segment_ids: Int[Array, "K 1"],
        state: DecodeState,
    ) -> tuple[Journey, DecodeState]:
        """Takes the next token of some rows as far as the first recursion.

        Args:
          tokens: token ids.
          rows: which rows of the state these are; past its end: none.
          segment_ids: 0 marks a row that has no token.
          state: from `init_pool`.
        """
        positions = state.length.at[rows].get(mode="clip")[:, None]
        x, _ = self.embed(tokens, positions, sizes=self.sizes, dtype=self.dtype)
        journey, layers = self.depth.enter(
            self.stack(),
            x,
            rows=rows,
            positions=positions,
            segment_ids=segment_ids,
            pool=state.layers,
        )
        return journey, dataclasses.replace(state, layers=layers)

    def recurse(self, journey: Journey, *, state: DecodeState) -> tuple[Journey, DecodeState]:
        """Applies to the token of each row that goes on the recursion that is its next, whichever that is."""
        positions = state.length[:, None]
        journey, layers = self.depth.recurse(
            self.stack(), journey, positions=positions, pool=state.layers
        )
        return journey, dataclasses.replace(state, layers=layers)

    @nn.compact
    def leave(
        self,
        x: Float[Array, "K 1 D"],
        *,
        rows: Int[Array, " K"],
        segment_ids: Int[Array, "K 1"],
        state: DecodeState,
    ) -> Output:
        """Takes the token of some rows from its last recursion to the head: they have then seen it.

        Args:
          x: its hidden state.
          rows, segment_ids, state: as for `enter`.
        """
        positions = state.length.at[rows].get(mode="clip")[:, None]
        x, layers = self.depth.leave(
            self.stack(),
            x,
            rows=rows,
            positions=positions,
            segment_ids=segment_ids,
            pool=state.layers,
        )
        hidden = self._normed(x)
        head, aux = self._read(hidden, self.embed.table(sizes=self.sizes), segment_ids, None)
        seen = (segment_ids[:, 0] > 0).astype(jnp.int32)
        length = state.length.at[rows].add(seen, mode="drop")
        return Output(
            hidden=hidden,
            aux=scalars.losses(aux),
            metrics=scalars.metrics(aux),
            state=dataclasses.replace(state, layers=layers, length=length),
            **head,
        )

    if TYPE_CHECKING:

        def apply(self, variables: VariableDict, *args: Any, **kwargs: Any) -> Any:
            """Linen's, whose type says that a pair may come back: one does if something is `mutable`."""

    def _normed(self, x):
        # A stack whose layers end in a norm needs no other.
        is_normed = self.norm_order == "post"
        return x if is_normed else fresh(self.norm).clone(parent=self, name="final_norm")(x)

    def _read(self, hidden, table, segment_ids, head_at):
        """What the head makes of the tokens that it reads, and what that costs a token of the call."""
        length = hidden.shape[1]
        if head_at is not None:
            hidden = jnp.take_along_axis(hidden, head_at[..., None], axis=1)
            segment_ids = jnp.take_along_axis(segment_ids, head_at, axis=1)
        head = self.head(hidden, embedding=table, segment_ids=segment_ids)
        flops = self.head.flops_per_token(self.d_model, self.vocab_size)
        return head, scalars.flops(flops * hidden.shape[1] / length)

    def _check_inputs(self, tokens, positions, segment_ids, state, train):
        if tokens.ndim != 2:
            raise ValueError(f"tokens has shape {tokens.shape}; valid: [batch, time]")
        if tokens.shape[1] > self.max_seq_len:
            raise ValueError(
                f"sequence of {tokens.shape[1]} tokens is longer than max_seq_len={self.max_seq_len}"
            )
        if state is not None:
            self._check_state(tokens, state, train)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None and state is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        elif positions is None:
            order = jnp.cumsum(segment_ids > 0, axis=1, dtype=jnp.int32) - 1
            positions = state.length[:, None] + jnp.maximum(order, 0)
        for name, value in (("positions", positions), ("segment_ids", segment_ids)):
            if value.shape != tokens.shape:
                raise ValueError(
                    f"{name} has shape {value.shape}; valid: that of tokens, {tokens.shape}"
                )
        return positions, segment_ids

    def _check_state(self, tokens, state, train):
        if train:
            raise ValueError("train=True with a decode state; valid: one of them, or neither")
        if state.length.shape != tokens.shape[:1]:
            raise ValueError(
                f"state is of {state.length.shape[0]} rows; valid: as many as tokens, {tokens.shape[0]}"
            )
        if tokens.shape[1] > state.max_length:
            raise ValueError(
                f"{tokens.shape[1]} tokens for a state with max_length={state.max_length}; valid: at most as many"
            )


def check_causal(mixers: tuple[nn.Module, ...], what: str) -> None:
    """Raises ValueError if one of the mixers lets a token see what comes after it."""
    for mixer in mixers:
        if not getattr(mixer, "causal", True):
            raise ValueError(f"{what} needs causal mixers, got {mixer}; valid: causal=True")


class DecoderLM(SequenceModel):
    """A causal language model."""

    def __post_init__(self):
        super().__post_init__()
        check_causal(self.mixers, "DecoderLM")


class TextEncoder(SequenceModel):
    """A bidirectional encoder; with an embedding head, one vector per text."""

    mixers: tuple[nn.Module, ...] = (Attention(causal=False),)
