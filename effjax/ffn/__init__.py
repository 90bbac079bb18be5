"""Feed-forwards: `(x[B, T, D], *, mask[B, T], train) -> (y[B, T, D], aux)`, where the mask tells text from padding."""

from effjax.ffn.adamoe import AdaMoE
from effjax.ffn.dense import Dense, Gated
from effjax.ffn.switch import Switch
from effjax.ffn.top_k import TopK

__all__ = ["AdaMoE", "Dense", "Gated", "Switch", "TopK"]
