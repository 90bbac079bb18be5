"""Models of other libraries, in and out.

A Hugging Face folder is read and written by one table a family (`effjax.interop.families`): which of its tensors is
which of our parameters, and how its axes lie. So are the checkpoints of the authors of BASED and of
Mixture-of-Recursions. `effjax.models.uptrain` makes cheaper models of the dense ones. Only safetensors are read, never
pickle. An export is a folder of programs that needs nothing but JAX.
"""

from effjax.interop.error import InteropError
from effjax.interop.export import Exported, load_export, save_export
from effjax.interop.load import load_hf, read_model
from effjax.interop.save import save_hf

__all__ = [
    "Exported",
    "InteropError",
    "load_export",
    "load_hf",
    "read_model",
    "save_export",
    "save_hf",
]
