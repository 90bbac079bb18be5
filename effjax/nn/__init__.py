"""The few primitives that every part shares."""

from effjax.nn import scalars
from effjax.nn.linear import Linear
from effjax.nn.norm import LayerNorm, RMSNorm
from effjax.nn.rotary import rotary
from effjax.nn.shards import constrain, on_shards
from effjax.nn.token_embedding import TokenEmbedding

__all__ = [
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "TokenEmbedding",
    "constrain",
    "on_shards",
    "rotary",
    "scalars",
]
