"""One residual layer: mixer, then feed-forward, each behind a norm."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int

from effjax.nn import constrain, scalars
from effjax.registry import unknown

NORM_ORDERS = ("pre", "post", "sandwich")


class Block(nn.Module):
    """A mixer, then a feed-forward, each added to what it was given.

    "pre": x + f(norm(x)) (Xiong et al., 2020, arXiv 2002.04745). "post": norm(x + f(x)) (Vaswani et al., 2017).
    "sandwich": x + norm(f(norm(x))), with two norms (Ding et al., 2021, arXiv 2105.13290, section 2.4; Gemma 2).

    Attributes:
      mixer: any part under the mixer seam.
      ffn: any part under the feed-forward seam, or None for a layer that only mixes.
      mixer_norm: norm of the mixer.
      ffn_norm: norm of the feed-forward.
      norm_order: where they stand, one of `NORM_ORDERS`.
      mixer_out_norm: the second norm of the mixer in a "sandwich".
      ffn_out_norm: the second norm of the feed-forward in a "sandwich".
    """

    mixer: nn.Module
    ffn: nn.Module | None
    mixer_norm: nn.Module
    ffn_norm: nn.Module
    norm_order: str = "pre"
    mixer_out_norm: nn.Module | None = None
    ffn_out_norm: nn.Module | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.norm_order not in NORM_ORDERS:
            raise ValueError(unknown("norm_order", self.norm_order, NORM_ORDERS))
        for field in ("mixer_out_norm", "ffn_out_norm"):
            if (getattr(self, field) is None) == (self.norm_order == "sandwich"):
                raise ValueError(
                    f"{field}={getattr(self, field)} with norm_order={self.norm_order!r}; valid: a norm for "
                    "'sandwich', and None for others"
                )

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
        """Returns (x [B, T, D], the mixer's new state, aux).

        With a state, `flops/spent` counts the attention of a call's tokens to each other, not to those in the cache.
        """
        flops = self._mixer_flops(x, state)
        mixed, state = self.mixer(
            self._before(self.mixer_norm, x),
            positions=positions,
            segment_ids=segment_ids,
            state=state,
        )
        x = self._added(self.mixer_norm, self.mixer_out_norm, x, mixed)
        aux = [scalars.flops(flops)]
        if self.ffn is not None:
            before = self._before(self.ffn_norm, x)
            update, ffn_aux = self.ffn(before, mask=segment_ids > 0, train=train)
            x = self._added(self.ffn_norm, self.ffn_out_norm, x, update)
            aux.append(ffn_aux)
        x = constrain(x, "batch length _")
        return x, state, scalars.combine(aux)

    def _before(self, norm: nn.Module, x):
        return x if self.norm_order == "post" else norm(x)

    def _added(self, norm: nn.Module, out_norm: nn.Module | None, x, update):
        if self.norm_order == "post":
            return norm(x + update)
        return x + (update if out_norm is None else out_norm(update))

    def _mixer_flops(self, x, state):
        if getattr(state, "frozen", False):
            return self.mixer.flops_per_token(x.shape[-1], state.num_slots, reads_only=True)
        return self.mixer.flops_per_token(x.shape[-1], x.shape[1])
