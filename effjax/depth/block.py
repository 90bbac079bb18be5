"""One residual layer: mixer, then feed-forward, each behind a norm."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int

from effjax.nn import scalars


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) (pre-norm; Xiong et al., 2020, arXiv 2002.04745).

    Attributes:
      mixer: any part under the mixer seam.
      ffn: any part under the feed-forward seam, or None for a layer that only mixes.
      mixer_norm: norm before the mixer.
      ffn_norm: norm before the feed-forward.
    """

    mixer: nn.Module
    ffn: nn.Module | None
    mixer_norm: nn.Module
    ffn_norm: nn.Module

    def flops_per_token(self, d_model: int, context: int) -> float:
        """Forward FLOPs per token of the whole layer with nothing skipped."""
        ffn = self.ffn.flops_per_token(d_model) if self.ffn is not None else 0.0
        return self.mixer.flops_per_token(d_model, context) + ffn

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: Any = None,
        train: bool = False,
    ):
        """Returns (x [B, T, D], the mixer's new state, aux)."""
        flops = self._mixer_flops(x, state)
        mixed, state = self.mixer(
            self.mixer_norm(x), positions=positions, segment_ids=segment_ids, state=state
        )
        x = x + mixed
        aux = [scalars.flops(flops)]
        if self.ffn is not None:
            update, ffn_aux = self.ffn(self.ffn_norm(x), mask=segment_ids > 0, train=train)
            x = x + update
            aux.append(ffn_aux)
        x = nn.with_logical_constraint(x, ("batch", "length", None))
        return x, state, scalars.combine(aux)

    def _mixer_flops(self, x, state):
        if getattr(state, "frozen", False):
            return self.mixer.flops_per_token(x.shape[-1], state.k.shape[1], reads_only=True)
        return self.mixer.flops_per_token(x.shape[-1], x.shape[1])
