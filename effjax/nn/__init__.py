"""The few primitives that every part shares."""

from effjax.nn import scalars
from effjax.nn.linear import Embed, Linear
from effjax.nn.norm import LayerNorm, RMSNorm
from effjax.nn.rotary import rotary

__all__ = ["Embed", "LayerNorm", "Linear", "RMSNorm", "rotary", "scalars"]
