"""Models of other libraries, in and out.

A Hugging Face folder is read and written by one table a family (`effjax.interop.families`): which of its tensors is
which of our parameters, and how its axes lie. Only safetensors are read, never pickle.
"""

from effjax.interop.error import InteropError
from effjax.interop.load import load_hf
from effjax.interop.save import save_hf

__all__ = ["InteropError", "load_hf", "save_hf"]
