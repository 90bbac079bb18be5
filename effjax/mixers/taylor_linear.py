"""Linear attention with the Taylor feature map: BASED's mixer for what is far away."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.mixers.recurrent_state import RecurrentState, advance
from effjax.nn import Linear, on_shards, rotary
from effjax.registry import register
from pallas_kernels.linear_attention import (
    LinearAttentionState,
    linear_attention,
    linear_attention_decode,
)
from pallas_kernels.linear_attention.feature_maps import get as get_feature_map


@register("mixer", "taylor_linear")
class TaylorLinear(nn.Module):
    """y_t = Σ w_ts v_s / Σ w_ts over s <= t, with w_ts = φ(q_t) · φ(k_s) = 1 + x + x²/2, x = q_t · k_s / sqrt(d).

    The weights are the second-order Taylor series of softmax attention's exp(x), and being a product of features they
    need no keys and values to be kept, only the sums of φ(k) vᵀ and φ(k) (Arora et al., 2024, arXiv 2402.18668,
    section 4.1, eq. 2). The state is H (1 + d + d(d+1)/2) (Dv + 1) numbers for feature dimension d: the paper's
    1 + d + d² without the products that occur twice. So `feature_dim` dials recall against memory. The source has no
    rotary positions; order comes from the convolution layers around.

    Attributes:
      num_heads: heads.
      feature_dim: size d of a query and a key of one head.
      head_dim: size Dv of a value of one head; None means d_model / num_heads.
      feature_map: φ, one of `pallas_kernels.linear_attention.FEATURE_MAPS`.
      eps: added to the sum of the weights.
      rope_base: base of rotary frequencies on queries and keys; None means no rotary embedding.
      chunk_size: tokens a chunk of the parallel form; None leaves it to the kernel.
      implementation: of `pallas_kernels.linear_attention`; None takes the best for the platform.
    """

    num_heads: int = 4
    feature_dim: int = 16
    head_dim: int | None = None
    feature_map: str = "taylor"
    eps: float = 1e-12
    rope_base: float | None = None
    chunk_size: int | None = None
    implementation: str | None = None

    def value_dim(self, d_model: int) -> int:
        """Size of a value of one head at this model width.

        Raises:
          ValueError: if the heads do not divide the width.
        """
        if self.head_dim is None and d_model % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide d_model={d_model}, or give head_dim"
            )
        return self.head_dim or d_model // self.num_heads

    def init_state(
        self, batch_size: int, max_length: int, d_model: int, dtype="float32"
    ) -> RecurrentState:
        """A state that has seen nothing; its size does not depend on `max_length`.

        The sums are float32 even where `dtype` is narrower: they grow with the sequence, and small terms would be lost.
        """
        sums = LinearAttentionState.zeros(
            batch_size,
            self.num_heads,
            self.feature_dim,
            self.value_dim(d_model),
            self.feature_map,
            jnp.promote_types(dtype, jnp.float32),
        )
        return RecurrentState.of(sums)

    def flops_per_token(self, d_model: int, context: int) -> float:
        """FLOPs of the recurrent form, which are the same at any `context`."""
        value_dim = self.value_dim(d_model)
        projections = 2.0 * 2 * d_model * self.num_heads * (self.feature_dim + value_dim)
        num_features = get_feature_map(self.feature_map).num_features(self.feature_dim)
        return projections + 2.0 * 2 * self.num_heads * num_features * (value_dim + 1)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: RecurrentState | None = None,
    ) -> tuple[Float[Array, "B T D"], RecurrentState]:
        d_model = x.shape[-1]
        q = self._features("query", x, positions)
        k = self._features("key", x, positions)
        heads = (*x.shape[:2], self.num_heads, self.value_dim(d_model))
        v = Linear(heads[2] * heads[3], name="value")(x).reshape(heads)
        y, new_state = advance(
            state,
            segment_ids,
            step=lambda sums: linear_attention_decode(
                sums, q, k, v, feature_map=self.feature_map, eps=self.eps
            ),
            scan=lambda sums: self._attend(q, k, v, segment_ids, sums),
        )
        y = y.reshape(*x.shape[:2], heads[2] * heads[3])
        return Linear(d_model, name="out")(y), new_state

    def _features(self, name: str, x, positions):
        heads = Linear(self.num_heads * self.feature_dim, name=name)(x)
        heads = heads.reshape(*x.shape[:2], self.num_heads, self.feature_dim)
        return heads if self.rope_base is None else rotary(heads, positions, self.rope_base)

    def _attend(self, q, k, v, segment_ids, before):
        def attend(q, k, v, segment_ids, before, axis_name=None):
            return linear_attention(
                q,
                k,
                v,
                feature_map=self.feature_map,
                chunk_size=self.chunk_size,
                segment_ids=segment_ids,
                eps=self.eps,
                initial_state=before,
                return_state=True,
                axis_name=axis_name,
                implementation=self.implementation,
            )

        heads, tokens = "batch length heads _", "batch length"
        sums = LinearAttentionState._make(("batch heads _ _", "batch heads _"))
        attend = on_shards(attend, (heads, heads, heads, tokens, sums), (heads, sums))
        return attend(q, k, v, segment_ids, before)
