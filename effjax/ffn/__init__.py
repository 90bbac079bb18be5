"""Feed-forwards: `(x[B, T, D]) -> (y[B, T, D], aux)`."""

from effjax.ffn.dense import Dense, Gated

__all__ = ["Dense", "Gated"]
