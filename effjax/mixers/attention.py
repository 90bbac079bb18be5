"""Softmax attention with grouped-query heads and rotary positions: the Llama mixer."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels
from effjax.mixers.kv_state import KVState
from effjax.mixers.paged_kv import PagedKVState
from effjax.nn import Linear, RMSNorm, on_shards, rotary
from effjax.nn.rotary import Scaling
from effjax.registry import register, unknown

__all__ = ["Attention", "KVState"]

QK_NORM_OVER = ("head", "heads")


@register("mixer", "attention")
class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017) with grouped queries (Ainslie et al., 2023, arXiv 2305.13245).

    Attributes:
      num_heads: query heads.
      num_kv_heads: key and value heads, a divisor of `num_heads`; None means `num_heads`.
      head_dim: size of a head; None means d_model / num_heads.
      causal: whether a token sees only itself and what is before it.
      window: if given, a token sees itself and the `window - 1` tokens before it.
      qkv_bias: biases on the maps to queries, keys and values.
      out_bias: a bias on the map back to d_model.
      rope_base: base of the rotary frequencies; None means no rotary embedding.
      rope_scaling: how these are slowed for long texts, one of `effjax.nn.rotary.SCALINGS`; None: not at all.
      rope_factor: by how much; this and the next three are the fields of `effjax.nn.rotary.Scaling`.
      rope_low_freq_factor: for `rope_scaling="llama3"`.
      rope_high_freq_factor: for `rope_scaling="llama3"`.
      rope_original_length: for `rope_scaling="llama3"`.
      qk_norm: whether queries and keys are normalised (Dehghani et al., 2023, arXiv 2302.05442).
      qk_norm_over: what the norm is taken over, one of `QK_NORM_OVER`: each "head" (Qwen3, arXiv 2505.09388) or all
        "heads" of a token together (OLMoE, arXiv 2409.02060).
      norm: of queries and keys, if they are normalised.
      logits_scale: factor on the logits; None means 1 / sqrt(head_dim).
      logits_soft_cap: if given, logits become cap * tanh(logits / cap).
      implementation: of `pallas_kernels.attention` and `decode_attention`; None takes the best for the platform.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    causal: bool = True
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    rope_base: float | None = 10_000.0
    rope_scaling: str | None = None
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    qk_norm: bool = False
    qk_norm_over: str = "head"
    norm: nn.Module = RMSNorm()
    logits_scale: float | None = None
    logits_soft_cap: float | None = None
    implementation: str | None = None

    # Whether later recursions may attend to the state of an earlier one (`depth.mixture_of_recursions`).
    shares_state: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.qk_norm_over not in QK_NORM_OVER:
            raise ValueError(unknown("qk_norm_over", self.qk_norm_over, QK_NORM_OVER))
        self.scaling()  # so that what is wrong with it is found at once

    def scaling(self) -> Scaling | None:
        """How the rotary frequencies are slowed."""
        if self.rope_scaling is None:
            return None
        return Scaling(
            self.rope_scaling,
            self.rope_factor,
            self.rope_low_freq_factor,
            self.rope_high_freq_factor,
            self.rope_original_length,
        )

    def dims(self, d_model: int) -> tuple[int, int]:
        """(key/value heads, head_dim) at this model width.

        Raises:
          ValueError: if the heads do not divide the width or each other.
        """
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(f"num_kv_heads={kv_heads} must divide num_heads={self.num_heads}")
        if self.head_dim is None and d_model % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide d_model={d_model}, or give head_dim"
            )
        return kv_heads, self.head_dim or d_model // self.num_heads

    def init_state(
        self, batch_size: int, max_length: int, d_model: int, dtype="float32"
    ) -> KVState:
        """An empty cache for `max_length` tokens, or for `window` of them if that is fewer."""
        kv_heads, head_dim = self.dims(d_model)
        slots = min(max_length, self.window) if self.window else max_length
        return KVState.empty(batch_size, slots, kv_heads, head_dim, dtype)

    def flops_per_token(self, d_model: int, context: int, reads_only: bool = False) -> float:
        """Forward FLOPs per token; `reads_only` for queries to a frozen state, which make no keys and values."""
        kv_heads, head_dim = self.dims(d_model)
        heads = 2 * self.num_heads + (0 if reads_only else 2 * kv_heads)
        projections = 2.0 * d_model * head_dim * heads
        return projections + 2.0 * 2 * self.num_heads * head_dim * self.mean_keys(context)

    def mean_keys(self, context: int) -> float:
        """Keys that a token of a `context` long sequence attends to, averaged over the sequence."""
        if not self.causal:
            return float(context)
        window = min(self.window or context, context)
        return (window * (window + 1) / 2 + (context - window) * window) / context

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: KVState | PagedKVState | None = None,
    ) -> tuple[Float[Array, "B T D"], KVState | PagedKVState]:
        d_model = x.shape[-1]
        kv_heads, head_dim = self.dims(d_model)
        q = self._heads("query", self.num_heads, head_dim, x, positions)
        if state is not None and state.frozen:
            y = (
                self._decode(q, segment_ids, state)
                if state.newest
                else self._attend(q, positions, segment_ids, state)
            )
            new_state = state
        else:
            fresh = KVState(
                k=self._heads("key", kv_heads, head_dim, x, positions),
                v=Linear(kv_heads * head_dim, self.qkv_bias, name="value")(x).reshape(
                    *x.shape[:2], kv_heads, head_dim
                ),
                positions=positions,
                segment_ids=segment_ids,
                length=jnp.sum(segment_ids > 0, axis=1),
            )
            if state is None:
                y, new_state = self._attend_parallel(q, fresh), fresh
            else:
                new_state = state.append(fresh)
                decoding = x.shape[1] == 1
                y = (
                    self._decode(q, segment_ids, new_state)
                    if decoding
                    else self._attend_after(state, q, fresh)
                )
        y = y.reshape(*x.shape[:2], self.num_heads * head_dim)
        return Linear(d_model, self.out_bias, name="out")(y), new_state

    def _heads(self, name, num_heads, head_dim, x, positions):
        heads = Linear(num_heads * head_dim, self.qkv_bias, name=name)(x)
        if self.qk_norm and self.qk_norm_over == "heads":
            heads = self._norm(name)(heads)
        heads = heads.reshape(*x.shape[:2], num_heads, head_dim)
        if self.qk_norm and self.qk_norm_over == "head":
            heads = self._norm(name)(heads)
        if self.rope_base is None:
            return heads
        return rotary(heads, positions, self.rope_base, self.scaling())

    def _norm(self, name):
        return self.norm.clone(parent=self, name=f"{name}_norm")

    def _attend_parallel(self, q, kv):
        return self._attention(q, kv.k, kv.v, kv.segment_ids, None)

    def _attend_after(self, state, q, fresh):
        """Several tokens after those of a cache; the last may push out of it what the first still has to see."""

        def after():
            # A window is of tokens that came here, as in the parallel form: a depth policy may have left some out.
            kv = state.concatenate(fresh)
            real = fresh.segment_ids > 0
            order = state.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
            positions = jnp.concatenate([state.order(), order], axis=1)
            kv = dataclasses.replace(kv, positions=positions)
            return self._attend(q, order, fresh.segment_ids, kv)

        # A prompt is the rule, and does not pay for the empty slots of its cache.
        return jax.lax.cond(
            jnp.any(state.length > 0), after, lambda: self._attend_parallel(q, fresh)
        )

    def _attend(self, q, positions, segment_ids, kv):
        segment_ids, positions = (segment_ids, kv.segment_ids), (positions, kv.positions)
        return self._attention(
            q, kv.k.astype(q.dtype), kv.v.astype(q.dtype), segment_ids, positions
        )

    def _decode(self, q, segment_ids, kv):
        """One token, which is the last of its row's slots; all of them are of its segment, and in its window."""

        def decode(q, k, v, lengths, page_table):
            return pallas_kernels.decode_attention(
                q,
                k,
                v,
                lengths,
                page_table=page_table,
                scale=self.logits_scale,
                logits_soft_cap=self.logits_soft_cap,
                implementation=self.implementation,
            )

        lengths = jnp.where(segment_ids[:, 0] > 0, jnp.minimum(kv.length, kv.num_slots), 0)
        heads = "batch _ heads _"
        cache = heads if kv.page_table is None else "_ _ heads _"
        decode = on_shards(decode, (heads, cache, cache, "batch", "batch _"), heads)
        return decode(q, kv.k.astype(q.dtype), kv.v.astype(q.dtype), lengths, kv.page_table)

    def _attention(self, q, k, v, segment_ids, positions):
        def attend(q, k, v, segment_ids, positions, axis_name=None):
            return pallas_kernels.attention(
                q,
                k,
                v,
                causal=self.causal,
                window=self.window,
                segment_ids=segment_ids,
                positions=positions,
                scale=self.logits_scale,
                logits_soft_cap=self.logits_soft_cap,
                axis_name=axis_name,
                implementation=self.implementation,
            )

        heads, tokens = "batch length heads _", "batch length"
        attend = on_shards(attend, (heads, heads, heads, tokens, tokens), heads)
        return attend(q, k, v, segment_ids, positions)
