"""The few primitives that every part shares."""

from effjax.nn import scalars
from effjax.nn.linear import Embed, Linear
from effjax.nn.norm import LayerNorm, RMSNorm
from effjax.nn.rotary import rotary
from effjax.nn.shards import on_shards

__all__ = ["Embed", "LayerNorm", "Linear", "RMSNorm", "on_shards", "rotary", "scalars"]
