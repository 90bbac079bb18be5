"""Models as compositions: embedding -> depth policy over a stack of (mixer, feed-forward) blocks -> norm -> head."""

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.depth import Block, Plain, Stack, fresh
from effjax.ffn import Gated
from effjax.heads import Tied
from effjax.mixers import Attention
from effjax.nn import Embed, RMSNorm, scalars
from effjax.nn.linear import lookup


@flax.struct.dataclass
class Output:
    """What a model returns.

    Attributes:
      hidden: [B, T, D] states after the last norm.
      aux: weighted auxiliary losses, scalars under `loss/...`.
      metrics: everything else the parts report (see `effjax.nn.scalars`).
      logits: [B, T, V] float32 scores, from heads that score the vocabulary.
      embeddings: [B, E] float32 vectors, from heads that embed the text.
      class_logits: [B, C] float32 scores of the text's class by how many leading coordinates of the embedding they are
        from, from heads that classify.
    """

    hidden: Float[Array, "B T D"]
    aux: scalars.Scalars
    metrics: scalars.Scalars
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
      norm: norm before mixer, feed-forward and head.
      max_seq_len: longest sequence that the model takes.
      dtype: compute dtype; parameters stay float32.
      remat: activations that the backward pass recomputes (`depth.stack.REMAT_POLICIES`).
      scan_layers: scan over layers with stacked parameters instead of unrolling them.
    """

    vocab_size: int = 260
    d_model: int = 128
    num_layers: int = 4
    mixers: tuple[nn.Module, ...] = (Attention(),)
    ffn: nn.Module | None = Gated()
    depth: nn.Module = Plain()
    head: nn.Module = Tied()
    norm: nn.Module = RMSNorm()
    max_seq_len: int = 2048
    dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = False

    def stack(self) -> Stack:
        """All the layers, unbound."""
        blocks = tuple(
            Block(
                mixer=fresh(self.mixers[i % len(self.mixers)]),
                ffn=None if self.ffn is None else fresh(self.ffn),
                mixer_norm=fresh(self.norm),
                ffn_norm=fresh(self.norm),
                parent=None,
            )
            for i in range(self.num_layers)
        )
        return Stack(blocks, self.remat, self.scan_layers, parent=None)

    def at_step(self, step: int) -> "SequenceModel":
        """The model as it is at a training step: parts with a schedule of static fields (capacities) move along it."""
        parts = {"depth": self.depth, "ffn": self.ffn, "head": self.head}
        moved = {k: p.at_step(step) for k, p in parts.items() if hasattr(p, "at_step")}
        return self.clone(**moved) if any(moved[k] != parts[k] for k in moved) else self

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Output:
        """Runs the model.

        Args:
          tokens: token ids.
          positions: position of each token within its segment; None counts from 0 along the row.
          segment_ids: tokens see only tokens of their own segment, and 0 is padding; None means one segment a row.
          train: training behaviour (top-k routing over the sequence, jitter); needs `rngs={"routing": key}`.

        Raises:
          ValueError: if the sequence is longer than `max_seq_len`, or a shape does not match the tokens'.
        """
        positions, segment_ids = self._check_inputs(tokens, positions, segment_ids)
        table = Embed(self.vocab_size, self.d_model, name="embed")()
        x = nn.with_logical_constraint(lookup(table, tokens, self.dtype), ("batch", "length", None))
        x, aux = self.depth(
            self.stack(), x, positions=positions, segment_ids=segment_ids, train=train
        )
        hidden = fresh(self.norm).clone(parent=self, name="final_norm")(x)
        head = self.head(hidden, embedding=table, segment_ids=segment_ids)
        head_flops = scalars.flops(self.head.flops_per_token(self.d_model, self.vocab_size))
        aux = scalars.combine([aux, head_flops])
        return Output(hidden=hidden, aux=scalars.losses(aux), metrics=scalars.metrics(aux), **head)

    def _check_inputs(self, tokens, positions, segment_ids):
        if tokens.ndim != 2:
            raise ValueError(f"tokens has shape {tokens.shape}; valid: [batch, time]")
        if tokens.shape[1] > self.max_seq_len:
            raise ValueError(
                f"sequence of {tokens.shape[1]} tokens is longer than max_seq_len={self.max_seq_len}"
            )
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        for name, value in (("positions", positions), ("segment_ids", segment_ids)):
            if value.shape != tokens.shape:
                raise ValueError(
                    f"{name} has shape {value.shape}; valid: that of tokens, {tokens.shape}"
                )
        return positions, segment_ids


class DecoderLM(SequenceModel):
    """A causal language model."""

    def __post_init__(self):
        super().__post_init__()
        for mixer in self.mixers:
            if not getattr(mixer, "causal", True):
                raise ValueError(f"DecoderLM needs causal mixers, got {mixer}; valid: causal=True")


class TextEncoder(SequenceModel):
    """A bidirectional encoder; with an embedding head, one vector per text."""

    mixers: tuple[nn.Module, ...] = (Attention(causal=False),)
